package attention

import (
	"math"
	"math/rand/v2"
	"testing"

	"kvtier/attention/kernels"
)

// A relation of keys and values is found, as far as its rank goes, and comes
// back from its stored form.
func TestValueMap(t *testing.T) {
	rng := rand.New(rand.NewPCG(31, 32))
	for _, d := range []int{16, 64, 256} {
		const n = 600
		rank := min(d, MapRank) / 2
		in, out := randn(rng, rank*d, 1), randn(rng, rank*d, 1)
		dk, dv := randn(rng, n*d, 2), randn(rng, n*d, .5)
		told := make([]float32, n*d)
		for t := range n {
			for i := range rank {
				Axpy(told[t*d:(t+1)*d], Dot(in[i*d:(i+1)*d], dk[t*d:(t+1)*d]), out[i*d:(i+1)*d])
			}
			Axpy(dv[t*d:(t+1)*d], 1, told[t*d:(t+1)*d])
		}
		m, ok := ParseValueMap(FitValueMap(dk, dv, d).Append(nil), d)
		if !ok {
			t.Fatal("what was written cannot be read")
		}
		var miss, all float64
		row := make([]float32, d)
		for i := 0; i < n*d; i += d {
			clear(row)
			m.Add([][]float32{row}, dk[i:i+d], make([]float32, MapRank))
			all += float64(Norm2(told[i : i+d]))
			kernels.Deviations(row, told[i:i+d], row)
			miss += float64(Norm2(row))
		}
		if e := math.Sqrt(miss / all); e > .1 {
			t.Errorf("d %d: a map of rank %d is found with an error of %.3f", d, rank, e)
		}
	}
}

// Whatever rows there are, maps are finite.
func TestValueMapOfExtremes(t *testing.T) {
	rng := rand.New(rand.NewPCG(33, 34))
	const n, d = 64, 32
	for name, scale := range map[string][2]float64{"nothing": {0, 0}, "no keys": {0, 1}, "no values": {1, 0},
		"huge values": {1, 3e37}, "huge keys": {3e37, 1}, "tiny keys": {1e-37, 1}} {
		dk, dv := randn(rng, n*d, scale[0]), randn(rng, n*d, scale[1])
		m, _ := ParseValueMap(FitValueMap(dk, dv, d).Append(nil), d)
		got := make([]float32, d)
		m.Add([][]float32{got}, randn(rng, d, 1), make([]float32, MapRank))
		for _, x := range got {
			if math.IsNaN(float64(x)) || math.IsInf(float64(x), 0) {
				t.Fatalf("%s: %v", name, x)
			}
		}
	}
	if _, ok := ParseValueMap(make([]byte, ValueMapBytes(d)-1), d); ok {
		t.Error("a map that is too short is read")
	}
}
