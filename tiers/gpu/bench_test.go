package gpu

import (
	"testing"

	"kvtier/tiers"
	"kvtier/tiers/tiertest"
)

// benchmark makes a tier on device 0 that holds one segment of 8 heads.
func benchmark(b *testing.B) (*Tier, *tiers.Header, []tiers.Piece) {
	tier, err := Open(Options{Bytes: 256 << 20})
	if err != nil {
		b.Skip(err)
	}
	b.Cleanup(func() {
		if err := tier.Close(); err != nil {
			b.Fatal(err)
		}
	})
	h, pieces := tiertest.Segment(1, 8, 60000)
	if err := tier.Put(ctx, h, pieces); err != nil {
		b.Fatal(err)
	}
	return tier, h, pieces
}

// size counts the bytes of pieces.
func size(pieces []tiers.Piece) (n int64) {
	for _, p := range pieces {
		n += int64(len(p.Bytes))
	}
	return n
}

// BenchmarkPut copies a segment to the device.
func BenchmarkPut(b *testing.B) {
	tier, h, pieces := benchmark(b)
	b.SetBytes(size(pieces))
	for b.Loop() {
		if err := tier.Drop(h.ID, tiers.AllPlanes); err != nil {
			b.Fatal(err)
		}
		if err := tier.Put(ctx, h, pieces); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkPin copies a segment back.
func BenchmarkPin(b *testing.B) {
	tier, h, pieces := benchmark(b)
	b.SetBytes(size(pieces))
	reqs := make([]tiers.Request, len(pieces))
	for i, p := range pieces {
		reqs[i] = tiers.Request{Header: h, Head: p.Head, Plane: p.Plane}
	}
	for b.Loop() {
		pins, err := tier.Pin(ctx, reqs)
		if err != nil {
			b.Fatal(err)
		}
		for i := range pins {
			pins[i].Release(0)
		}
	}
}

// BenchmarkLease leases a segment.
func BenchmarkLease(b *testing.B) {
	tier, h, _ := benchmark(b)
	for b.Loop() {
		l, ok := tier.lease(h, tiers.AllPlanes)
		if !ok {
			b.Fatal("not resident")
		}
		l.release(0.1)
	}
}

// BenchmarkLeases leases the segments of a layer of a million tokens, for one answer.
func BenchmarkLeases(b *testing.B) {
	tier := newTier(newFakeBank(1<<30), 1<<30)
	defer tier.Close()
	var segments []Segment
	for seed := range uint64(512) {
		h, pieces := tiertest.Segment(seed, 8, 100)
		if err := tier.Put(ctx, h, pieces); err != nil {
			b.Fatal(err)
		}
		tier.mu.segments[h.ID].attends = true // it has no device to ask
		segments = append(segments, Segment{Header: h})
	}
	for b.Loop() {
		tier.releaseAll(tier.leaseAll(segments))
	}
	if u := tier.Usage(); u.Misses > 0 {
		b.Fatalf("%+v", u)
	}
}
