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
	value := make([]float32, u.d)
	for r := range u.rows {
		u.q.Partials[r].Output(value)
		compress.Rotate(value, u.d)
		if lse := u.q.Partials[r].LSE(); lse > -inf {
			outs[r].Add(lse, value)
		}
	}
	table, sums := make([]float32, u.rows*len(u.pages)), attention.AppendSums(nil, outs)
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
	out, norm2 := make([]float32, u.rows*u.d), make([]float32, u.rows)
	for r := range u.rows {
		outs[r].Output(out[r*u.d : (r+1)*u.d])
		norm2[r] = attention.Norm2(out[r*u.d : (r+1)*u.d])
	}
	u.eachSegment(func(s *segmentRun, pages []page) {
		n := len(pages)
		s.values.Scores(table, out, 0, n)
		for i := range pages {
			p := &pages[i]
			s.values.Row(value, p.i)
			square, spread := attention.Norm2(value), s.values.Spread(p.i)
			for r := range u.rows {
				distance2 := max(0, square-2*table[r*n+i]+norm2[r])
				p.scatter[r] = spread / max(norm2[r], 1e-30)
				p.far[r] = p.scatter[r] + distance2/max(norm2[r], 1e-30)
			}
		}
	})
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
// the means of all other pages, and the shares of scanned tokens.
func (u *run) normalise() {
	for r := range u.rows {
		zone := u.q.Partials[r].LSE()
		top := zone
		for _, e := range u.unread { // pages, as long as values are not read
			top = max(top, e.mass[r])
		}
		for i := range u.leaves {
			top = kernels.Largest(u.leaves[i].log[r], top)
		}
		sum := exp(zone - top)
		for _, e := range u.unread {
			sum += exp(e.mass[r] - top)
		}
		for i := range u.leaves {
			x := &u.leaves[i]
			copy(x.share[r], x.log[r])
			sum += kernels.Weights(x.share[r], top)
		}
		u.total[r] = top + log(sum)
		f := 1 / sum
		for i := range u.leaves {
			share := u.leaves[i].share[r]
			for t := range share {
				share[t] *= f
			}
		}
	}
}

// weigh computes what reading more of a leaf's tokens is worth.
func (u *run) weigh(x *leaf) {
	p, planes := &u.pages[x.page], len(x.planes)
	x.keyGain, x.valueGain = [compress.NumKeyPlanes]float32{}, [tiers.LeafTokens]float32{}
	for at := planes; at == planes || at < x.most; at++ { // if so many planes are read
		grades := u.grades(x, at)
		for r, log := range x.log {
			g := &grades[r]
			var sum, roots float32
			for t, l := range log {
				square := g.squares.at(l - u.total[r] - g.raise)
				if at == planes {
					x.valueGain[t] += p.scatter[r] * square
				}
				sum += square
				roots += sqrt(square)
			}
			if at < x.most {
				roots = min(roots, 1) // all shares together
				x.keyGain[at] += p.far[r] * (sum*g.own + alike*max(0, roots*roots-sum)*g.common)
			}
		}
	}
}

func sqrt(x float32) float32 { return float32(math.Sqrt(float64(x))) }

// meanSquare is the mean of the square of a token's share of the softmax, whose
// log is normal with mean mu and variance noise, but no share is more than 1.
func meanSquare(mu, noise float64) float64 {
	if noise == 0 {
		return math.Exp(min(0, 2*mu))
	}
	sd := math.Sqrt(2 * noise)
	return math.Exp(2*mu+2*noise)*math.Erfc((mu+2*noise)/sd)/2 + math.Erfc(-mu/sd)/2
}

// Of meanSquare a table is used: muSteps for each unit of mu, deviationSteps for
// each of the standard deviation. Between them it is linear, which is good to 4 %
// where tokens matter, and to 20 % where they hardly do.
const (
	lowMu, highMu, muSteps        = -48, 8, 4
	mostDeviation, deviationSteps = 12, 8
)

type squareRow [(highMu-lowMu)*muSteps + 1]float32

var meanSquares = sync.OnceValue(func() (t *[mostDeviation*deviationSteps + 1]squareRow) {
	t = new([mostDeviation*deviationSteps + 1]squareRow)
	for i := range t {
		sd := float64(i) / deviationSteps
		for j := range t[i] {
			t[i][j] = float32(meanSquare(lowMu+float64(j)/muSteps, sd*sd))
		}
	}
	return t
})

// squares is the table at one variance.
type squares struct {
	below, above *squareRow
	part         float32
}

func squaresFor(noise float32) squares {
	at := min(float32(math.Sqrt(float64(noise)))*deviationSteps, mostDeviation*deviationSteps-1)
	t, i := meanSquares(), int(at)
	return squares{&t[i], &t[i+1], at - float32(i)}
}

func (s *squares) at(mu float32) float32 {
	at := (mu - lowMu) * muSteps
	if !(at > 0) {
		return 0
	}
	at = min(at, (highMu-lowMu)*muSteps-1)
	i := int(at)
	f := at - float32(i)
	a := s.below[i] + f*(s.below[i+1]-s.below[i])
	b := s.above[i] + f*(s.above[i+1]-s.above[i])
	return a + s.part*(b-a)
}

// item is something that can be read.
type item struct{ gain, cost float32 }

// threshold returns the least gain for a byte at which reading all items that
// are worth as much stays within so many bytes; +Inf if nothing does. Worths are
// told apart by their exponent and 3 bits of their mantissa.
func threshold(items []item, bytes float64) float32 {
	const shift = 20
	var cost [1 << (31 - shift)]float64
	for _, x := range items {
		if x.gain > 0 {
			cost[math.Float32bits(x.gain/x.cost)>>shift] += float64(x.cost)
		}
	}
	b := len(cost)
	for ; b > 0 && cost[b-1] <= bytes; b-- {
		bytes -= cost[b-1]
	}
	if b == len(cost) {
		return inf
	}
	return math.Float32frombits(uint32(b) << shift)
}
