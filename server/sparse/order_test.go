package sparse

import (
	"math"
	"math/rand/v2"
	"slices"
	"testing"
)

// Keys come in the order of numbers, the largest first, and equal ones in that of what lies below.
func TestSortByUpper(t *testing.T) {
	rng := rand.New(rand.NewPCG(81, 82))
	s := new(scratch)
	for range 200 {
		n := rng.IntN(400)
		x := make([]float32, n)
		for i := range x {
			x[i] = float32(rng.NormFloat64()) * float32(math.Exp(20*rng.NormFloat64()))
			if rng.IntN(3) == 0 {
				x[i] = float32(rng.IntN(5) - 2)
			}
		}
		keys, want := s.sortKeys(n), make([]int, n)
		for i := range keys {
			keys[i], want[i] = descending(x[i])<<32|uint64(i), i
		}
		slices.SortStableFunc(want, func(i, j int) int {
			switch {
			case x[i] > x[j]:
				return -1
			case x[i] < x[j]:
				return 1
			}
			return 0
		})
		for i, key := range s.sortByUpper(keys) {
			if got := int(uint32(key)); got != want[i] {
				t.Fatalf("%d numbers: at %d is number %d, %v, not %d, %v", n, i, got, x[got], want[i], x[want[i]])
			}
		}
	}
}
