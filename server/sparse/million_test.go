package sparse

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	"kvtier/attention"
	"kvtier/compress"
	"kvtier/tiers"
	"kvtier/tiers/seal"
)

// BenchmarkMillion answers one KV head's query, of four heads, over 1,048,576 tokens in memory: 131,072 that are made, and copies of
// their segments in memory of their own. Budgets are tokens, page means apart.
func BenchmarkMillion(b *testing.B) {
	const d, rows, n, times = 128, 4, 131072, 8
	rng := rand.New(rand.NewPCG(91, 92))
	var ends []int
	for end := 2048; end <= n; end += 2048 {
		ends = append(ends, end)
	}
	f := sealed(rng, newSample(rng, n, 1, d), seal.Options{Profile: tiers.ProfileBalanced, Sinks: tiers.SinkTokens}, compress.BF16, ends...)
	made := f.segs
	for i := range (times - 1) * len(made) {
		s := made[i%len(made)]
		h := *s.Header
		h.ID = sha256.Sum256(binary.LittleEndian.AppendUint64(h.ID[:], uint64(i)))
		parts := f.reader.parts[s.Header.ID]
		for p := range parts {
			parts[p] = slices.Clone(parts[p])
		}
		f.reader.parts[h.ID] = parts
		s.Header = &h
		f.segs = append(f.segs, s)
	}
	q := f.query(rng, 0, rows)
	for _, tokens := range []int{4096, 16384} {
		budget := Budget{Share: float32(tokens)/(n*times) + MeansShare(d)}
		for _, budget.ByPage = range []bool{false, true} {
			name := map[bool]string{false: "lines", true: "pages"}[budget.ByPage]
			b.Run(fmt.Sprintf("%d/%s", tokens, name), func(b *testing.B) {
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
}
