package sparse

import (
	"math"
	"math/bits"

	"kvtier/attention"
	"kvtier/compress"
	"kvtier/tiers"
)

// estimate is what stands for the tokens that were not read, by slot: their share of the
// softmax; the sum of the squares of single tokens' shares; and the variance of the share. [rows][slots]
type estimate struct{ share, squares, variance []float32 }

// finish estimates what was not read, merges everything into the query's partials
// and estimates the error.
func (u *run) finish() {
	e := estimate{u.table(), u.table(), u.table()}
	u.estimatePages(e)
	f := followers{seg: -1, group: -1}
	u.estimateLeaves(e, &f)
	u.acc.Estimated += u.rest.tokens
	for _, n := range u.tokens {
		u.acc.Estimated += int64(n)
	}
	u.addEstimate(e)
	u.follow(&f)
	mergeRotated(u.q.Partials, u.rot, u.d)
	u.estimateError(e)
}

// estimatePages lets pages that were not scanned stand by their means.
func (u *run) estimatePages(e estimate) {
	for r := range u.rows {
		share, squares, variance := u.ofRow(e.share, r), u.ofRow(e.squares, r), u.ofRow(e.variance, r)
		u.estimatedShares(share, r)
		ruled, noise := u.ofRow(u.ruled, r), u.ofRow(u.noise, r)
		for i, x := range share {
			if squares[i] = x * x * ruled[i]; x > 0 {
				variance[i] = x * x * noise[i]
			}
		}
		u.traceEstimates(r)
	}
}

// estimateLeaves lets the tokens whose keys were scanned, but whose values were
// not read, stand by the mean value of their page and by what their keys say of
// how they deviate from it. Mean values of leaves hardly
// did better; taking out of the mean what was read magnifies its rounding, and
// measured no better. Of drains, whose values are next to nothing, nothing stands for the value.
func (u *run) estimateLeaves(e estimate, f *followers) {
	shares := u.floats(u.rows)
	for at, i := range u.inOrder {
		x := &u.leaves[i]
		u.prefetch(&u.leaves[u.inOrder[min(at+aheadLeaves, len(u.inOrder)-1)]])
		n := int(x.n) - bits.OnesCount16(x.chosen)
		if n == 0 {
			continue
		}
		slot, drains := int(x.page), u.segs[x.seg].view.IsDrain(int(x.i))
		if drains {
			slot = u.pages + int(x.seg)
		}
		u.tokens[slot] += int32(n)
		grades, sums := u.grades(x, int(x.planes)), u.sumsOf(x)
		for r := range grades {
			if x.chosen != 0 {
				sums[2*r], sums[2*r+1] = sumSquares(u.weightsOf(x)[r*tiers.LeafTokens:]) // 0 of those that were read
			}
			at, unit := r*u.slots+slot, u.unit[r]
			share, squares := sums[2*r]*unit, sums[2*r+1]*unit*unit
			e.share[at] += share
			e.squares[at] += squares
			e.variance[at] += squares * grades[r].scatter
			shares[r] = share
		}
		if u.follows && !drains {
			u.deviate(f, x, shares)
		}
		u.traceScanned(x)
	}
}

// sumSquares adds a leaf's weights and their squares up.
func sumSquares(w []float32) (sum, squares float32) {
	for _, x := range w[:tiers.LeafTokens] {
		sum += x
		squares += x * x
	}
	return sum, squares
}

// addEstimate adds mean values by their shares.
func (u *run) addEstimate(e estimate) {
	outs, weights := attention.NewPartials(u.rows, u.d), u.floats(len(e.share))
	copy(weights, e.share)
	for r := range outs {
		outs[r].Max = u.total[r]
		for _, x := range u.ofRow(weights, r) {
			outs[r].Sum += float64(x)
		}
	}
	u.addMeans(outs, weights)
	u.rest.addTo(outs)
	for r := range outs {
		u.rot[r].Merge(&outs[r])
	}
}

// estimateError estimates the relative error of the rows' outputs. Each estimated
// group errs by the spread of its values around their mean, as far as few of
// its tokens rule it, and by the error of its mass times its mean's distance
// from the output, as if groups erred independently. They do not quite, and
// keys err too: errorScale makes up for it. Audits say how well this holds.
func (u *run) estimateError(e estimate) {
	outs := u.floats(u.rows * u.d)
	for r := range u.rows {
		out := outs[r*u.d : (r+1)*u.d]
		u.q.Partials[r].Output(out)
		compress.Rotate(out, u.d)
	}
	distance2 := u.distances(outs)
	for r := range u.rows {
		var err2 float64
		norm2 := attention.Norm2(outs[r*u.d : (r+1)*u.d])
		distance2, squares, variance := u.ofRow(distance2, r), u.ofRow(e.squares, r), u.ofRow(e.variance, r)
		for at := range u.pages {
			err2 += float64(u.values.Spread(at)*squares[at] + variance[at]*distance2[at])
		}
		err2 += float64(u.rest.error2(r, u.total[r], norm2))
		for i := range u.segs {
			s := &u.segs[i]
			if s.view.Drains() > 0 { // their values scatter like the other outliers', for all that is known
				at := u.pages + i
				err2 += float64(s.means.Values.Spread(s.view.PageOfDrains())*squares[at] + variance[at]*norm2)
			}
		}
		if norm2 > 0 {
			p := &u.q.Partials[r]
			f := math.Exp(float64(u.total[r]-p.Max)) / p.Sum
			u.acc.Error += float32(min(1, errorScale*f*math.Sqrt(err2/float64(norm2)))) / float32(u.rows)
		}
	}
	u.acc.errorRows = float64(u.rows)
}

// errorScale brings estimates to the errors measured on real models, which are
// 2.2 to 4 times as large (docs/decisions/0004-budget-path.md).
const errorScale = 2.5

// traceEstimates tells of tokens that only means stand for: they share its mass.
func (u *run) traceEstimates(r int) {
	if u.tr.Token == nil {
		return
	}
	for i := range u.segs {
		s := &u.segs[i]
		at := s.firstPage
		for p := range s.view.Pages() {
			n, mass := s.view.PageTokens(p), float32(0)
			switch {
			case at == s.endPage || int(u.pageOf[at]) != p: // one of the rest
				mass = u.surveyed[r*u.all+s.firstOfAll+p]
			case u.scanned[at]:
				at++
				continue
			default:
				mass = u.mass[r*u.slots+at]
				at++
			}
			for t := range n {
				u.tr.Token(r, s.index, p*tiers.PageTokens+t, mass-attention.LogN(n), Estimated)
			}
		}
	}
}

// traceScanned tells of a leaf's tokens of which only keys were read.
func (u *run) traceScanned(x *leaf) {
	if u.tr.Token == nil {
		return
	}
	for r := range u.rows {
		for t := range int(x.n) {
			if x.chosen>>t&1 == 0 {
				u.tr.Token(r, u.segs[x.seg].index, x.place()+t, u.logOf(r, u.weightsOf(x)[r*tiers.LeafTokens+t]), Scanned)
			}
		}
	}
}
