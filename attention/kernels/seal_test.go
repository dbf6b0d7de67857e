package kernels

import (
	"math"
	"math/rand/v2"
	"slices"
	"testing"
)

func TestAddRows(t *testing.T) {
	others(t, func(t *testing.T) {
		shapes(t, func(t *testing.T, rng *rand.Rand, _, n, d int) {
			x, sum := odd(rng, n*d), make([]float64, d)
			for j := range sum {
				sum[j] = rng.NormFloat64()
			}
			want := slices.Clone(sum)
			AddRows(sum, x)
			plain(func() { AddRows(want, x) })
			if !slices.Equal(sum, want) {
				t.Fatalf("%d rows of %d: not the same bits", n, d)
			}
		})
	})
}

func TestDeviations(t *testing.T) {
	others(t, func(t *testing.T) {
		shapes(t, func(t *testing.T, rng *rand.Rand, _, n, d int) {
			x, row := odd(rng, n*d), odd(rng, d)
			got, want := odd(rng, n*d), make([]float32, n*d)
			Deviations(got, x, row)
			plain(func() { Deviations(want, x, row) })
			if !slices.Equal(got, want) {
				t.Fatalf("%d rows of %d: not the same bits", n, d)
			}
			Deviations(x, x, row) // in place
			if !slices.Equal(x, want) {
				t.Fatalf("%d rows of %d, in place: not the same bits", n, d)
			}
		})
	})
}

func TestExtremes(t *testing.T) {
	others(t, func(t *testing.T) {
		shapes(t, func(t *testing.T, rng *rand.Rand, _, n, d int) {
			x, lo, hi := odd(rng, n*d), odd(rng, d), odd(rng, d)
			wantLo, wantHi := slices.Clone(lo), slices.Clone(hi)
			Extremes(lo, hi, x)
			plain(func() { Extremes(wantLo, wantHi, x) })
			if !slices.Equal(lo, wantLo) || !slices.Equal(hi, wantHi) {
				t.Fatalf("%d rows of %d: %v to %v, not %v to %v", n, d, lo, hi, wantLo, wantHi)
			}
		})
	})
}

func TestQuantise(t *testing.T) {
	others(t, func(t *testing.T) {
		shapes(t, func(t *testing.T, rng *rand.Rand, _, n, d int) {
			x, lo, inverse := odd(rng, n*d), odd(rng, d), odd(rng, d)
			for i := range inverse {
				inverse[i] *= 100
			}
			for range 3 {
				x[rng.IntN(len(x))] = []float32{0, math.MaxFloat32, -math.MaxFloat32, 1e-40}[rng.IntN(4)]
			}
			zero := float32(rng.IntN(200))
			got, want := oddBytes(rng, n*d), make([]byte, n*d)
			Quantise(got, x, lo, inverse, zero)
			plain(func() { Quantise(want, x, lo, inverse, zero) })
			if !slices.Equal(got, want) {
				t.Fatalf("%d rows of %d: %v, not %v", n, d, got, want)
			}
		})
	})
}

func TestQuantiseWithFeedback(t *testing.T) {
	others(t, func(t *testing.T) {
		shapes(t, func(t *testing.T, rng *rand.Rand, _, n, d int) {
			x, lo, step, inverse, feedback := odd(rng, n*d), odd(rng, d), odd(rng, d), odd(rng, d), odd(rng, d*d)
			for i, y := range step {
				step[i] = .001 + y*y/50
				inverse[i] = 1 / step[i]
			}
			for i := range feedback {
				feedback[i] /= float32(d)
			}
			got, want := oddBytes(rng, n*d), make([]byte, n*d) // feedback is often more than what is let through
			QuantiseWithFeedback(got, x, lo, step, inverse, feedback)
			plain(func() { QuantiseWithFeedback(want, x, lo, step, inverse, feedback) })
			if !slices.Equal(got, want) {
				t.Fatalf("%d rows of %d: %v, not %v", n, d, got, want)
			}
			Quantise(want, x, lo, inverse, 0)
			for i, c := range got {
				if off := int(c) - int(want[i]); off > MostFeedback || off < -MostFeedback {
					t.Fatalf("%d rows of %d: code %d is %d, and %d without feedback", n, d, i, c, want[i])
				}
			}
			clear(feedback)
			QuantiseWithFeedback(got, x, lo, step, inverse, feedback)
			if Quantise(want, x, lo, inverse, 0); !slices.Equal(got, want) {
				t.Fatalf("%d rows of %d, no feedback: %v, not %v", n, d, got, want)
			}
		})
	})
}

func TestHadamard(t *testing.T) {
	for _, v := range Variants() {
		defer Use(v)()
		for n := 16; n <= 512; n *= 2 {
			rng := rand.New(rand.NewPCG(77, uint64(n)))
			x := odd(rng, n)
			got, want := slices.Clone(x), slices.Clone(x)
			Hadamard(got)
			plain(func() { Hadamard(want) })
			if !slices.Equal(got, want) {
				t.Fatalf("%v: %d elements: not the same bits", v, n)
			}
			Hadamard(got)
			for i := range got {
				got[i] /= float32(n)
			}
			near(t, "twice", got, x, 10)
		}
	}
}
