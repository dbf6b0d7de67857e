package sparse

import (
	"fmt"
	"math/rand/v2"
	"testing"

	"kvtier/attention"
	"kvtier/compress"
	"kvtier/tiers"
	"kvtier/tiers/seal"
)

// BenchmarkLong answers one KV head's query, of four heads, over long contexts in memory.
func BenchmarkLong(b *testing.B) {
	const d, rows = 128, 4
	for _, n := range []int{32768, 131072} {
		b.Run(fmt.Sprintf("%dK", n/1024), func(b *testing.B) {
			rng := rand.New(rand.NewPCG(91, 92))
			var ends []int
			for end := 2048; end <= n; end += 2048 {
				ends = append(ends, end)
			}
			f := sealed(rng, newSample(rng, n, 1, d), seal.Options{Profile: tiers.ProfileBalanced, Sinks: tiers.SinkTokens}, compress.BF16, ends...)
			q := f.query(rng, 0, rows)
			for name, budget := range map[string]Budget{"all": {All: true}, "share.2": {Share: .2}, "share.1": {Share: .1},
				"pages.2": {Share: .2, ByPage: true}, "pages.1": {Share: .1, ByPage: true}, "pages.5": {Share: .5, ByPage: true}} {
				b.Run(name, func(b *testing.B) {
					b.ReportAllocs()
					for b.Loop() {
						q.Partials = attention.NewPartials(rows, d)
						if _, err := Attend(b.Context(), f.reader, f.segs, q, budget, nil); err != nil {
							b.Fatal(err)
						}
					}
				})
			}
		})
	}
}
