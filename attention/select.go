package attention

import (
	"cmp"
	"slices"
)

// Top returns the indices of the k largest values, in increasing order of
// index. Equal values go to the lower index, so that the choice is repeatable.
func Top(values []float32, k int) []int {
	idx := make([]int, len(values))
	for i := range idx {
		idx[i] = i
	}
	if k < len(idx) {
		if k <= 0 {
			return nil
		}
		selectLargest(idx, values, k)
		inOrder(idx, k)
		idx = idx[:k]
	}
	return idx
}

// inOrder sorts the first k of a permutation.
func inOrder(idx []int, k int) {
	if k < len(idx)/32 {
		slices.Sort(idx[:k])
		return
	}
	chosen := make([]bool, len(idx))
	for _, i := range idx[:k] {
		chosen[i] = true
	}
	n := 0
	for i, yes := range chosen {
		if yes {
			idx[n] = i
			n++
		}
	}
}

// selectLargest moves the k best indices to the front: quickselect with the
// median of three as pivot, finished by sorting short runs.
func selectLargest(idx []int, v []float32, k int) {
	before := func(i, j int) int {
		if c := cmp.Compare(v[j], v[i]); c != 0 {
			return c
		}
		return i - j
	}
	lo, hi := 0, len(idx)
	for hi-lo > 32 {
		a, b, c := idx[lo], idx[lo+(hi-lo)/2], idx[hi-1]
		if before(a, b) > 0 {
			a, b = b, a
		}
		if before(b, c) > 0 {
			b = c
			if before(a, b) > 0 {
				b = a
			}
		}
		i, j := lo, hi-1
		for i <= j {
			for before(idx[i], b) < 0 {
				i++
			}
			for before(idx[j], b) > 0 {
				j--
			}
			if i <= j {
				idx[i], idx[j] = idx[j], idx[i]
				i, j = i+1, j-1
			}
		}
		switch {
		case k <= j:
			hi = j + 1
		case k > i:
			lo = i
		default:
			return
		}
	}
	slices.SortFunc(idx[lo:hi], before)
}
