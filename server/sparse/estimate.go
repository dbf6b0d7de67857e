package sparse

import (
	"math"
	"math/bits"
	"slices"

	"kvtier/attention"
	"kvtier/attention/kernels"
	"kvtier/compress"
	"kvtier/tiers"
)

// unread is a group of tokens of a page that stands in the answer by the mean of
// its page's values.
type unread struct {
	page    *page
	scanned bool      // its tokens' keys were read
	drains  bool      // the group of drains, whose values are next to nothing
	n       int       // tokens
	mass    []float32 // [rows], log
	ruled   []float32 // [rows], the share of the squares: 1/n if all weigh the same, 1 if one rules
	noise   []float32 // [rows], relative variance of the mass
}

// newUnread takes what it holds by row from floats, [3 rows] or more.
func (u *run) newUnread(floats []float32, x unread) unread {
	n := u.rows
	x.mass, x.ruled, x.noise = floats[:n:n], floats[n:2*n:2*n], floats[2*n:3*n:3*n]
	return x
}

// estimatePages lets all pages stand by their means.
func (u *run) estimatePages() {
	floats := u.floats(3 * u.rows * len(u.pages))
	u.unread = sized(u.unread, len(u.pages))
	for i := range u.pages {
		p := &u.pages[i]
		e := u.newUnread(floats[3*u.rows*i:], unread{page: p, n: p.n})
		key := u.segs[p.seg].keys.Spread(p.i)
		for r, mass := range p.mass {
			raised := exp(min(key*u.norm2[r], 4))
			e.mass[r], e.ruled[r], e.noise[r] = mass, min(1, raised/float32(p.n)), min(1, (raised-1)/float32(p.n))
		}
		u.unread[i] = e
	}
}

// estimateLeaves lets the tokens whose keys were scanned, but whose values were
// not read, stand by the mean value of their page and by what their keys say of
// how they deviate from it. Mean values of leaves hardly
// did better; taking out of the mean what was read magnifies its rounding, and
// measured no better.
func (u *run) estimateLeaves() {
	// A page makes one group, or three if drains are in the middle of it.
	most := len(u.pages) - len(u.unread) + 2*len(u.segs)
	u.unread = slices.Grow(u.unread, most)
	floats := u.floats(3 * u.rows * most)
	for rest := u.leaves; len(rest) > 0; {
		n := 1
		for n < len(rest) && u.estimatedWith(&rest[n], &rest[0]) {
			n++
		}
		u.estimateTokens(rest[:n], floats)
		rest, floats = rest[n:], floats[3*u.rows:]
	}
}

// estimatedWith says whether the same mean stands for two leaves: of one page, and no drains.
func (u *run) estimatedWith(x, y *leaf) bool {
	v := &u.segs[y.seg].view
	return x.page == y.page && v.IsDrain(x.i) == v.IsDrain(y.i)
}

// estimateTokens lets the unread tokens of leaves of a page stand by a mean. It uses floats as newUnread does.
func (u *run) estimateTokens(leaves []leaf, floats []float32) {
	first := &leaves[0]
	e := u.newUnread(floats, unread{page: &u.pages[first.page], scanned: true, drains: u.segs[first.seg].view.IsDrain(first.i)})
	for i := range leaves {
		x := &leaves[i]
		n := x.n - bits.OnesCount16(x.read)
		if n == 0 {
			continue
		}
		e.n += n
		grades, mass := u.grades(x, len(x.planes)), u.sums[:u.rows]
		for r := range mass {
			sum, squares := sums(u.sharesOf(x, r)) // 0 of those that were read
			mass[r] = sum
			e.mass[r] += sum
			e.ruled[r] += squares
			e.noise[r] += squares * grades[r].scatter
		}
		if u.follows && !e.drains {
			u.deviate(x, mass)
		}
		u.traceScanned(x)
	}
	if e.n == 0 {
		return
	}
	for r, sum := range e.mass {
		square := max(sum*sum, 1e-30)
		e.mass[r], e.ruled[r], e.noise[r] = u.total[r]+log(sum), e.ruled[r]/square, e.noise[r]/square
	}
	u.unread = append(u.unread, e)
}

// sharesOf returns a row's shares of a leaf's tokens.
func (u *run) sharesOf(x *leaf, r int) *[tiers.LeafTokens]float32 {
	return (*[tiers.LeafTokens]float32)(u.shares[r*u.stride+x.at:])
}

// sums adds numbers and their squares up, the even and the odd apart: additions take long.
func sums(x *[tiers.LeafTokens]float32) (sum, squares float32) {
	var s0, s1, q0, q1 float32
	for t := 0; t < len(x); t += 2 {
		s0 += x[t]
		q0 += x[t] * x[t]
		s1 += x[t+1]
		q1 += x[t+1] * x[t+1]
	}
	return s0 + s1, q0 + q1
}

// traceScanned tells of a leaf's tokens of which only keys were read.
func (u *run) traceScanned(x *leaf) {
	if u.tr.Token == nil {
		return
	}
	for r := range u.rows {
		for t := range x.n {
			if x.read>>t&1 == 0 {
				u.tr.Token(r, u.segs[x.seg].index, x.place+t, u.log[r*u.stride+x.at+t], Scanned)
			}
		}
	}
}

// finish adds what was estimated, merges everything into the query's partials
// and estimates the error.
func (u *run) finish() {
	for _, e := range u.unread {
		u.acc.Estimated += int64(e.n)
		for r := range u.rows {
			if !e.scanned {
				e.mass[r] += u.bias[r]
				u.traceEstimate(e, r)
			}
		}
	}
	u.addUnread()
	u.follow()
	mergeRotated(u.q.Partials, u.rot, u.d)
	u.estimateError()
}

