package sparse

import (
	"kvtier/attention"
	"kvtier/attention/kernels"
	"kvtier/tiers"
)

// sum adds tokens' stored values to a run's partials, a batch at a time, so that all
// rows share each read of a value.
type sum struct {
	u       *run
	out     [][]float32 // the partials' sums
	batch   kernels.ValueBatch
	weights []float32 // [rows][kernels.ValueTokens]
}

// newSum begins with empty partials, whose unit is that of the run's weights.
func newSum(u *run) *sum {
	for r := range u.rot {
		u.rot[r].Max = u.base[r]
	}
	return &sum{u: u, out: attention.AppendSums(nil, u.rot), weights: u.floats(u.rows * kernels.ValueTokens)}
}

// add takes in a token of which scale, high and low are what is stored of its
// value, as kernels.ValueBatch wants them, and w, every 16, the rows' weights. These it sets to 0, and
// returns what share of the attention they are, summed over rows.
func (s *sum) add(scale, high, low []byte, w []float32) (share float32) {
	if !s.batch.Append(scale, high, low) {
		s.flush()
		s.batch.Append(scale, high, low)
	}
	at := s.batch.Len() - 1
	for r := range s.u.rot {
		x := &w[r*tiers.LeafTokens]
		s.weights[r*kernels.ValueTokens+at] = *x
		s.u.rot[r].Sum += float64(*x)
		share += *x * s.u.unit[r]
		*x = 0
	}
	return share
}

// flush brings the partials up to date.
func (s *sum) flush() {
	s.batch.AddTo(s.out, s.weights, kernels.ValueTokens)
	s.batch.Reset()
}
