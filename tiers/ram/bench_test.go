package ram_test

import (
	"fmt"
	"testing"

	"kvtier/tiers"
)

// BenchmarkPin pins and releases batches of pieces; ns and allocations are per batch.
func BenchmarkPin(b *testing.B) {
	tier := open(b, 256<<20)
	defer tier.Close()
	all := segments(0, 40, 8, 20000)
	for _, s := range all {
		if err := tier.Put(ctx, s.h, s.pieces); err != nil {
			b.Fatal(err)
		}
	}
	for _, c := range []struct {
		batch, ranges int
	}{{1, 0}, {64, 0}, {64, 4}} {
		b.Run(fmt.Sprintf("batch=%d/ranges=%d", c.batch, c.ranges), func(b *testing.B) {
			var reqs [][]tiers.Request
			for _, s := range all {
				r := s.requests()
				r = r[:min(c.batch, len(r))]
				for i := range r {
					for k := range c.ranges {
						r[i].Ranges = append(r[i].Ranges, tiers.Range{Off: k * len(s.pieces[i].Bytes) / c.ranges, Len: len(s.pieces[i].Bytes) / c.ranges})
					}
				}
				reqs = append(reqs, r)
			}
			b.ReportAllocs()
			b.RunParallel(func(pb *testing.PB) {
				for i := 0; pb.Next(); i++ {
					pins, err := tier.Pin(ctx, reqs[i%len(reqs)])
					if err != nil {
						b.Error(err)
					}
					for j := range pins {
						pins[j].Release(0.002)
					}
				}
			})
		})
	}
}

// BenchmarkPut puts segments into a full tier, so that each asks the policy.
func BenchmarkPut(b *testing.B) {
	tier := open(b, 32<<20)
	defer tier.Close()
	all := segments(0, 100, 8, 20000)
	var bytes, full int64
	for i := 0; b.Loop(); i++ {
		s := all[i%len(all)]
		if err := tier.Put(ctx, s.h, s.pieces); err != nil {
			full++
		}
		bytes += int64(len(s.pieces))
	}
	b.ReportMetric(float64(full)/float64(b.N), "full/op")
	b.ReportMetric(float64(bytes)/float64(b.N), "pieces/op")
}
