package kernels

import (
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"testing"
)

// tables are those that surveys work on, with what is no number among them; spreads are not below 0.
func tables(n int) (rng *rand.Rand, scores, logs, spreads []float32) {
	rng = rand.New(rand.NewPCG(71, uint64(n)))
	scores, logs, spreads = odd(rng, n), magnitudes(odd(rng, n)), magnitudes(odd(rng, n))
	for i := range scores {
		switch rng.IntN(30) {
		case 0:
			scores[i] = []float32{float32(math.NaN()), float32(math.Inf(-1)), 1e30, -1e30}[rng.IntN(4)]
		case 1:
			spreads[i] = []float32{float32(math.NaN()), float32(math.Inf(1)), 0}[rng.IntN(3)]
		}
	}
	return rng, scores, logs, spreads
}

// same checks that numbers are the same to the last bit.
func same(t *testing.T, what string, got, want []float32) {
	t.Helper()
	for i, w := range want {
		if g := got[i]; g != w && (g == g || w == w) {
			t.Fatalf("%s: element %d of %d is %v, not %v", what, i, len(want), g, w)
		}
	}
}

// surveyLengths are those of tables: without a vector, ragged ones, and long ones.
var surveyLengths = []int{0, 1, 15, 16, 17, 31, 32, 64, 100, 1023}

func TestSurvey(t *testing.T) {
	others(t, func(t *testing.T) {
		for _, n := range surveyLengths {
			rng, scores, logs, spreads := tables(n)
			// both gives what f writes to a table, and returns, here and in Go.
			both := func(what string, f func(dst []float32) float32) {
				t.Helper()
				got := odd(rng, n)
				want := slices.Clone(got)
				x := f(got)
				var y float32
				plain(func() { y = f(want) })
				same(t, what, got, want)
				same(t, what+" returned", []float32{x}, []float32{y})
			}
			both("masses", func(dst []float32) float32 { Masses(dst, scores, logs, spreads, .7, 1); return 0 })
			both("presences", func(dst []float32) float32 { return Presences(dst, scores, spreads, 1.3, -5) })
			both("roots", func(dst []float32) float32 { Roots(dst, spreads, logs); return 0 })
			both("multiply", func(dst []float32) float32 { Multiply(dst, spreads); return 0 })

			got, want := make([]int32, n), make([]int32, n)
			for _, last := range []int32{1, 4095} {
				top := Largest(scores, float32(math.Inf(-1)))
				Depths(got, scores, top, 64, last)
				plain(func() { Depths(want, scores, top, 64, last) })
				if !slices.Equal(got, want) {
					t.Fatalf("depths of %d: %v, not %v", n, got, want)
				}
			}
		}
	})
}

func TestSurveyed(t *testing.T) {
	for _, v := range Variants() {
		defer Use(v)()
		dst := make([]float32, 17)
		fill := func(x float32) []float32 { return slices.Repeat([]float32{x}, len(dst)) }
		Masses(dst, fill(1), fill(.25), fill(4), .5, 1.5)
		same(t, "masses", dst, fill(1+.25+1.5))
		Masses(dst, fill(1), fill(.25), fill(2), .5, 1.5)
		same(t, "masses", dst, fill(1+.25+1))
		if top := Presences(dst, fill(1), fill(3), 2, 0); top != 7 {
			t.Errorf("largest presence %v", top)
		}
		same(t, "presences", dst, fill(7))
		Roots(dst, fill(2), fill(8))
		same(t, "roots", dst, fill(4))
		Multiply(dst, fill(3))
		same(t, "multiply", dst, fill(12))
		dst[3], dst[16] = 11.9, -1000
		depths := make([]int32, len(dst))
		Depths(depths, dst, 12, 64, 100)
		if depths[0] != 0 || depths[3] != 6 || depths[16] != 100 {
			t.Errorf("depths %v", depths)
		}
	}
}

func BenchmarkSurvey(b *testing.B) {
	_, scores, logs, spreads := tables(16384)
	dst, depths := make([]float32, len(scores)), make([]int32, len(scores))
	ones := slices.Repeat([]float32{1}, 32)
	for _, v := range Variants() {
		for name, f := range map[string]func(){
			"masses":    func() { Masses(dst, scores, logs, spreads, .5, 1) },
			"presences": func() { Presences(dst, scores, spreads, .5, 0) },
			"depths":    func() { Depths(depths, scores, 5, 64, 4095) },
			"roots":     func() { Roots(dst, spreads, logs) },
			"multiply":  func() { Multiply(dst[:32], ones) },
		} {
			b.Run(fmt.Sprintf("%s/%v", name, v), func(b *testing.B) {
				defer Use(v)()
				for b.Loop() {
					f()
				}
			})
		}
	}
}
