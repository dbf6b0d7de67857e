package cuda_test

import (
	"testing"

	"kvtier/tiers/memory"
)

// mapped returns memory outside the Go heap.
func mapped(t *testing.T, size int) []byte {
	t.Helper()
	b, err := memory.Map(size)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := memory.Unmap(b); err != nil {
			t.Error(err)
		}
	})
	return b
}
