package kernels

import (
	"fmt"
	"math"
	"math/rand/v2"
	"testing"
)

func TestCurves(t *testing.T) {
	others(t, func(t *testing.T) {
		for rows := range 9 {
			rng := rand.New(rand.NewPCG(61, uint64(rows)))
			stride := LineTokens + rng.IntN(20)
			x := odd(rng, max(0, (rows-1)*stride+LineTokens))
			curves := make([]Curve, rows)
			for r := range curves {
				curves[r] = Curve{new(CurveRow), new(CurveRow), rng.Float32(), -20 - 5*rng.Float32()}
				for i := range CurvePoints {
					curves[r].Below[i], curves[r].Above[i] = rng.Float32(), rng.Float32()
				}
				for i := range LineTokens {
					x[r*stride+i] = -30 + 80*rng.Float32()
				}
				for i, special := range []float64{math.Inf(1), math.Inf(-1), math.NaN(), math.MaxFloat32, -math.MaxFloat32} {
					x[r*stride+(r+i)%LineTokens] = float32(special)
				}
			}
			got, want := odd(rng, rows*LineTokens), make([]float32, rows*LineTokens)
			sums, wantSums := odd(rng, 2*rows), make([]float32, 2*rows)
			Curves(got, sums, x, stride, curves)
			plain(func() { Curves(want, wantSums, x, stride, curves) })
			what := fmt.Sprintf("%d rows", rows)
			near(t, what, got, want, 1)
			near(t, what+", sums", sums, wantSums, LineTokens)
		}
	})
}

func TestCurve(t *testing.T) {
	var below, above CurveRow
	for i := range below {
		below[i], above[i] = float32(i), 3*float32(i)
	}
	c := Curve{&below, &above, .5, -48}
	for x, want := range map[float32]float32{-60: 0, -48: 0, -47.875: 1, -47: 8, 0: 384, 7.75: 446, 100: 446} {
		if got := c.at(x); got != want {
			t.Errorf("at %v: %v, not %v", x, got, want)
		}
	}
}

func BenchmarkCurves(b *testing.B) {
	rng := rand.New(rand.NewPCG(62, 63))
	const rows = 4
	curves := make([]Curve, rows)
	for r := range curves {
		curves[r] = Curve{new(CurveRow), new(CurveRow), .5, -40}
	}
	dst, sums, x := make([]float32, rows*LineTokens), make([]float32, 2*rows), odd(rng, rows*LineTokens)
	for _, v := range Variants() {
		b.Run(v.String(), func(b *testing.B) {
			defer Use(v)()
			for b.Loop() {
				Curves(dst, sums, x, LineTokens, curves)
			}
		})
	}
}
