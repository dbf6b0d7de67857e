package gpu

import (
	"errors"
	"slices"
	"testing"
	"time"

	"kvtier/attention"
	"kvtier/compress"
	"kvtier/tiers"
	"kvtier/tiers/gpu/cuda/cudatest"
	"kvtier/tiers/gpu/kernels"
	"kvtier/tiers/seal"
)

// smallSeal is two layers of which a device makes segments in no time.
func smallSeal() (rows []*seal.Rows, options []seal.Options) {
	const d, n = 64, 20
	for l := range 2 {
		b := make([]byte, 2*n*d*2)
		for i := range b {
			b[i] = byte((i+9*l)*7%61 + i%2*20) // bfloat16 of modest size
		}
		rows = append(rows, &seal.Rows{Layer: l, Heads: 2, HeadDim: d, Type: compress.BF16, K: b, V: b})
		m := attention.NewQuerySum(d).Metric()
		options = append(options, seal.Options{Profile: tiers.ProfileBalanced, Low: true, Metrics: []*attention.Metric{m, m}})
	}
	return rows, options
}

// TestSealKeeps: what attention reads of a segment stays where it was made, the same bytes as on the host, for when it is stored; or its room is free again.
func TestSealKeeps(t *testing.T) {
	tier := openCUDA(t, 1<<20)
	rows, options := smallSeal()
	make1 := func() []Sealed {
		t.Helper()
		made, err := tier.Seal(ctx, rows, options)
		if err != nil {
			t.Fatal(err)
		}
		return made
	}
	made := make1()
	for _, m := range made {
		pieces := slices.DeleteFunc(m.Header.Pieces(m.Parts), func(p tiers.Piece) bool { return !(kernels.Planes(false) | kernels.Planes(true)).Has(p.Plane) })
		holds(t, tier, m.Header, pieces, false)
		if !m.Kept.Adopt() {
			t.Fatal("it does not stay")
		}
		holds(t, tier, m.Header, pieces, true)
		if l, ok := tier.lease(m.Header, kernels.Planes(true)); !ok {
			t.Error("it is not whole")
		} else {
			l.release(0)
		}
		m.Kept.Discard()
		if m.Kept.Adopt() {
			t.Error("twice")
		}
		holds(t, tier, m.Header, pieces, true)
		for _, again := range make1() {
			if again.Header.ID == m.Header.ID && again.Kept != nil {
				t.Error("room for what is there")
			}
			again.Kept.Discard()
		}
		if err := tier.Drop(m.Header.ID, tiers.AllPlanes); err != nil {
			t.Fatal(err)
		}
	}
	made = make1()
	if err := made[0].check(ctx); err != nil {
		t.Error(err)
	}
	for _, p := range made[0].Header.Pieces(made[0].Parts) {
		p.Bytes[0] ^= 1
	}
	is(t, made[0].check(ctx), tiers.ErrCorrupt)
	discard(made)
	discard(made)
	empty(t, tier)
	if made[1].Kept.Adopt() {
		t.Error("of what was discarded")
	}

	small := openCUDA(t, 2048) // no room
	made, err := small.Seal(ctx, rows, options)
	if err != nil || made[0].Kept != nil || made[0].Kept.Adopt() {
		t.Error(err, "of no room")
	}
	made[0].Kept.Discard()
}

// TestSealKeptGone: what stays of a segment outlives neither a tier that was given up nor one that was closed, and does no harm there.
func TestSealKeptGone(t *testing.T) {
	rows, options := smallSeal()
	for name, end := range map[string]func(*Tier) error{
		"given up": func(tier *Tier) error { return tier.GiveUp(errors.New("it answers wrongly")) },
		"closed":   (*Tier).Close,
	} {
		tier := openCUDA(t, 1<<20)
		made, err := tier.Seal(ctx, rows, options)
		if err != nil {
			t.Fatal(err)
		}
		if err := end(tier); err != nil {
			t.Fatal(err)
		}
		if made[0].Kept.Adopt() || tier.Usage().Pieces != 0 {
			t.Error(name)
		}
		made[1].Kept.Discard()
	}
}

// TestSealClose: a tier that is closed while it seals waits for that, and the other way round.
func TestSealClose(t *testing.T) {
	rows, options := smallSeal()
	for i := range 10 {
		tier := openCUDA(t, 1<<20)
		done := make(chan bool)
		go func() {
			defer close(done)
			made, err := tier.Seal(ctx, rows, options)
			if err == nil {
				discard(made)
			}
		}()
		time.Sleep(time.Duration(i) * time.Millisecond)
		if err := tier.Close(); err != nil {
			t.Fatal(err)
		}
		<-done
	}
}

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
	soon(t, "it is never done", func() bool { return tier.late.Load() == 0 })
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
