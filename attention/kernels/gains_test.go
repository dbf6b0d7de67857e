package kernels

import (
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"testing"
)

func TestGains(t *testing.T) {
	inf, nan := float32(math.Inf(1)), float32(math.NaN())
	others(t, func(t *testing.T) {
		for n := range 9 {
			rng := rand.New(rand.NewPCG(61, uint64(n)))
			stride := LineTokens + rng.IntN(20)
			size := max(0, (n-1)*stride+LineTokens)
			x, rows := odd(rng, size), make([]GainRow, n)
			for r := range rows {
				rows[r] = GainRow{3 * rng.Float32(), 50 * rng.Float32(), rng.Float32(), rng.Float32()}
				for i := range LineTokens {
					x[r*stride+i] *= 9
				}
				if rng.IntN(3) == 0 {
					rows[r].OfSquare = inf
				}
				for i, special := range []float32{inf, -inf, nan, math.MaxFloat32, -math.MaxFloat32} {
					x[r*stride+(r+i)%LineTokens] = special
				}
			}
			got, want := odd(rng, LineTokens), make([]float32, LineTokens)
			shares, sums := odd(rng, size), odd(rng, 2*n)
			wantShares, wantSums := slices.Clone(shares), make([]float32, 2*n)
			Gains(got, shares, sums, x, stride, rows, 1e-4)
			what := fmt.Sprintf("%d rows", n)
			plain(func() { Gains(want, wantShares, wantSums, x, stride, rows, 1e-4) })
			if n > 0 {
				near(t, what, got, want, float64(n))
			}
			near(t, what+", shares", shares, wantShares, 1)
			near(t, what+", sums", sums, wantSums, LineTokens)
		}
	})
}

func TestGain(t *testing.T) {
	x := make([]float32, 2*LineTokens)
	for i := range x {
		x[i] = -inf32
	}
	x[0], x[1], x[LineTokens] = 0, log32(.25), log32(.5)
	gain, shares, sums := make([]float32, LineTokens), make([]float32, 2*LineTokens), make([]float32, 4)
	Gains(gain, shares, sums, x, LineTokens, []GainRow{{0, 2, 1, 10}, {0, 1, 1, 1}}, 0)
	near(t, "gain", gain[:3], []float32{10.25, 10 * .25 * .5, 0}, 10)
	near(t, "sums", sums, []float32{1.25, 1.0625, .5, .25}, 1)
}

var inf32 = float32(math.Inf(1))

func log32(x float64) float32 { return float32(math.Log(x)) }

func BenchmarkGains(b *testing.B) {
	rng := rand.New(rand.NewPCG(62, 63))
	const rows = 4
	dst, shares, sums, x := make([]float32, LineTokens), odd(rng, rows*LineTokens), make([]float32, 2*rows), odd(rng, rows*LineTokens)
	for _, v := range Variants() {
		b.Run(v.String(), func(b *testing.B) {
			defer Use(v)()
			for b.Loop() {
				Gains(dst, shares, sums, x, LineTokens, make([]GainRow, rows), 0)
			}
		})
	}
}
