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

// BenchmarkLong answers one KV head's query, of four heads, over a long context in memory.
func BenchmarkLong(b *testing.B) {
	const n, d, rows = 32768, 128, 4
	rng := rand.New(rand.NewPCG(91, 92))
	var ends []int
	for end := 2048; end <= n; end += 2048 {
		ends = append(ends, end)
	}
	f := sealed(rng, newSample(rng, n, 1, d), seal.Options{Profile: tiers.ProfileBalanced, Sinks: tiers.SinkTokens}, compress.F32, ends...)
	q := f.query(rng, 0, rows)
	for _, budget := range []Budget{{All: true}, {Share: .2}, {Share: .1}} {
		name := fmt.Sprintf("share=%v", budget.Share)
		if budget.All {
			name = "all"
		}
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
}
