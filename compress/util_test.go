package compress

import (
	"math"
	"math/rand"

	"pgregory.net/rapid"
)

// allDims are the head dimensions that the package promises.
var allDims = func() (ds []int) {
	for d := 16; d <= MaxHeadDim; d += 16 {
		ds = append(ds, d)
	}
	return ds
}()

// normal returns seeded rows [n][d]: bell-shaped, with a bias and a scale of
// each channel's own, as keys have.
func normal(seed int64, n, d int) []float32 {
	r := rand.New(rand.NewSource(seed))
	bias, scale := make([]float64, d), make([]float64, d)
	for j := range d {
		bias[j], scale[j] = 3*r.NormFloat64(), math.Exp(r.NormFloat64())
	}
	x := make([]float32, n*d)
	for i := range x {
		x[i] = float32(bias[i%d] + scale[i%d]*r.NormFloat64())
	}
	return x
}

// constant returns n copies of x.
func constant(n int, x float32) []float32 {
	out := make([]float32, n)
	for i := range out {
		out[i] = x
	}
	return out
}

// extremes are rows [4][16] that codecs tend to break on.
var extremes = map[string][]float32{
	"zero":        constant(64, 0),
	"minus zero":  constant(64, float32(math.Copysign(0, -1))),
	"constant":    constant(64, 3.1415927),
	"max":         constant(64, math.MaxFloat32),
	"-max":        constant(64, -math.MaxFloat32),
	"max to -max": alternate(math.MaxFloat32, -math.MaxFloat32),
	"max and 0":   alternate(math.MaxFloat32, 0),
	"subnormal":   alternate(math.SmallestNonzeroFloat32, -0x1p-140),
	"tiny":        alternate(0x1p-126, -0x1p-125),
	"huge bias":   alternate(1e6, 1e6+1),
	"wide":        alternate(1e20, 1e-20),
	"positive":    alternate(5, 7),
	"negative":    alternate(-5, -7),
}

func alternate(a, b float32) []float32 {
	out := constant(64, a)
	for i := 1; i < len(out); i += 3 { // coprime to 16: every channel sees both
		out[i] = b
	}
	return out
}

// drawRows draws rows [n][d] of which some channels have a wild scale or bias.
func drawRows(t *rapid.T, maxN int) (x []float32, n, d int) {
	n, d = rapid.IntRange(1, maxN).Draw(t, "n"), rapid.SampledFrom(allDims).Draw(t, "d")
	x = normal(rapid.Int64().Draw(t, "seed"), n, d)
	for range rapid.IntRange(0, 3).Draw(t, "wild") {
		j := rapid.IntRange(0, d-1).Draw(t, "channel")
		scale := rapid.SampledFrom([]float32{0, 1e-30, 1e-3, 1e3, 1e15}).Draw(t, "scale")
		bias := rapid.SampledFrom([]float32{0, 1, -1e4, 1e15}).Draw(t, "bias")
		for i := j; i < len(x); i += d {
			x[i] = x[i]*scale + bias
		}
	}
	return x, n, d
}

// near fails unless |got - want| <= bound, with room for float32's rounding of
// numbers of size magnitude.
func near(t interface{ Fatalf(string, ...any) }, what string, got, want, bound, magnitude float64) {
	if !(math.Abs(got-want) <= bound*1.001+magnitude*0x1p-21) {
		t.Fatalf("%s: %v instead of %v: off by %v, at most %v", what, got, want, got-want, bound)
	}
}

func relativeError(got, want []float32) float64 {
	var e, w float64
	for i := range want {
		d := float64(got[i]) - float64(want[i])
		e += d * d
		w += float64(want[i]) * float64(want[i])
	}
	return math.Sqrt(e / w)
}

func norm(x []float32) (s float64) {
	for _, v := range x {
		s += float64(v) * float64(v)
	}
	return math.Sqrt(s)
}