// addUnread adds mean values by their masses.
func (u *run) addUnread() {
	n := len(u.unread)
	weights := u.floats(u.rows * n)
	for i, e := range u.unread {
		for r, mass := range e.mass {
			weights[r*n+i] = mass
		}
	}
	attention.Weigh(u.rot, weights, n, n)
	byPage := u.floats(u.rows * len(u.pages)) // [pages][rows]
	for i, e := range u.unread {
		for r := range u.rows {
			if !e.drains {
				byPage[e.page.index*u.rows+r] += weights[r*n+i]
			}
		}
	}
	sums, table := attention.AppendSums(nil, u.rot), u.floats(u.rows*len(u.pages))
	u.eachSegment(func(s *segmentRun, pages []page) {
		n := len(pages)
		for i, p := range pages {
			for r := range u.rows {
				table[r*n+i] = byPage[p.index*u.rows+r]
			}
		}
		s.values.AddTo(sums, table[:u.rows*n])
	})
}

// traceEstimate tells of tokens that only means stand for: they share its mass.
func (u *run) traceEstimate(e unread, r int) {
	if u.tr.Token == nil {
		return
	}
	each := e.mass[r] - float32(math.Log(float64(e.n)))
	for t := range e.n {
		u.tr.Token(r, u.segs[e.page.seg].index, e.page.i*tiers.PageTokens+t, each, Estimated)
	}
}

// estimateError estimates the relative error of the rows' outputs. Each estimated
// group errs by the spread of its values around their mean, as far as few of
// its tokens rule it, and by the error of its mass times its mean's distance
// from the output, as if groups erred independently. They do not quite, and
// keys err too: errorScale makes up for it. Audits say how well this holds.
func (u *run) estimateError() {
	outs := u.floats(u.rows * u.d)
	for r := range u.rows {
		out := outs[r*u.d : (r+1)*u.d]
		u.q.Partials[r].Output(out)
		compress.Rotate(out, u.d)
	}
	distance2 := u.distances(outs)
	for r := range u.rows {
		p, err2 := &u.q.Partials[r], 0.
		norm2 := attention.Norm2(outs[r*u.d : (r+1)*u.d])
		for _, e := range u.unread {
			share := math.Exp(float64(e.mass[r]-p.Max)) / p.Sum
			if share < 1e-6 {
				continue
			}
			dist2, massVar := norm2, float64(e.noise[r])
			if !e.drains {
				dist2 = distance2[e.page.index*u.rows+r]
			}
			if !e.scanned {
				massVar = max(u.massVar[r], massVar)
			}
			spread := u.segs[e.page.seg].values.Spread(e.page.i)
			err2 += share * share * (float64(spread*e.ruled[r]) + massVar*float64(dist2))
		}
		if norm2 > 0 {
			u.acc.Error += float32(min(1, errorScale*math.Sqrt(err2/float64(norm2)))) / float32(u.rows)
		}
	}
	u.acc.errorRows = float64(u.rows)
}

// errorScale brings estimates to the errors measured on real models, which are
// 2.2 to 4 times as large (docs/decisions/0004-budget-path.md).
const errorScale = 2.5

// Bounds on what is learned from few pages.
const (
	maxBias    = 1
	maxMassVar = 4
	// leastLearned is the least share of the softmax from which anything is learned.
	leastLearned = 1e-20
)

// calibrate learns from the weaker half of the pages that are scanned how far
// means misjudge masses: the pages that are not scanned are like them.
func (u *run) calibrate() {
	var scanned []int
	for i := range u.pages {
		if u.pages[i].scanned {
			scanned = append(scanned, i)
		}
	}
	u.bias, u.massVar = u.floats(u.rows), make([]float64, u.rows)
	found := u.floats(len(u.pages) * u.rows) // [pages][rows], mass by the scan, as a share
	for i := range u.leaves {
		x := &u.leaves[i]
		for r := range u.rows {
			sum, _ := sums(u.sharesOf(x, r))
			found[x.page*u.rows+r] += sum
		}
	}
	weak := make([]float32, len(scanned))
	for r := range u.rows {
		for i, at := range scanned {
			weak[i] = -u.pages[at].mass[r]
		}
		half := attention.Top(weak, (len(weak)+1)/2)
		estimated, sum := -inf, float32(0)
		for _, i := range half {
			estimated, sum = logAdd(estimated, u.pages[scanned[i]].mass[r]-u.total[r]), sum+found[scanned[i]*u.rows+r]
		}
		if sum < leastLearned {
			continue
		}
		u.bias[r] = min(maxBias, max(-maxBias, log(sum)-estimated))
		var err2, mass2 float64
		for _, i := range half {
			was, is := float64(exp(u.pages[scanned[i]].mass[r]+u.bias[r]-u.total[r])/sum), float64(found[scanned[i]*u.rows+r]/sum)
			err2, mass2 = err2+(is-was)*(is-was), mass2+was*was
		}
		u.massVar[r] = min(maxMassVar, err2/max(mass2, 1e-9))
	}
}

// logSum returns the log of the sum of exp(x), of which nothing is left.
func logSum(x []float32) float32 {
	top := kernels.Largest(x, -inf)
	return top + log(kernels.Weights(x, x, top))
}

// logAdd returns log(exp(a) + exp(b)).
func logAdd(a, b float32) float32 {
	if a < b {
		a, b = b, a
	}
	if math.IsInf(float64(b), -1) {
		return a
	}
	return a + float32(math.Log1p(math.Exp(float64(b-a))))
}

func log(x float32) float32 { return float32(math.Log(float64(x))) }

func exp(x float32) float32 { return float32(math.Exp(float64(x))) }
