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
