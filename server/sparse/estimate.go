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

// unread is a group of tokens that stands in the answer by its mean.
type unread struct {
	n       int       // tokens
	mass    []float32 // [rows], log
	value   []float32 // [d], mean, rotated
	vspread float32   // mean |v - mean|^2
	ruled   []float32 // [rows], the share of the squares: 1/n if all weigh the same, 1 if one rules
	noise   []float32 // [rows], relative variance of the mass
	page    *page     // if it is one of which nothing but means were read
}

// estimatePage lets a page stand by its means.
func (u *run) estimatePage(p *page) {
	s := u.segs[p.seg]
	e := newUnread(u.rows, u.d, s.values.Spread(p.i))
	e.n, e.mass, e.page = p.n, p.mass, p
	s.values.Row(e.value, p.i)
	for r := range u.rows {
		spread := min(s.keys.Spread(p.i)*u.norm2[r], 4)
		e.ruled[r] = min(1, exp(spread)/float32(p.n))
		e.noise[r] = min(1, (exp(spread)-1)/float32(p.n))
	}
	u.unread = append(u.unread, e)
}

// estimateLeaves lets the tokens whose keys were scanned, but whose values were
// not read, stand by the mean value of their page and by what their keys say of
// how they deviate from it. Mean values of leaves hardly
// did better; taking out of the mean what was read magnifies its rounding, and
// measured no better.
func (u *run) estimateLeaves() {
	u.unread = slices.Grow(u.unread, len(u.pages))
	for rest := u.leaves; len(rest) > 0; {
		n := 1
		for n < len(rest) && u.estimatedWith(&rest[n], &rest[0]) {
			n++
		}
		u.estimateTokens(rest[:n])
		rest = rest[n:]
	}
}

// estimatedWith says whether the same mean stands for two leaves: of one page, and no drains.
func (u *run) estimatedWith(x, y *leaf) bool {
	v := &u.segs[y.seg].view
	return x.page == y.page && v.IsDrain(x.i) == v.IsDrain(y.i)
}

// estimateTokens lets the unread tokens of leaves of a page stand by a mean.
func (u *run) estimateTokens(leaves []leaf) {
	s, at := u.segs[leaves[0].seg], u.pages[leaves[0].page].i
	e := newUnread(u.rows, u.d, s.values.Spread(at))
	drain := s.view.IsDrain(leaves[0].i)
	if !drain { // their values are next to nothing
		s.values.Row(e.value, at)
	}
	for i := range leaves {
		x := &leaves[i]
		n := x.n - bits.OnesCount16(x.read)
		if n == 0 {
			continue
		}
		e.n += n
		grades, mass := u.grades(x, len(x.planes)), u.sums[:u.rows]
		for r := range mass {
			var sum, squares float32
			for _, w := range u.shares[r*u.stride+x.at:][:tiers.LeafTokens] { // 0 of those that were read
				sum, squares = sum+w, squares+w*w
			}
			mass[r] = sum
			e.mass[r] += sum
			e.ruled[r] += squares
			e.noise[r] += squares * grades[r].scatter
		}
		if u.follows && !drain {
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

func newUnread(rows, d int, vspread float32) unread {
	all := make([]float32, 3*rows+d)
	byRow := func(i int) []float32 { return all[i*rows : (i+1)*rows : (i+1)*rows] }
	return unread{mass: byRow(0), ruled: byRow(1), noise: byRow(2), value: all[3*rows:], vspread: vspread}
}

// finish adds what was estimated, merges everything into the query's partials
// and estimates the error.
func (u *run) finish() {
	for _, e := range u.unread {
		u.acc.Estimated += int64(e.n)
		for r := range u.rows {
			if e.page != nil {
				e.mass[r] += u.bias[r]
				u.traceEstimate(e, r)
			}
		}
	}
	u.addUnread()
	u.follow()
	mergeRotated(u.q.Partials, u.rot, u.d)
	for r := range u.rows {
		u.acc.Error += u.rowError(&u.q.Partials[r], r) / float32(u.rows)
	}
	u.acc.errorRows = float64(u.rows)
}

// addUnread adds mean values by their masses, so many at a time.
func (u *run) addUnread() {
	const block = 64
	sums := attention.AppendSums(nil, u.rot)
	scores, values := make([]float32, u.rows*block), make([]float32, block*u.d)
	for list := u.unread; len(list) > 0; list = list[min(block, len(list)):] {
		n := min(block, len(list))
		for i, e := range list[:n] {
			copy(values[i*u.d:], e.value)
			for r, mass := range e.mass {
				scores[r*block+i] = mass
			}
		}
		attention.Weigh(u.rot, scores, block, n)
		kernels.Axpys(sums, scores, block, values[:n*u.d], u.d, u.d)
	}
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

// rowError estimates the relative error of one row's output. Each estimated
// group errs by the spread of its values around their mean, as far as few of
// its tokens rule it, and by the error of its mass times its mean's distance
// from the output, as if groups erred independently. They do not quite, and
// keys err too: errorScale makes up for it. Audits say how well this holds.
func (u *run) rowError(merged *attention.Partial, r int) float32 {
	out := make([]float32, u.d)
	merged.Output(out)
	compress.Rotate(out, u.d)
	var err2 float64
	for _, e := range u.unread {
		p := math.Exp(float64(e.mass[r]-merged.Max)) / merged.Sum
		if p < 1e-6 {
			continue
		}
		var dist2 float64
		for i, v := range e.value {
			d := float64(v - out[i])
			dist2 += d * d
		}
		massVar := float64(e.noise[r])
		if e.page != nil {
			massVar = max(u.massVar[r], massVar)
		}
		err2 += p * p * (float64(e.vspread*e.ruled[r]) + massVar*dist2)
	}
	norm2 := float64(attention.Dot(out, out))
	if norm2 == 0 {
		return 0
	}
	return float32(min(1, errorScale*math.Sqrt(err2/norm2)))
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
	u.bias, u.massVar = make([]float32, u.rows), make([]float64, u.rows)
	found := make([]float32, len(u.pages)*u.rows) // [pages][rows], mass by the scan, as a share
	for i := range u.leaves {
		x := &u.leaves[i]
		for r := range u.rows {
			for _, w := range u.shares[r*u.stride+x.at:][:tiers.LeafTokens] {
				found[x.page*u.rows+r] += w
			}
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
