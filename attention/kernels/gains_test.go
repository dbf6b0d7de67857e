package kernels

import (
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"testing"
)

func TestGains(t *testing.T) {
	others(t, func(t *testing.T) {
		for n := range 9 {
			rng := rand.New(rand.NewPCG(61, uint64(n)))
			w, rows := magnitudes(odd(rng, n*LineTokens)), make([]GainRow, n)
			for r := range rows {
				rows[r] = GainRow{5 * rng.Float32(), rng.Float32(), rng.Float32()}
				if rng.IntN(3) == 0 {
					rows[r].OfSquare = float32(math.Inf(1))
				}
				w[r*LineTokens+rng.IntN(LineTokens)] = 0
			}
			got := odd(rng, LineTokens)
			want := slices.Clone(got)
			Gains(got, w, rows)
			plain(func() { Gains(want, w, rows) })
			near(t, fmt.Sprintf("%d rows", n), got, want, 9)
		}
	})
}

func TestGain(t *testing.T) {
	w := make([]float32, 2*LineTokens)
	w[0], w[1], w[LineTokens] = 1, .25, .5
	gain := make([]float32, LineTokens)
	Gains(gain, w, []GainRow{{2, 1, 10}, {1, 1, 1}})
	near(t, "gain", gain[:3], []float32{10.25, 10 * .25 * .5, 0}, 10)
}

func TestLeafWeights(t *testing.T) {
	others(t, func(t *testing.T) {
		for leaves := range 14 {
			rng := rand.New(rand.NewPCG(35, uint64(leaves)))
			x := odd(rng, leaves*LineTokens)
			for i := range x {
				if x[i] = 30*x[i] - 20; rng.IntN(20) == 0 {
					x[i] = []float32{float32(math.NaN()), float32(math.Inf(1)), float32(math.Inf(-1)), -87, 0}[rng.IntN(5)]
				}
			}
			got, want := slices.Clone(x), slices.Clone(x)
			sums, wantSums, offsets := odd(rng, 2*leaves), make([]float32, 2*leaves), odd(rng, leaves)
			LeafWeights(got, sums, offsets, 1e-15)
			plain(func() { LeafWeights(want, wantSums, offsets, 1e-15) })
			for i, w := range want {
				if math.Abs(float64(got[i]-w)) > 2e-7*float64(w) {
					t.Fatalf("exp(%v) = %v, not %v", x[i], got[i], w)
				}
			}
			for i, w := range wantSums {
				near(t, "sums", sums[i:i+1], wantSums[i:i+1], math.Abs(float64(w)))
			}
		}
	})
}

func TestSumRuns(t *testing.T) {
	others(t, func(t *testing.T) {
		for runs := range 14 {
			rng := rand.New(rand.NewPCG(36, uint64(runs)))
			x := odd(rng, runs*RunTokens)
			for i := range x {
				if x[i] = 30*x[i] - 20; rng.IntN(200) == 0 {
					x[i] = []float32{float32(math.NaN()), float32(math.Inf(-1)), -107}[rng.IntN(3)]
				}
			}
			if runs > 2 { // nothing there, and all of it the same
				for i := range RunTokens {
					x[i], x[RunTokens+i] = float32(math.Inf(-1)), 7
				}
			}
			got, want := make([]RunSum, runs), make([]RunSum, runs)
			SumRuns(got, x)
			plain(func() { SumRuns(want, x) })
			for i, w := range want {
				g := got[i]
				if g.Top != w.Top {
					t.Fatalf("run %d of %d: top %v, not %v", i, runs, g.Top, w.Top)
				}
				near(t, "mean", []float32{g.Mean}, []float32{w.Mean}, 30)
				near(t, "sums", []float32{g.Sum, g.Squares}, []float32{w.Sum, w.Squares}, float64(w.Sum))
			}
		}
	})
}

func TestRunSum(t *testing.T) {
	x := make([]float32, RunTokens)
	for i := range x {
		x[i] = 5
	}
	x[3] = 5 + float32(math.Log(2))
	out := make([]RunSum, 1)
	SumRuns(out, x)
	near(t, "sum", []float32{out[0].Mean, out[0].Top, out[0].Sum, out[0].Squares}, []float32{5 + float32(math.Log(2)/64), x[3], 1 + 63./2, 1 + 63./4}, 30)
}

func BenchmarkSumRuns(b *testing.B) {
	x, sums := odd(rand.New(rand.NewPCG(64, 65)), 16*RunTokens), make([]RunSum, 16)
	for _, v := range Variants() {
		b.Run(v.String(), func(b *testing.B) {
			defer Use(v)()
			b.SetBytes(int64(4 * len(x)))
			for b.Loop() {
				SumRuns(sums, x)
			}
		})
	}
}

func BenchmarkGains(b *testing.B) {
	rng := rand.New(rand.NewPCG(62, 63))
	const rows = 4
	gain, w, sums, r := make([]float32, LineTokens), odd(rng, rows*LineTokens), make([]float32, 2*rows), make([]GainRow, rows)
	for _, v := range Variants() {
		b.Run(v.String(), func(b *testing.B) {
			defer Use(v)()
			for b.Loop() {
				Gains(gain, w, r)
			}
		})
		b.Run(v.String()+", weights", func(b *testing.B) {
			defer Use(v)()
			for b.Loop() {
				LeafWeights(w, sums, sums[rows:], 0)
			}
		})
	}
}
