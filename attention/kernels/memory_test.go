package kernels

import (
	"math"
	"math/rand/v2"
	"slices"
	"testing"
)

// What is stored depends on these: they have the same bits.
func TestGather(t *testing.T) {
	others(t, func(t *testing.T) {
		shapes(t, func(t *testing.T, rng *rand.Rand, rows, n, d int) {
			x, w, tokens := odd(rng, n*d), odd(rng, d), make([]int, n+rows)
			for i := range tokens {
				tokens[i] = rng.IntN(n)
			}
			weights, got := odd(rng, len(tokens)), odd(rng, len(tokens))
			want := slices.Clone(got)
			GatherDots(got, x, tokens, w)
			plain(func() { GatherDots(want, x, tokens, w) })
			out, expect := slices.Clone(w), slices.Clone(w)
			GatherAxpy(out, weights, x, tokens)
			plain(func() { GatherAxpy(expect, weights, x, tokens) })
			if !slices.Equal(got, want) || !slices.Equal(out, expect) {
				t.Fatalf("%d tokens, d %d: not the same bits", len(tokens), d)
			}
		})
	})
}

func TestDot(t *testing.T) {
	for _, v := range Variants() {
		defer Use(v)()
		for n := range 300 {
			rng := rand.New(rand.NewPCG(7, uint64(n)))
			a, b := odd(rng, n), odd(rng, n)
			var sums [16]float32
			for i := range n &^ 15 {
				sums[i%16] += float32(a[i] * b[i])
			}
			var q [4]float32
			for i := range q {
				q[i] = (sums[4*i] + sums[4*i+2]) + (sums[4*i+1] + sums[4*i+3])
			}
			want := (q[0] + q[2]) + (q[1] + q[3])
			for i := n &^ 15; i < n; i++ {
				want += float32(a[i] * b[i])
			}
			if got := Dot(a, b); got != want {
				t.Fatalf("%v: %d elements: %v, not %v", v, n, got, want)
			}
		}
	}
}

// Products have the same bits, whatever is transposed.
func TestMatMul(t *testing.T) {
	for _, v := range Variants() {
		defer Use(v)()
		for _, n := range []int{1, 16, 24, 32, 64, 80, 96, 128, 208} {
			for _, m := range []int{1, 2, 3, 4, 5, 7, 8, 9} {
				rng := rand.New(rand.NewPCG(uint64(n), uint64(m)))
				k := 1 + rng.IntN(40)
				a, b, got := odd(rng, m*k), odd(rng, k*n), odd(rng, m*n)
				aRow, aCol := k, 1
				if rng.IntN(2) == 0 {
					aRow, aCol = 1, m
				}
				MatMul(got, a, aRow, aCol, b, m, k, n)
				for i := range m {
					for j := range n {
						var want float32
						for l := range k {
							want += float32(a[i*aRow+l*aCol] * b[l*n+j])
						}
						if got[i*n+j] != want {
							t.Fatalf("%v: %dx%dx%d, (%d,%d): %v, not %v", v, m, k, n, i, j, got[i*n+j], want)
						}
					}
				}
			}
		}
		dst := []float32{15: 1}
		if MatMul(dst, nil, 1, 1, nil, 1, 0, 16); dst[15] != 0 {
			t.Errorf("%v: a product over nothing is %v", v, dst)
		}
	}
}

func TestWidenBF16(t *testing.T) {
	for _, v := range Variants() {
		undo := Use(v)
		for n := range 70 {
			src := oddBytes(rand.New(rand.NewPCG(1, uint64(n))), 2*n)
			got := make([]float32, n)
			WidenBF16(got, src)
			for i, x := range got {
				if want := uint32(src[2*i])<<16 | uint32(src[2*i+1])<<24; math.Float32bits(x) != want {
					t.Fatalf("%v, %d numbers: the %d-th is %x, not %x", v, n, i, math.Float32bits(x), want)
				}
			}
		}
		undo()
	}
}

func TestSweep(t *testing.T) {
	others(t, func(t *testing.T) {
		for _, n := range []int{0, 1, 255, 256, 511, 1024, 4096 + 17} {
			b := oddBytes(rand.New(rand.NewPCG(1, uint64(n))), n)
			Prefetch(b)
			got, want := Sweep(b), uint64(0)
			plain(func() { want = Sweep(b) })
			if got != want {
				t.Errorf("%d bytes: %x, not %x", n, got, want)
			}
		}
	})
}

// Rows of bfloat16 count as what they are widened to, wherever they lie.
func TestBF16(t *testing.T) {
	for _, v := range Variants() {
		defer Use(v)()
		shapes(t, func(t *testing.T, rng *rand.Rand, rows, n, d int) {
			pitch := d + rng.IntN(3)*16
			x := odd(rng, (n-1)*pitch+d)
			b := make([]byte, 2*len(x)+1)[1:]
			for i, f := range x {
				bits := math.Float32bits(f)
				b[2*i], b[2*i+1] = byte(bits>>16), byte(bits>>24)
			}
			wide := make([]float32, n*d)
			for i := range n {
				WidenBF16(wide[i*d:(i+1)*d], b[2*i*pitch:])
			}
			q, stride := odd(rng, rows*d), n+rng.IntN(3)
			got, want := odd(rng, (rows-1)*stride+n), make([]float32, (rows-1)*stride+n)
			copy(want, got)
			DotsBF16(got, stride, q, b, n, pitch, d)
			Dots(want, stride, q, wide, d)
			near(t, "dots", got, want, math.Sqrt(float64(d))*10)
			out, expect := odd(rng, rows*d), make([]float32, rows*d)
			copy(expect, out)
			AxpysBF16(rowsOf(out, d), got, stride, b, n, pitch, d)
			Axpys(rowsOf(expect, d), got, stride, wide, d, d)
			near(t, "axpys", out, expect, float64(n)*math.Sqrt(float64(d))*10)
		})
	}
}
