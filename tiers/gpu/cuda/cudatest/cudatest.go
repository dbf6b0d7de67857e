// Package cudatest opens a device for tests: a real one, or the emulated one of tiers/gpu/mock.
package cudatest

import (
	"errors"
	"os"
	"testing"

	"kvtier/tiers/gpu/cuda"
)

// Missing skips the test if err is that there is no device, unless REQUIRE_CUDA=1.
func Missing(t testing.TB, err error) {
	t.Helper()
	if (errors.Is(err, cuda.ErrNoDriver) || errors.Is(err, cuda.ErrNoDevice)) && os.Getenv("REQUIRE_CUDA") != "1" {
		t.Skipf("%v: `make test-cuda` tests with an emulated device", err)
	}
}

// Open opens device 0 until the test ends. Without one the test is skipped.
func Open(t testing.TB) *cuda.Device {
	t.Helper()
	d, err := cuda.Open(0)
	Missing(t, err)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	return d
}
