package gpu

import (
	"container/heap"
	"math"
	"time"

	"kvtier/tiers"
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

// mostAbsent is of how many segments that are not held the heat is remembered; then all is forgotten: calls come by here, and have no time to look for the coldest.
const mostAbsent = 1 << 16

func (t *Tier) rememberLocked(id tiers.ID, h heat) {
	if len(t.mu.absent) >= mostAbsent {
		clear(t.mu.absent)
	}
	t.mu.absent[id] = h
}

// absentLocked is the heat of a segment that is not held.
func (t *Tier) absentLocked(id tiers.ID) heat {
	if h, ok := t.mu.absent[id]; ok {
		return h
	}
	return cold
}

// margin is how much warmer a segment must be than the one whose place it takes before it is asked for: twice as much used. So segments that are
// used alike leave each other alone.
const margin heat = 1

// Deserves says whether a segment of so many bytes that is not held should come up before it is asked for: there is free room, or the coldest segment is colder than it by
// a margin. It counts as used as itself, or as the segment like, of another layer, that was asked for instead.
func (t *Tier) Deserves(id, like tiers.ID, bytes int64) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.mu.gone != nil || t.mu.segments[id] != nil {
		return false
	}
	if t.mu.arena.free()+t.mu.arena.limit-t.mu.arena.mapped >= bytes {
		return true
	}
	h := t.absentLocked(id)
	if s := t.mu.segments[like]; s != nil {
		h = max(h, s.heat)
	} else {
		h = max(h, t.absentLocked(like))
	}
	s := t.mu.ranking.coldest()
	if s == nil {
		return false
	}
	heap.Push(&t.mu.ranking, s)
	return h > s.heat+margin
}
