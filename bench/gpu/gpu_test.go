package gpu

import (
	"context"
	"errors"
	"os"
	"testing"

	"kvtier/tiers/gpu/cuda"
)

// TestSelfTest compares the kernels with the Go loop on all shapes, on whatever device there is: `make test-cuda` has an emulated one.
func TestSelfTest(t *testing.T) {
	d, err := cuda.Open(0)
	if (errors.Is(err, cuda.ErrNoDriver) || errors.Is(err, cuda.ErrNoDevice)) && os.Getenv("REQUIRE_CUDA") == "" {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	checked, err := SelfTest(context.Background(), d, true, t.Logf)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range checked {
		if c.Fail != "" {
			t.Errorf("%+v: %s", c.Shape, c.Fail)
		}
	}
}
