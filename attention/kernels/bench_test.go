package kernels

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
)

// BenchmarkKernels works on a page of 64 tokens, for the 4 query rows of a
// group, from the first-level cache.
func BenchmarkKernels(b *testing.B) {
	const rows, n, d = 4, 64, 128
	rng := rand.New(rand.NewPCG(3, 4))
	q, k, c, dst, out := odd(rng, rows*d), odd(rng, n*d), oddBytes(rng, n*d), odd(rng, rows*n), rowsOf(make([]float32, rows*d), d)
	var batch ValueBatch
	scales := slices.Repeat(valueScale(1, 100), n)
	steps, query := odd(rng, d), KeyQuery{make([]int16, rows*d), odd(rng, 2*rows)}
	bins := storedBins(rng, d, 0)
	planes := [][]byte{oddBytes(rng, d/LineTokens*4*Line)}
	layout := func(levels int) (l Layout) {
		var lines []LinePlace
		for i := range d / LineTokens * levels {
			lines = append(lines, LinePlace{0, uint16(i * Line)})
		}
		return NewLayout(slices.Repeat([]uint8{uint8(levels)}, d/LineTokens), lines)
	}
	same := []int{0} // the same leaf again
	bits2, bits4, bits8 := layout(1), layout(2), layout(4)
	for _, x := range []struct {
		name string
		run  func()
	}{
		{"dots", func() { Dots(dst, n, q, k, d) }},
		{"dots int8", func() { DotsInt8(dst, n, q, c, d) }},
		{"weights", func() { Weights(dst, dst, Largest(dst, 0)) }},
		{"axpys", func() { Axpys(out, dst, n, k, d, d) }},
		{"axpys int8", func() { AxpysInt8(out, dst, n, c, d) }},
		{"values", func() {
			batch.Reset()
			batch.AppendRun(scales, c, nil, n, d, 0)
			batch.AddTo(out, dst, n)
		}},
		{"score 2 bits", func() {
			ScoreLeaves(dst, LineTokens, n, query, &bits2, planes, same, n/LineTokens, 0)
		}},
		{"score 4 bits", func() {
			ScoreLeaves(dst, LineTokens, n, query, &bits4, planes, same, n/LineTokens, 0)
		}},
		{"score 8 bits", func() {
			ScoreLeaves(dst, LineTokens, n, query, &bits8, planes, same, n/LineTokens, 0)
		}},
		{"fold", func() { bits4.Fold(query, q, d, steps, steps) }},
		{"fold bins", func() { bits4.FoldBins(query, q, d, bins, 1) }},
		{"unpack 8 bits", func() {
			for range n / LineTokens {
				UnpackKeys(k, d, &bits8, planes, steps, steps)
			}
		}},
	} {
		for _, v := range Variants() {
			b.Run(fmt.Sprintf("%s/%v", x.name, v), func(b *testing.B) {
				defer Use(v)()
				b.ReportAllocs()
				for b.Loop() {
					x.run()
				}
				b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*n), "ns/token")
			})
		}
	}
}
