package sparse

import (
	"math"
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
	e, _ := u.newUnread(make([]float32, 3*u.rows), make([]float32, u.d), s.values.Spread(p.i))
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
	page, none := -1, make([]float32, u.d)
	var value []float32 // of the page
	u.unread = slices.Grow(u.unread, len(u.leaves))
	floats := make([]float32, 3*u.rows*len(u.leaves))
	for i := range u.leaves {
		x := &u.leaves[i]
		s, at := u.segs[x.seg], u.pages[x.page].i
		if x.page != page { // a page's leaves come together
			page, value = x.page, make([]float32, u.d)
			s.values.Row(value, at)
		}
		var e unread
		e, floats = u.newUnread(floats, value, s.values.Spread(at))
		for t := range x.n {
			if !x.read[t] {
				e.n++
			}
		}
		grades := u.grades(x, len(x.planes))
		for r, share := range x.share {
			var sum, squares float32
			for t, w := range share {
				if !x.read[t] {
					sum, squares = sum+w, squares+w*w
					if u.tr.Token != nil {
						u.tr.Token(r, s.index, x.place+t, x.log[r][t], Scanned)
					}
				}
			}
			e.mass[r], e.ruled[r] = u.total[r]+log(sum), squares/max(sum*sum, 1e-30)
			e.noise[r] = min(1, exp(min(grades[r].noise, 4))-1) * e.ruled[r]
		}
		if e.n > 0 {
			if s.view.IsDrain(x.i) { // their values are next to nothing
				e.value = none
			} else if u.follows {
				u.deviate(x)
			}
			u.unread = append(u.unread, e)
		}
	}
}

// newUnread takes room for what it holds by row from floats, and returns what is left of it.
func (u *run) newUnread(floats, value []float32, spread float32) (unread, []float32) {
	n := u.rows
	return unread{value: value, vspread: spread, mass: floats[:n], ruled: floats[n : 2*n], noise: floats[2*n : 3*n]}, floats[3*n:]
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
	found := make([][]float32, len(u.pages)) // [rows], mass by the scan, as a share
	for i := range u.leaves {
		x := &u.leaves[i]
		if found[x.page] == nil {
			found[x.page] = make([]float32, u.rows)
		}
		for r, share := range x.share {
			for _, w := range share {
				found[x.page][r] += w
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
			estimated, sum = logAdd(estimated, u.pages[scanned[i]].mass[r]-u.total[r]), sum+found[scanned[i]][r]
		}
		if sum < leastLearned {
			continue
		}
		u.bias[r] = min(maxBias, max(-maxBias, log(sum)-estimated))
		var err2, mass2 float64
		for _, i := range half {
			was, is := float64(exp(u.pages[scanned[i]].mass[r]+u.bias[r]-u.total[r])/sum), float64(found[scanned[i]][r]/sum)
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
