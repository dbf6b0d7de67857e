package stats

import "slices"

// Spread is a median, and the least and the most of all repeats.
type Spread struct {
	Median, Least, Most float64
}

// SpreadOf returns the spread of x, which holds at least one number. Of an even
// number of them the greater of the middle two is taken.
func SpreadOf(x []float64) Spread {
	x = slices.Sorted(slices.Values(x))
	return Spread{Median: x[len(x)/2], Least: x[0], Most: x[len(x)-1]}
}
