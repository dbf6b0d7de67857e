package nvme

import (
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"

	"kvtier/tiers"
)

// benchTier holds segments of 2 MiB: one head, pieces of 256 KiB.
func benchTier(b *testing.B, segments int) (*Tier, []*tiers.Header, []Run) {
	b.Helper()
	tier := openAt(b, b.TempDir(), Options{Bytes: 4 << 30})
	var headers []*tiers.Header
	var runs []Run
	rng := rand.New(rand.NewPCG(1, 1))
	for i := range segments {
		pieces := make([][tiers.NumPlanes][]byte, 1)
		for p := range tiers.Plane(8) {
			pieces[0][p] = make([]byte, 256<<10)
			for j := 0; j < len(pieces[0][p]); j += 512 {
				pieces[0][p][j] = byte(rng.Uint32())
			}
		}
		h, parts := tiers.NewHeader(tiers.Header{Start: uint64(i) * tiers.SegmentTokens, HeadDim: 128,
			Heads: make([]tiers.HeadInfo, 1)}, pieces)
		ok(b, tier.Put(ctx, h, h.Pieces(parts)))
		l, _ := tier.Locate(h.ID)
		headers, runs = append(headers, h), append(runs, l.Parts[tiers.PartMain])
	}
	ok(b, tier.Sync(ctx))
	return tier, headers, runs
}

const (
	benchSegments = 400 // 800 MiB
	pieceBytes    = 256 << 10
)

// BenchmarkRead reads random 256 KiB from extents, with direct I/O: pin by
// Pin, one piece a request; raw by ReadAt of the same places, unverified.
func BenchmarkRead(b *testing.B) {
	tier, headers, runs := benchTier(b, benchSegments)
	b.Logf("direct I/O: %v", tier.Direct())
	for _, depth := range []int{1, 8} {
		// Interleaved, so that both see the same disk.
		for round := range 3 {
			b.Run(fmt.Sprintf("depth=%d/raw/%d", depth, round), func(b *testing.B) {
				b.SetBytes(pieceBytes)
				workers(b, depth, func(rng *rand.Rand) error {
					buf := newBuffer(pieceBytes)
					defer buf.free()
					i, p := rng.IntN(len(runs)), rng.IntN(8)
					at := int64(runs[i].First)*tiers.BlockSize + int64(p)*pieceBytes
					_, err := tier.mu.extents[runs[i].Extent].file.ReadAt(buf.bytes, at)
					return err
				})
			})
			b.Run(fmt.Sprintf("depth=%d/pin/%d", depth, round), func(b *testing.B) {
				b.SetBytes(pieceBytes)
				b.ReportAllocs()
				workers(b, depth, func(rng *rand.Rand) error {
					pins, err := tier.Pin(ctx, []tiers.Request{{Header: headers[rng.IntN(len(headers))], Plane: tiers.Plane(rng.IntN(8))}})
					for i := range pins {
						pins[i].Release(0)
					}
					return err
				})
			})
		}
	}
	b.Run("batch=32", func(b *testing.B) {
		b.SetBytes(32 * pieceBytes)
		workers(b, 1, func(rng *rand.Rand) error {
			var reqs []tiers.Request
			for range 32 {
				reqs = append(reqs, tiers.Request{Header: headers[rng.IntN(len(headers))], Plane: tiers.Plane(rng.IntN(8))})
			}
			pins, err := tier.Pin(ctx, reqs)
			for i := range pins {
				pins[i].Release(0)
			}
			return err
		})
	})
}

// workers runs f b.N times on some goroutines.
func workers(b *testing.B, n int, f func(*rand.Rand) error) {
	var done atomic.Int64
	var wg sync.WaitGroup
	for w := range uint64(n) {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(w, uint64(b.N)))
			for done.Add(1) <= int64(b.N) {
				if err := f(rng); err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
}
