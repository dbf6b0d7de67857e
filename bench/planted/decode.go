package planted

import (
	"slices"

	"kvtier/attention"
)

// decode says which of the things that entry i of a sample asks for can be read
// from an output: which of the wanted codewords are among the nearest as many,
// of the sample's own, its distractors' and the decoys; or which of the wanted
// classes are among the ranks asked for. What all values have in common is
// taken out before.
func (h *Haystack) decode(s *sample, i int, out []float32) []bool {
	d := len(out)
	out = h.w.withoutMean(out)
	// Codewords have equal norms: the nearest is the one with the largest product.
	if c := s.class; c != nil {
		near := make([]float32, len(c.codes)/d)
		for j := range near {
			near[j] = attention.Dot(out, c.codes[j*d:(j+1)*d])
		}
		above := attention.Top(near, c.first)
		got := attention.Top(near, c.first+len(c.answer))
		return contains(slices.DeleteFunc(got, func(j int) bool { return slices.Contains(above, j) }), c.answer)
	}
	codes := h.plan.codes
	from := slices.Concat(slices.Concat(s.codes...), s.rivals)
	for j := len(codes)/d - decoys; j < len(codes)/d; j++ {
		from = append(from, j)
	}
	near := make([]float32, len(from))
	for j, c := range from {
		near[j] = attention.Dot(out, codes[c*d:(c+1)*d])
	}
	var got []int
	for _, j := range attention.Top(near, len(s.codes[i])) {
		got = append(got, from[j])
	}
	return contains(got, s.codes[i])
}

// contains says which of want are in got.
func contains(got, want []int) []bool {
	out := make([]bool, len(want))
	for j, w := range want {
		out[j] = slices.Contains(got, w)
	}
	return out
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
