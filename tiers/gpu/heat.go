package gpu

import (
	"math"
	"time"
)

// heat is the use that a segment has seen, each use worth half of itself after
// a halfLife. It is the logarithm, to base 2, of the sum of uses in units that
// double every halfLife: so that nothing has to be done for uses to fade.
type heat float64

const halfLife = time.Minute

// cold is the heat of what was never used.
var cold = heat(math.Inf(-1))

// used adds a use: see useOf.
func (h heat) used(attention float32, at time.Duration) heat { return h.with(useOf(attention, at)) }

// useOf is the heat of one use at a time since the tier began. attention is the
// share of the query's attention that the segment received, 0 to 1. As in package ram its
// square root counts, and without any it is an eighth of a use.
func useOf(attention float32, at time.Duration) heat {
	worth := 1. / 8
	if attention > 0 { // or it is no number
		worth += 7. / 8 * math.Sqrt(math.Min(float64(attention), 1))
	}
	return heat(math.Log2(worth) + at.Seconds()/halfLife.Seconds())
}

// with adds the heat of a use.
func (h heat) with(use heat) heat {
	more, less := max(h, use), min(h, use)
	return more + heat(math.Log2(1+math.Exp2(float64(less-more))))
}
