package planted

import (
	"slices"

	"kvtier/attention"
)

// decode says which of the things that entry i of a sample asks for can be read
// from an output: which of the wanted codewords are among the nearest as many,
// or which of the wanted classes are among the ranks asked for. What all
// values have in common is taken out before.
func (h *Haystack) decode(s *sample, i int, out []float32) []bool {
	var want []int
	codes, first := h.plan.codes, 0
	if s.class != nil {
		want, codes, first = s.class.answer, s.class.codes, s.class.first
	} else {
		want = s.codes[i]
	}
	d := len(out)
	out = h.w.withoutMean(out)
	// Codewords have equal norms: the nearest is the one with the largest product.
	near := make([]float32, len(codes)/d)
	for j := range near {
		near[j] = attention.Dot(out, codes[j*d:(j+1)*d])
	}
	above := attention.Top(near, first)
	got := slices.DeleteFunc(attention.Top(near, first+len(want)), func(j int) bool { return slices.Contains(above, j) })
	right := make([]bool, len(want))
	for j, w := range want {
		right[j] = slices.Contains(got, w)
	}
	return right
}

// withoutMean returns x without its part along the values' common mean: [d].
func (w *world) withoutMean(x []float32) []float32 {
	common := attention.Dot(x, w.valueMean) / attention.Dot(w.valueMean, w.valueMean)
	out := make([]float32, len(x))
	for j := range x {
		out[j] = x[j] - common*w.valueMean[j]
	}
	return out
}
