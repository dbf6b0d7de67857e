package sparse

import (
	"math"
	"sync"

	"kvtier/attention/kernels"
	"kvtier/tiers"
)

// What is read next is what takes most error away for its bytes. The error of
// a row's output that a token causes is, relative to the output and as far as
// tokens err independently, the square of its share of the softmax times
//
//   - the variance of its weight times the square of its value's distance from
//     the output, until its key is known better;
//   - the scatter of its value around the mean that stands for it, until its
//     value is read.

// alike is how far the channels of which nothing is known correlate within a
// leaf: its tokens are neighbours (docs/decisions/0011-values-follow-keys.md).
const alike = .2

// normalise estimates the normaliser anew, from the tokens that are scanned and
// the means of all other pages, and the shares of scanned tokens. It returns by
// how much the normaliser's log changed at most.
func (u *run) normalise() (change float32) {
	for r := range u.rows {
		total := logAdd(u.q.Partials[r].LSE(), u.logSum(u.ofRow(u.mass, r)))
		logs, shares := u.ofLeaves(u.log, r), u.ofLeaves(u.shares, r)
		top := kernels.Largest(logs, -inf)
		total = logAdd(total, top+log(kernels.Weights(shares, logs, top)))
		change = max(change, float32(math.Abs(float64(total-u.total[r]))))
		u.total[r] = total
		kernels.Shares(shares, u.sums[2*r*u.stride/tiers.LeafTokens:], exp(top-total), leastShare)
	}
	return change
}

// leastShare is the least share of the softmax that counts for something:
// processors take long over squares that leave float32's normal range.
const leastShare = 1e-15

// weighBest weighs those leaves which may be worth what the rest of the budget
// buys, and adds what they offer to u.hist, which may hold other offers. Most are not worth weighing: a bound tells. Leaves
// are taken by their bounds from the largest on, until what was offered above them costs more than there is.
func (u *run) weighBest() {
	u.byBound = sized(u.byBound, len(u.leaves))
	bins := u.keys[:0]
	clear(u.starts[:])
	for i := range u.leaves {
		bin := binOf(u.bound(&u.leaves[i]))
		bins = append(bins, uint64(bin))
		u.starts[bin]++
	}
	u.keys = bins
	at := int32(0)
	for b := len(u.starts) - 1; b >= 0; b-- {
		u.starts[b], at = at, at+u.starts[b]
	}
	for i, b := range bins {
		u.byBound[u.starts[b]] = int32(i)
		u.starts[b]++ // in the end, where the next lower bin begins
	}
	left, next := u.left, int32(0)
	for b := len(u.hist) - 1; b >= 0 && left >= 0; b-- {
		for ; next < u.starts[b]; next++ {
			x := &u.leaves[u.byBound[next]]
			if !x.weighed {
				u.weigh(x)
			}
			u.offer(x)
		}
		left -= u.hist[b]
	}
}

// bound is more than what reading any more of a leaf is worth, for a byte.
func (u *run) bound(x *leaf) (worth float32) {
	planes := len(x.planes)
	far := u.far[x.page*u.rows:][:u.rows]
	grades := u.grades(x, planes)
	for r := range grades {
		g := &grades[r]
		sum, squares := u.sumsOf(x, r) // without shares that count for nothing, but may grow
		sum, squares = sum+tiers.LeafTokens*leastShare, squares+tiers.LeafTokens*leastShare*leastShare
		squares = min(squares*g.ofSquare, sum*g.ofShare)
		worth += far[r] * (squares + alike*min(1, sum*sum*g.ofSquare, tiers.LeafTokens*squares))
	}
	perByte := 1 / u.valueBytes
	if planes < x.most {
		perByte = max(perByte, u.perByte[planes])
	}
	return worth * perByte * tables
}

// tables is by how much expectSquares may be too large.
const tables = 1.25

// weigh computes what reading more of a leaf's tokens is worth: values and planes of keys.
func (u *run) weigh(x *leaf) {
	planes := len(x.planes)
	x.weighed = true
	u.expectSquares(x, planes)
	u.gain[0] = u.valueGain[x.at:][:tiers.LeafTokens]
	clear(u.gain[0])
	kernels.Axpys(u.gain[:], u.scatter[x.page*u.rows:], u.rows, u.squares, tiers.LeafTokens, tiers.LeafTokens)
	for at := planes; at < x.most; at++ {
		x.keyGain[at] = u.planeGain(x, at)
		if at > planes {
			x.keyGain[at] *= behind
		}
	}
}

