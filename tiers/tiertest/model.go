package tiertest

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"testing"

	"pgregory.net/rapid"

	"kvtier/tiers"
)

// model runs random operations against a map. The map says what may be held;
// while the tier counts no evictions, it also says what must be.
func model(t *testing.T, open func(t *testing.T, limit int64) tiers.Tier) {
	const segments = 14
	var headers [segments]*tiers.Header
	var pieces [segments][]tiers.Piece
	for i := range segments {
		headers[i], pieces[i] = Segment(700+uint64(i), 1+i%3, 2000<<(i%4))
	}
	type key struct{ segment, piece int }
	type kept struct {
		pin  tiers.Pin
		want [][]byte
	}
	rapid.Check(t, func(rt *rapid.T) {
		tier := open(t, tight)
		held := map[key]bool{}
		var pinned []kept
		var evictions int64
		segment := rapid.IntRange(0, segments-1)
		release := func(k kept, attention float32) {
			for i := range k.want {
				if !bytes.Equal(k.pin.Ranges[i], k.want[i]) {
					rt.Fatal("a pin's bytes changed")
				}
			}
			k.pin.Release(attention)
		}
		rt.Repeat(map[string]func(*rapid.T){
			"put": func(rt *rapid.T) {
				i := segment.Draw(rt, "segment")
				put := pieces[i]
				if rapid.Bool().Draw(rt, "main only") {
					put = InPart(put, tiers.PartMain)
				}
				err := tier.Put(ctx, headers[i], put)
				if err != nil {
					if !errors.Is(err, tiers.ErrFull) {
						rt.Fatal(err)
					}
					return
				}
				for j, p := range pieces[i] {
					if len(put) == len(pieces[i]) || p.Plane.Part() == tiers.PartMain {
						held[key{i, j}] = true
					}
				}
			},
			"pin": func(rt *rapid.T) {
				rng := rand.New(rand.NewPCG(rapid.Uint64().Draw(rt, "seed"), 1))
				var reqs []tiers.Request
				var keys []key
				for range 1 + rng.IntN(8) {
					i := rng.IntN(segments)
					j := rng.IntN(len(pieces[i]))
					p := pieces[i][j]
					keys = append(keys, key{i, j})
					reqs = append(reqs, tiers.Request{Header: headers[i], Head: p.Head, Plane: p.Plane,
						Ranges: someRanges(rng, len(p.Bytes))})
				}
				pins, err := tier.Pin(ctx, reqs)
				if err != nil {
					rt.Fatal(err)
				}
				for n, k := range keys {
					if pins[n].Held() && !held[k] {
						rt.Fatalf("segment %d, piece %d is held, but was not put or was dropped", k.segment, k.piece)
					}
					if !pins[n].Held() {
						if held[k] && evictions == 0 {
							rt.Fatalf("segment %d, piece %d is not held, and nothing was evicted", k.segment, k.piece)
						}
						continue
					}
					b := pieces[k.segment][k.piece].Bytes
					want := [][]byte{b}
					if len(reqs[n].Ranges) > 0 {
						want = want[:0]
					}
					for _, g := range reqs[n].Ranges {
						want = append(want, b[g.Off:g.Off+g.Len])
					}
					if len(pins[n].Ranges) != len(want) {
						rt.Fatalf("%d ranges, want %d", len(pins[n].Ranges), len(want))
					}
					pinned = append(pinned, kept{pins[n], want})
				}
			},
			"release": func(rt *rapid.T) {
				for range min(len(pinned), 6) {
					i := rapid.IntRange(0, len(pinned)-1).Draw(rt, "pin")
					release(pinned[i], rapid.Float32().Draw(rt, "attention"))
					pinned = append(pinned[:i], pinned[i+1:]...)
				}
			},
			"drop": func(rt *rapid.T) {
				i := segment.Draw(rt, "segment")
				planes := tiers.PlaneSet(rapid.Uint16Range(0, uint16(tiers.AllPlanes)).Draw(rt, "planes"))
				if rapid.Bool().Draw(rt, "all") {
					planes = tiers.AllPlanes
				}
				if err := tier.Drop(headers[i].ID, planes); err != nil {
					rt.Fatal(err)
				}
				for j, p := range pieces[i] {
					if planes.Has(p.Plane) {
						delete(held, key{i, j})
					}
				}
			},
			"": func(rt *rapid.T) {
				u := tier.Usage()
				if u.BytesUsed > u.BytesLimit || u.BytesUsed < 0 {
					rt.Fatalf("%d bytes used of %d", u.BytesUsed, u.BytesLimit)
				}
				evictions = u.Evictions
			},
		})
		for _, k := range pinned {
			release(k, 0)
		}
		if err := tier.Close(); err != nil {
			rt.Fatal(err)
		}
	})
}
