package sparse

import (
	"math"
	"slices"

	"kvtier/attention"
	"kvtier/compress"
)

// group is a leaf of the run, or with leaf -1 the outliers of a segment.
type group struct{ seg, leaf int }

// unread is a group of tokens that stands in the answer by its mean.
type unread struct {
	n       int       // tokens
	mass    []float32 // [rows], log
	value   []float32 // [d], mean, rotated
	vspread float32   // mean |v - mean|^2
	spread  []float32 // [rows], variance of the score; nil: scores are known
	seg     int       // with spread: where its tokens lie, from place on
	place   int
	ruled   []float32 // [rows], if scores are known: log of the summed squares of the weights
}

// estimateUnit lets a page or leaf stand by its summary.
func (u *run) estimateUnit(x unit) {
	e := unread{n: x.n, mass: x.mass, value: make([]float32, u.d), vspread: x.sum.ValueSpread(x.at)}
	x.sum.Value(e.value, x.at)
	if x.log == nil {
		e.spread = make([]float32, u.rows)
		e.seg, e.place = x.seg, x.place
		for r := range e.spread {
			e.spread[r] = u.spread(x.sum, x.at, r)
		}
	} else {
		e.ruled = make([]float32, u.rows)
		twice := make([]float32, x.n)
		for r, log := range x.log {
			for t, s := range log {
				twice[t] = 2 * s
			}
			e.ruled[r] = logSum(twice)
		}
	}
	u.estimate(e)
}

func (u *run) estimate(e unread) {
	u.acc.Estimated += int64(e.n)
	u.unread = append(u.unread, e)
}

// estimateRest lets the tokens that were scanned at 4 bits or more, but whose
// values were not read, stand by the mean of their group. Taking out of the mean
// what was read magnifies its rounding, and measured no better.
func (u *run) estimateRest() {
	rest := make(map[group]*unread)
	var order []group // so that sums do not depend on the map's order
	for i := range u.tokens {
		t := &u.tokens[i]
		if t.read {
			continue
		}
		e := rest[t.group()]
		if e == nil {
			e = &unread{mass: make([]float32, u.rows), ruled: make([]float32, u.rows)}
			for r := range e.mass {
				e.mass[r], e.ruled[r] = float32(math.Inf(-1)), float32(math.Inf(-1))
			}
			rest[t.group()] = e
			order = append(order, t.group())
		}
		e.n++
		for r := range e.mass {
			e.mass[r] = logAdd(e.mass[r], t.log[r])
			e.ruled[r] = logAdd(e.ruled[r], 2*t.log[r])
			if u.tr.Token != nil {
				u.tr.Token(r, u.segs[t.seg].index, t.place, t.log[r], Scanned)
			}
		}
	}
	for _, g := range order {
		e := rest[g]
		sum, at := u.summary(g)
		e.value, e.vspread = make([]float32, u.d), sum.ValueSpread(at)
		sum.Value(e.value, at)
		u.estimate(*e)
	}
}

func (u *run) summary(g group) (attention.Summaries, int) {
	if g.leaf >= 0 {
		x := u.leaves[g.leaf]
		return x.sum, x.at
	}
	s := u.segs[g.seg]
	return s.view.OutlierSummary(s.outliers), 0
}

// finish adds what was estimated, merges everything into the query's partials
// and estimates the error.
func (u *run) finish() {
	for _, e := range u.unread {
		for r := range u.rows {
			if e.spread != nil {
				e.mass[r] += u.bias[r]
				u.traceEstimate(e, r)
			}
			u.rot[r].Add(e.mass[r], e.value)
		}
	}
	mergeRotated(u.q.Partials, u.rot, u.d)
	for r := range u.rows {
		u.acc.Error += u.rowError(&u.q.Partials[r], r) / float32(u.rows)
	}
	u.acc.errorRows = float64(u.rows)
}

// traceEstimate tells of tokens that only a summary stands for: they share its mass.
func (u *run) traceEstimate(e unread, r int) {
	if u.tr.Token == nil {
		return
	}
	each := e.mass[r] - float32(math.Log(float64(e.n)))
	for t := range e.n {
		u.tr.Token(r, u.segs[e.seg].index, e.place+t, each, Estimated)
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
		var ruled, massVar float64
		if e.ruled != nil {
			ruled = math.Exp(float64(e.ruled[r] - 2*e.mass[r]))
		} else {
			s := float64(min(e.spread[r], 4))
			ruled = min(1, math.Exp(s)/float64(e.n))
			massVar = max(u.massVar[r], min(1, (math.Exp(s)-1)/float64(e.n)))
		}
		err2 += p * p * (float64(e.vspread)*ruled + massVar*dist2)
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

// calibration learns from the weaker half of the leaves that are scanned how
// far summaries misjudge masses: the leaves that are not scanned are like them.
type calibration struct{ estimated [][]float32 } // [leaf][rows], log

func newCalibration(u *run) calibration {
	c := calibration{make([][]float32, len(u.leaves))}
	for i, x := range u.leaves {
		c.estimated[i] = slices.Clone(x.mass)
	}
	return c
}

// Bounds on what is learned from few leaves.
const (
	maxBias    = 1
	maxMassVar = 4
)

func (c calibration) finish(u *run) {
	u.bias, u.massVar = make([]float32, u.rows), make([]float64, u.rows)
	weak := make([]float32, len(u.leaves))
	for r := range u.rows {
		for i := range weak {
			weak[i] = -c.estimated[i][r]
		}
		estimated, scanned := float32(math.Inf(-1)), float32(math.Inf(-1))
		half := attention.Top(weak, (len(weak)+1)/2)
		for _, i := range half {
			estimated = logAdd(estimated, c.estimated[i][r])
			scanned = logAdd(scanned, u.leaves[i].mass[r])
		}
		u.bias[r] = min(maxBias, max(-maxBias, scanned-estimated))
		var err2, mass2 float64
		for _, i := range half {
			was, is := exp(c.estimated[i][r]+u.bias[r]-scanned), exp(u.leaves[i].mass[r]-scanned)
			err2, mass2 = err2+float64((is-was)*(is-was)), mass2+float64(was*was)
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

// logSum returns the log of the sum of exp(x).
func logSum(x []float32) float32 {
	hi, sum := slices.Max(x), float32(0)
	for _, v := range x {
		sum += exp(v - hi)
	}
	return hi + float32(math.Log(float64(sum)))
}

func exp(x float32) float32 { return float32(math.Exp(float64(x))) }
