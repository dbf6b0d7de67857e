package planted

import (
	"slices"

	"kvtier/attention"
)

// decode says how much of what entry i of a sample asks can be read from an
// output: the share of the wanted codewords among the nearest as many, or of
// the wanted classes among the ranks asked for.
func (h *Haystack) decode(s *sample, i int, out []float32) float64 {
	want, codes, first := []int(nil), h.plan.codes, 0
	if s.class != nil {
		want, codes, first = s.class.answer, s.class.codes, s.class.first
	} else {
		want = s.codes[i]
	}
	d := len(out)
	// Codewords have equal norms: the nearest is the one with the largest product.
	near := make([]float32, len(codes)/d)
	for j := range near {
		near[j] = attention.Dot(out, codes[j*d:(j+1)*d])
	}
	got := attention.Top(near, first+len(want))
	if first > 0 {
		above := attention.Top(near, first)
		got = slices.DeleteFunc(got, func(j int) bool { return slices.Contains(above, j) })
	}
	right := 0
	for _, w := range want {
		if slices.Contains(got, w) {
			right++
		}
	}
	return float64(right) / float64(len(want))
}
