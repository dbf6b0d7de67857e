package gpu

import (
	"context"
	"errors"
	"testing"

	"kvtier/tiers/gpu/cuda"
	"kvtier/tiers/gpu/cuda/cudatest"
)

// TestSelfTest compares the kernels with the Go loop on all shapes, on whatever device there is: `make test-cuda` has an emulated one.
func TestSelfTest(t *testing.T) {
	checked, err := SelfTest(context.Background(), cudatest.Open(t), true, t.Logf)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range checked {
		if c.Fail != "" {
			t.Errorf("%+v: %s", c.Shape, c.Fail)
		}
	}
}

// TestRefuses: what cannot be measured is refused before a device is looked for.
func TestRefuses(t *testing.T) {
	for _, o := range []Options{{Tokens: []int{3000}}, {Tokens: []int{0}}, {Tokens: []int{-2048}}, {Tokens: []int{4096, 2048}}, {Tokens: []int{2048, 2048}}, {Repeats: -1}, {Device: -1}} {
		if _, err := Measure(context.Background(), o); err == nil || errors.Is(err, cuda.ErrNoDriver) || errors.Is(err, cuda.ErrNoDevice) {
			t.Errorf("%+v: %v", o, err)
		}
	}
}

// TestBringUp measures on whatever device there is: pinned slabs are copied from by the device.
func TestBringUp(t *testing.T) {
	cudatest.Open(t)
	o := Options{Repeats: 1, Short: true, Say: t.Logf}
	rows, err := bringUp(context.Background(), &o)
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range rows {
		if !(r.GBs.Median > 0) || r.Bytes == 0 {
			t.Errorf("%+v", r)
		}
	}
}

// TestSealing measures a small shape on whatever device there is: its bytes are compared on the way.
func TestSealing(t *testing.T) {
	o := Options{Repeats: 1, Short: true, Say: t.Logf}
	rows, err := sealing(context.Background(), cudatest.Open(t), &o, 64, 1, "balanced")
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range rows {
		if !(r.KernelRate > 0 && r.WholeRate > 0 && r.HostRate > 0) {
			t.Errorf("%+v", r)
		}
	}
}
