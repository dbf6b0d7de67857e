package compress

// KeyFeedback says what rounding errors of channels, in stored order, are made
// up for by the channels behind them: if channel i is stored too low by e, channel
// j > i should be stored higher by e times [i][j]. [d][d]; what is not above the diagonal is 0.
type KeyFeedback []float32

const (
	// feedbackFloor is added to the moment of queries, in mean diagonal elements: errors must not
	// grow in directions in which queries seldom point (docs/decisions/0025-error-feedback.md).
	feedbackFloor = 1
	// maxFeedbackExp bounds exponents of keys so that fed back errors, and their sums, stay finite.
	maxFeedbackExp = 64
)

// FitKeyFeedback finds the feedback that keeps the mean square of what rounding adds to scores
// least: moment [d][d] is that of queries, E[q q'] up to a factor. The error of a key, e, adds
// e' moment e. That is the sum over channels j of a positive number times the square of
// e_j + sum over i < j of [i][j] e_i; each channel is rounded so that its square is least.
//
// It is nil, which is no feedback, if the moment is zero or if exp, of KeyExp, says that keys are above 2^79.
func FitKeyFeedback(moment []float32, o KeyOrder, exp int) KeyFeedback {
	d := len(o.Channels)
	var floor float64
	for i := range d {
		floor += feedbackFloor * float64(moment[i*d+i]) / float64(d)
	}
	if !(floor > 0) || exp > maxFeedbackExp {
		return nil
	}
	a := make([]float64, d*d)
	for i, p := range o.Channels {
		for j, q := range o.Channels[:i+1] { // the lower triangle is enough
			a[i*d+j] = float64(moment[int(p)*d+int(q)])
		}
		a[i*d+i] += floor
	}
	// Elimination from the last channel on: what is left of the matrix is the moment of
	// the channels before, as far as those behind cannot make up for them.
	f := make(KeyFeedback, d*d)
	for j := d - 1; j > 0; j-- {
		last := a[j*d : j*d+j]
		for i, x := range last {
			part := x / a[j*d+j]
			f[i*d+j] = float32(part)
			row := a[i*d : i*d+i+1]
			for k := range row {
				row[k] -= part * last[k]
			}
		}
	}
	return f
}
