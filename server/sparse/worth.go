package sparse

import (
	"math"

	"kvtier/attention"
	"kvtier/compress"
)

// What is read next is what takes most error away for its bytes. The error of
// a row's output that a token causes is, relative to the output and as far as
// tokens err independently, the square of its share of the softmax times
//
//   - the variance of its weight times the square of its value's distance from
//     the output, until its key is known better;
//   - the scatter of its value around the mean that stands for it, until its
//     value is read.

// judge estimates the output from the exact zone and page means, and by it how
// much each page's values matter.
func (u *run) judge() {
	outs := attention.NewPartials(u.rows, u.d)
	value := make([]float32, u.d)
	for r := range u.rows {
		u.q.Partials[r].Output(value)
		compress.Rotate(value, u.d)
		if lse := u.q.Partials[r].LSE(); lse > -inf {
			outs[r].Add(lse, value)
		}
	}
	for i := range u.pages {
		p := &u.pages[i]
		u.segs[p.seg].values.Row(value, p.i)
		for r := range u.rows {
			outs[r].Add(p.mass[r], value)
		}
	}
	out := make([]float32, u.d)
	for r := range u.rows {
		outs[r].Output(out)
		norm2 := max(attention.Norm2(out), 1e-30)
		for i := range u.pages {
			p := &u.pages[i]
			s := u.segs[p.seg]
			s.values.Row(value, p.i)
			p.scatter[r] = s.values.Spread(p.i) / norm2
			for j, v := range out {
				value[j] -= v
			}
			p.far[r] = p.scatter[r] + attention.Norm2(value)/norm2
		}
	}
}

// alike is how far the channels of which nothing is known correlate within a
// leaf: its tokens are neighbours (docs/decisions/0011-values-follow-keys.md).
const alike = .2

// keyGain is the error that a plane of keys takes away once so many planes of
// the leaf are read.
func (u *run) keyGain(x *leaf, planes int) (gain float32) {
	p, c := &u.pages[x.page], u.segs[x.seg].codes
	for r := range u.rows {
		now, next := u.noise(x, planes, r), u.noise(x, planes+1, r)
		var sum, roots float32
		for t, l := range x.log[r] {
			square := x.square[r][t]
			if planes != len(x.planes) {
				square = meanSquare(l-u.total[r], now)
			}
			sum += square
			roots += float32(math.Sqrt(float64(square)))
		}
		roots = min(roots, 1) // all shares together
		missing := c.missing[x.group]
		gain += p.far[r] * (sum*(1-exp(next-now)) + alike*max(0, roots*roots-sum)*(1-exp(missing[planes][r]-missing[planes-1][r])))
	}
	return gain
}

// valueGain is the error that reading a token's value takes away.
func (u *run) valueGain(x *leaf, t int) (gain float32) {
	p := &u.pages[x.page]
	for r := range u.rows {
		gain += p.scatter[r] * x.square[r][t]
	}
	return gain
}

// meanSquare is the mean of the square of a token's share of the softmax, of
// which log is the estimate as scoreLeaf makes it: the true log is normal with
// the variance noise, and no share is more than 1.
func meanSquare(log, noise float32) float32 {
	const negligible = -14 // e^-28 of the error's square
	mu := log - attention.Mass(1, 0, noise)
	switch {
	case noise < .1:
		return min(1, exp(2*(mu+noise)))
	case mu+2*noise < negligible && mu < -6*noise:
		return exp(2 * (mu + noise))
	}
	m, v := float64(mu), float64(noise)
	sd := math.Sqrt(2 * v)
	return float32(math.Exp(min(0, 2*m+2*v))*math.Erfc((m+2*v)/sd)/2 + math.Erfc(-m/sd)/2)
}

// item is something that can be read.
type item struct{ gain, cost float32 }

// bucketsPerOctave is how finely threshold tells worths apart.
const bucketsPerOctave = 8

// threshold returns the least gain for a byte at which reading all items that
// are worth as much stays within so many bytes; +Inf if nothing does.
func threshold(items []item, bytes float64) float32 {
	const octaves, least = 256, -128
	var cost [octaves * bucketsPerOctave]float64
	for _, x := range items {
		if x.gain > 0 {
			b := int((math.Log2(float64(x.gain/x.cost)) - least) * bucketsPerOctave)
			cost[min(max(b, 0), len(cost)-1)] += float64(x.cost)
		}
	}
	b := len(cost)
	for ; b > 0 && cost[b-1] <= bytes; b-- {
		bytes -= cost[b-1]
	}
	if b == len(cost) {
		return inf
	}
	return float32(math.Exp2(float64(b)/bucketsPerOctave + least))
}
