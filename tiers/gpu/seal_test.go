package gpu

import (
	"errors"
	"testing"
	"time"

	"kvtier/attention"
	"kvtier/compress"
	"kvtier/tiers"
	"kvtier/tiers/gpu/cuda/cudatest"
	"kvtier/tiers/seal"
)

// TestSealStuck: a device that does not answer costs one call its patience. It seals again when it has done what it was asked; layers that there are no
// kernels for are the host's.
func TestSealStuck(t *testing.T) {
	const patience = 50 * time.Millisecond
	tier, err := Open(Options{Bytes: 1 << 20, Patience: patience})
	cudatest.Missing(t, err)
	if err != nil {
		t.Fatal(err)
	}
	defer tier.closeIn(t)
	const d, n = 64, 20
	b := make([]byte, 2*n*d)
	for i := range b {
		b[i] = byte(i*7%61 + i%2*20) // bfloat16 of modest size
	}
	rows := []*seal.Rows{{Heads: 1, HeadDim: d, Type: compress.BF16, K: b, V: b}}
	options := []seal.Options{{Profile: tiers.ProfileBalanced, Metrics: []*attention.Metric{attention.NewQuerySum(d).Metric()}}}
	ask := func() (time.Duration, error) {
		begin := time.Now()
		got, err := tier.Seal(ctx, rows, options)
		if err == nil {
			if want, _ := seal.Segment(rows[0], options[0]); got[0].Header.ID != want.ID {
				t.Fatal("another segment")
			}
		}
		return time.Since(begin), err
	}
	cudatest.Stall(t, true)
	defer cudatest.Stall(t, false)
	if took, err := ask(); !errors.Is(err, ErrStuck) || took < sealPatience*patience {
		t.Fatalf("%v after %v", err, took)
	}
	if took, err := ask(); !errors.Is(err, ErrStuck) || took > patience {
		t.Fatalf("again: %v after %v", err, took)
	}
	if err := tier.Close(); !errors.Is(err, ErrStuck) {
		t.Fatalf("close: %v", err)
	}
	cudatest.Stall(t, false)
	for begin := time.Now(); tier.late.Load() > 0; time.Sleep(time.Millisecond) {
		if time.Since(begin) > 30*time.Second {
			t.Fatal("it is never done")
		}
	}
	if again, err := Open(Options{Bytes: 1 << 20}); err != nil { // the same device
		t.Fatal(err)
	} else {
		defer again.closeIn(t)
		tier = again
	}
	if _, err := ask(); err != nil {
		t.Fatal(err)
	}
	rows[0].HeadDim, rows[0].Heads = 32, 2
	if got, err := tier.Seal(ctx, rows, options); got != nil || err != nil {
		t.Fatal(got, err)
	}
}