// behind is what a plane behind the next one is worth, of what it would be worth next: about
// as much as when squares are estimated as they are expected to be then.
const behind = .5

// expectSquares estimates the squares of the shares of a leaf's tokens, of which
// so many planes are known: u.squares, and u.ends.
func (u *run) expectSquares(x *leaf, planes int) {
	grades := u.grades(x, planes)
	for r := range grades {
		u.curves[r] = grades[r].squares
		u.curves[r].From += u.total[r]
	}
	kernels.Curves(u.squares, u.ends, u.log[x.at:], u.stride, u.curves)
}

// planeGain is what reading a plane of a leaf's keys takes away, of tokens of
// which u.ends knows the squares.
func (u *run) planeGain(x *leaf, plane int) (gain float32) {
	far, grades := u.far[x.page*u.rows:][:u.rows], u.grades(x, plane)
	for r := range grades {
		g := &grades[r]
		sum, roots := u.ends[2*r], min(u.ends[2*r+1], 1) // all shares together
		gain += far[r] * (sum*g.own + alike*max(0, roots*roots-sum)*g.common)
	}
	return gain
}

// offer adds a weighed leaf's planes of keys and its values to what can be bought.
func (u *run) offer(x *leaf) {
	for p := len(x.planes); p < x.most; p++ {
		u.hist.add(x.keyGain[p]*u.perByte[p], float32(u.planeBytes[p]))
	}
	perValue := 1 / u.valueBytes
	for _, gain := range u.valueGain[x.at:][:tiers.LeafTokens] {
		u.hist.add(gain*perValue, u.valueBytes)
	}
}

// meanSquare is the mean of the square of a token's share of the softmax, whose
// log is normal with mean mu and variance noise, but no share is more than 1.
func meanSquare(mu, noise float64) float64 {
	if noise == 0 {
		return math.Exp(min(0, 2*mu))
	}
	sd := math.Sqrt(2 * noise)
	return math.Exp(2*mu+2*noise)*math.Erfc((mu+2*noise)/sd)/2 + math.Erfc(-mu/sd)/2
}

// Of meanSquare a family of curves is used, deviationSteps for each unit of the
// standard deviation. Between them it is linear, which is good to 4 % where
// tokens matter, and to 20 % where they hardly do.
const (
	lowMu                         = -48
	mostDeviation, deviationSteps = 12, 8
)

var meanSquares = sync.OnceValue(func() (t *[mostDeviation*deviationSteps + 1]kernels.CurveRow) {
	t = new([mostDeviation*deviationSteps + 1]kernels.CurveRow)
	for i := range t {
		sd := float64(i) / deviationSteps
		for j := range t[i] {
			if x := meanSquare(lowMu+float64(j)/kernels.CurveSteps, sd*sd); x > leastShare*leastShare {
				t[i][j] = float32(x)
			}
		}
	}
	return t
})

// squaresFor returns the mean square by mu at one variance.
func squaresFor(noise float32) kernels.Curve {
	at := min(float32(math.Sqrt(float64(noise)))*deviationSteps, mostDeviation*deviationSteps-1)
	t, i := meanSquares(), int(at)
	return kernels.Curve{Below: &t[i], Above: &t[i+1], Part: at - float32(i), From: lowMu}
}

// histogram holds by how much worth how many bytes are. Worths, gains for a byte, are
// told apart by their exponent and 3 bits of their mantissa.
type histogram [1 << (31 - worthShift)]float64

const worthShift = 20

func (h *histogram) add(worth, bytes float32) {
	if worth > 0 {
		h[math.Float32bits(worth)>>worthShift] += float64(bytes)
	}
}

// binOf returns the bin of a worth: 0 if there is none, the last one if it is no number.
func binOf(worth float32) int {
	if worth <= 0 {
		return 0
	}
	return int(math.Float32bits(worth) &^ (1 << 31) >> worthShift)
}

// threshold returns the least worth at which reading all that is worth as much
// stays within so many bytes; +Inf if nothing does.
func (h *histogram) threshold(bytes float64) float32 {
	b := h.bin(bytes)
	if b == len(h) {
		return inf
	}
	return math.Float32frombits(uint32(b) << worthShift)
}

// bin returns the first bin that stays within so many bytes with all above it.
func (h *histogram) bin(bytes float64) int {
	b := len(h)
	for ; b > 0 && h[b-1] <= bytes; b-- {
		bytes -= h[b-1]
	}
	return b
}
