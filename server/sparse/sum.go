package sparse

import (
	"kvtier/attention"
	"kvtier/compress"
)

// sum adds tokens' stored values to partials, a batch at a time, so that all
// rows share each read of a value.
type sum struct {
	ps     []attention.Partial
	out    [][]float32 // the partials' sums
	d      int
	batch  compress.ValueBatch
	scores []float32 // [rows][compress.BatchTokens]
}

func newSum(ps []attention.Partial, d int) *sum {
	return &sum{ps: ps, out: attention.AppendSums(nil, ps), d: d, scores: make([]float32, (len(ps)+1)*compress.BatchTokens)}
}

// add takes in a token of which scale, high and low are what is stored of its
// value, as compress.UnpackValue wants them. Its scores are to be set before the
// next one comes: every compress.BatchTokens from the first of those that it returns, one for each row.
func (s *sum) add(scale, high, low []byte) (scores []float32) {
	if !s.batch.Append(scale, high, low) {
		s.flush()
		s.batch.Append(scale, high, low)
	}
	return s.scores[s.batch.Len()-1:]
}

// flush brings the partials up to date.
func (s *sum) flush() {
	attention.Weigh(s.ps, s.scores, compress.BatchTokens, s.batch.Len())
	s.batch.AddTo(s.out, s.scores, compress.BatchTokens, s.d)
	s.batch.Reset()
}
