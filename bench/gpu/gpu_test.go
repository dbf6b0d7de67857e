package gpu

import (
	"context"
	"testing"

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
