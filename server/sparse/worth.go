package sparse

import (
	"math"

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
// the means of all other pages. It returns by how much the normaliser's log changed at most.
func (u *run) normalise() (change float32) {
	found := u.floats(u.rows)
	for i := range u.leaves {
		sums := u.sumsOf(&u.leaves[i])
		for r := range found {
			found[r] += sums[2*r]
		}
	}
	for r, sum := range found {
		total := logAdd(logAdd(u.q.Partials[r].LSE(), u.rest.mass[r]), u.logSum(u.ofRow(u.mass, r)))
		total = logAdd(total, log(sum)+u.base[r])
		change = max(change, float32(math.Abs(float64(total-u.total[r]))))
		u.total[r], u.unit[r] = total, exp(u.base[r]-total)
	}
	return change
}

// offers adds to u.hist what the listed leaves offer of which so many planes are read at least: others were
// not worth the last one.
func (u *run) offers(list []int, planes int) {
	for _, i := range list {
		x := &u.leaves[i]
		if int(x.planes) < planes {
			continue
		}
		if !x.weighed {
			u.weigh(x)
		}
		u.offer(x)
	}
}

// weigh computes what reading more of a leaf is worth, by the sums of its shares: planes of keys, and
// all values together. Of leaves of which more than the first plane is read it tells values apart.
func (u *run) weigh(x *leaf) {
	planes := int(x.planes)
	far, scatter, grades := u.far[int(x.page)*u.rows:][:u.rows], u.scatter[int(x.page)*u.rows:][:u.rows], u.grades(x, planes)
	sums := u.sumsOf(x)
	var keys, values, tokens float32
	for r := range grades {
		g, unit := &grades[r], u.unit[r]
		sum, squares := sums[2*r]*unit, sums[2*r+1]*unit*unit
		expected := min(squares*g.ofSquare, sum*g.ofShare)
		together := min(1, sum*sum*g.ofSquare, tiers.LeafTokens*expected) // the square of the expected sum
		keys += far[r] * (expected*g.own + alike*max(0, together-expected)*g.common)
		if squares > 0 {
			values += scatter[r] * expected
			tokens += scatter[r] * expected * min(tiers.LeafTokens, sum*sum/squares)
		}
		u.gainRows[r] = kernels.GainRow{OfSquare: g.ofSquare * unit, OfWeight: g.ofShare, Factor: scatter[r] * unit}
	}
	x.weighed, x.keyGain, x.valueGain, x.tokens = true, keys, values, 0
	if values > 0 {
		x.tokens = tokens / values
	}
	if x.deep >= 0 {
		kernels.Gains(u.gainsOf(x), u.weightsOf(x), u.gainRows)
	}
}

// behind is what a plane behind the next one is worth, of what it would be worth next: as if it took that
// much more to get there (docs/decisions/0014-cheap-choices.md).
const behind = 1. / 8

// offer adds a weighed leaf's planes of keys and its values to what can be bought.
func (u *run) offer(x *leaf) {
	gain := x.keyGain
	for p := x.planes; p < x.most; p++ {
		u.hist.add(gain*u.perByte[p], float32(u.planeBytes[p]))
		gain = x.keyGain * behind
	}
	perValue := 1 / u.valueBytes
	if x.deep < 0 {
		if x.tokens > 0 && x.planes < x.most { // else it will not get deep
			u.hist.add(x.valueGain*perValue/x.tokens, x.tokens*u.valueBytes)
		}
		return
	}
	for _, gain := range u.gainsOf(x) {
		u.hist.add(gain*perValue, u.valueBytes)
	}
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
