package sparse

import (
	"math"
	"sync"

	"kvtier/attention"
	"kvtier/attention/kernels"
	"kvtier/compress"
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

// judge estimates the output from the exact zone and page means, and by it how
// much each page's values matter.
func (u *run) judge() {
	outs := attention.NewPartials(u.rows, u.d)
	value := u.floats(u.d)
	for r := range u.rows {
		u.q.Partials[r].Output(value)
		compress.Rotate(value, u.d)
		if lse := u.q.Partials[r].LSE(); lse > -inf {
			outs[r].Add(lse, value)
		}
	}
	table, sums := u.floats(u.rows*len(u.pages)), attention.AppendSums(nil, outs)
	u.eachSegment(func(s *segmentRun, pages []page) {
		n := len(pages)
		for i, p := range pages {
			for r, mass := range p.mass {
				table[r*n+i] = mass
			}
		}
		attention.Weigh(outs, table, n, n)
		s.values.AddTo(sums, table[:u.rows*n])
	})
	out := u.floats(u.rows * u.d)
	for r := range u.rows {
		outs[r].Output(out[r*u.d : (r+1)*u.d])
	}
	distance2 := u.distances(out)
	for r := range u.rows {
		norm2 := max(attention.Norm2(out[r*u.d:(r+1)*u.d]), 1e-30)
		for i := range u.pages {
			p := &u.pages[i]
			p.scatter[r] = u.segs[p.seg].values.Spread(p.i) / norm2
			p.far[r] = p.scatter[r] + distance2[i*u.rows+r]/norm2
		}
	}
}

// distances returns the squares of the distances of pages' mean values from outputs out [rows][d]: [pages][rows].
func (u *run) distances(out []float32) []float32 {
	distance2, norm2 := u.floats(len(u.pages)*u.rows), u.floats(u.rows)
	for r := range u.rows {
		norm2[r] = attention.Norm2(out[r*u.d : (r+1)*u.d])
	}
	table, value := u.floats(len(distance2)), u.floats(u.d)
	u.eachSegment(func(s *segmentRun, pages []page) {
		n := len(pages)
		s.values.Scores(table, out, 0, n)
		for i, p := range pages {
			s.values.Row(value, p.i)
			square := attention.Norm2(value)
			for r := range u.rows {
				distance2[p.index*u.rows+r] = max(0, square-2*table[r*n+i]+norm2[r])
			}
		}
	})
	return distance2
}

// eachSegment goes through the segments and their pages.
func (u *run) eachSegment(use func(s *segmentRun, pages []page)) {
	at := 0
	for _, s := range u.segs {
		n := s.view.Pages()
		use(s, u.pages[at:at+n])
		at += n
	}
}

// alike is how far the channels of which nothing is known correlate within a
// leaf: its tokens are neighbours (docs/decisions/0011-values-follow-keys.md).
const alike = .2

// normalise estimates the normaliser anew, from the tokens that are scanned and
// the means of all other pages, and the shares of scanned tokens. It returns by
// how much the normaliser's log changed at most.
func (u *run) normalise() (change float32) {
	masses := u.floats(len(u.unread)) // of pages, as long as values are not read
	for r := range u.rows {
		for i, e := range u.unread {
			masses[i] = e.mass[r]
		}
		total := logAdd(u.q.Partials[r].LSE(), logSum(masses))
		logs, share := u.ofRow(u.log, r), u.ofRow(u.shares, r)
		copy(share, logs)
		top := kernels.Largest(share, -inf)
		total = logAdd(total, top+log(kernels.Weights(share, share, top)))
		change = max(change, float32(math.Abs(float64(total-u.total[r]))))
		u.total[r] = total
		f := exp(top - total)
		for t, w := range share {
			if w *= f; w < leastShare {
				w = 0
			}
			share[t] = w
		}
	}
	return change
}

// leastShare is the least share of the softmax that counts for something:
// processors take long over squares that leave float32's normal range.
const leastShare = 1e-15

// weigh computes what reading more of a leaf's tokens is worth: values and the
// next plane of keys, and a bound for later ones.
func (u *run) weigh(x *leaf) {
	planes := len(x.planes)
	u.expectSquares(x, planes)
	u.gain[0] = u.valueGain[x.at:][:tiers.LeafTokens]
	clear(u.gain[0])
	kernels.Axpys(u.gain[:], u.pages[x.page].scatter, u.rows, u.squares, tiers.LeafTokens, tiers.LeafTokens)
	x.keyGain, x.bounded = [compress.NumKeyPlanes]float32{}, true
	for at := planes; at < x.most; at++ {
		x.keyGain[at] = u.planeGain(x, at)
		if at > planes {
			x.keyGain[at] *= mostGrowth
		}
	}
}

// weighAhead computes what planes behind the next one are worth.
func (u *run) weighAhead(x *leaf) {
	x.bounded = false
	for at := len(x.planes) + 1; at < x.most; at++ {
		u.expectSquares(x, at)
		x.keyGain[at] = u.planeGain(x, at)
	}
}

// mostGrowth is more than by which the mean square of a share can grow when
// more of its key is known: it falls, but for shares near 1.
const mostGrowth = 4

// expectSquares estimates the squares of the shares of a leaf's tokens as they
// are if so many planes are known: u.squares, and u.sums.
func (u *run) expectSquares(x *leaf, planes int) {
	for r, g := range u.grades(x, planes) {
		u.curves[r] = g.squares
		u.curves[r].From += u.total[r]
	}
	kernels.Curves(u.squares, u.sums, u.log[x.at:], u.stride, u.curves)
}

// planeGain is what reading a plane of a leaf's keys takes away, of tokens of
// which u.sums knows the squares.
func (u *run) planeGain(x *leaf, plane int) (gain float32) {
	far := u.pages[x.page].far
	for r, g := range u.grades(x, plane) {
		sum, roots := u.sums[2*r], min(u.sums[2*r+1], 1) // all shares together
		gain += far[r] * (sum*g.own + alike*max(0, roots*roots-sum)*g.common)
	}
	return gain
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

// next returns the least worth that is told apart from those that threshold leaves out.
func (h *histogram) next(bytes float64) float32 {
	b := h.bin(bytes)
	return math.Float32frombits(uint32(max(b-1, 0)) << worthShift)
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
