package sparse

import (
	"context"
	"fmt"
	"slices"
	"time"

	"kvtier/attention"
	"kvtier/compress"
	"kvtier/tiers"
	"kvtier/tiers/seal"
)

// run is one group's query over the segments that are read in part.
type run struct {
	ctx  context.Context
	r    Reader
	tr   *Trace
	q    Query
	d    int
	rows int
	plan plan
	left float64 // bytes of the budget that are left, if all of them lie in RAM
	acc  Account

	segs   []*segmentRun
	norm2  []float32           // [rows], |q|^2
	total  []float32           // [rows], estimated log of the whole softmax sum
	rot    []attention.Partial // [rows], in rotated space
	unread []unread            // what was estimated, for the error

	pages  []unit
	leaves []unit
	tokens []token
	// What scanned leaves taught about summaries, [rows]: the log by which they
	// underestimate masses, and the relative variance of what is left of the error.
	bias    []float32
	massVar []float64
}

// segmentRun is what the run holds of one segment.
type segmentRun struct {
	index    int // in the caller's segments
	s        Segment
	view     seal.View
	pages    attention.Summaries
	outliers []byte
	pins     []tiers.Pin
	received float32 // share of the attention that its read tokens received, summed over heads
}

// unit is a page or a leaf under consideration.
type unit struct {
	seg   int
	i     int       // page or leaf of its head
	place int       // of its first token
	n     int       // tokens
	mass  []float32 // [rows], estimated log mass
	rank  []float32 // [rows], log weight by which it is ranked
	sum   attention.Summaries
	at    int // index in sum
	keys  []float32
	k2    []byte
	steps compress.KeySteps // of its keys, once scanned
	log   [][]float32       // [rows][n], scores of its tokens, once scanned
}

// token is one scanned token: a candidate for reading its value.
type token struct {
	seg, place int
	leaf       int // index in run.leaves; -1: an outlier
	log        []float32
	read       bool
}

func (t *token) group() group { return group{t.seg, t.leaf} }

func newRun(ctx context.Context, r Reader, segments []Segment, part []int, q Query, share float32, tr *Trace) *run {
	d := segments[part[0]].Header.HeadDim
	rows := len(q.Partials)
	u := &run{ctx: ctx, r: r, tr: tr, q: q, d: d, rows: rows,
		norm2: make([]float32, rows), total: make([]float32, rows), rot: attention.NewPartials(rows, d)}
	for i := range rows {
		u.norm2[i] = attention.Dot(u.row(i), u.row(i))
	}
	var b body
	for _, i := range part {
		v := view(segments[i], q.Head)
		u.segs = append(u.segs, &segmentRun{index: i, s: segments[i], view: v})
		b.add(v)
	}
	u.plan, u.left = planFor(share, b), float64(share)*b.full
	return u
}

func (u *run) row(i int) []float32 { return u.q.Q[i*u.d : (i+1)*u.d] }

// answer goes through the stages.
func (u *run) answer() error {
	defer u.release()
	for _, stage := range []struct {
		do func() error
		ns *int64
	}{
		{u.scorePages, &u.acc.NsScore},
		{u.scoreLeaves, &u.acc.NsScore},
		{u.scan, &u.acc.NsScan},
		{u.refine, &u.acc.NsScan},
		{u.readValues, &u.acc.NsFetch},
	} {
		start := time.Now()
		if err := stage.do(); err != nil {
			return err
		}
		*stage.ns += time.Since(start).Nanoseconds()
	}
	start := time.Now()
	u.finish()
	u.acc.NsScore += time.Since(start).Nanoseconds()
	return nil
}

// pin pins requests and keeps account.
func (u *run) pin(reqs []tiers.Request) ([]tiers.Pin, error) {
	pins, moved, err := u.r.Pin(u.ctx, reqs)
	if err != nil {
		return nil, err
	}
	u.acc.Moved.Add(moved)
	for i, r := range reqs {
		if len(r.Ranges) == 0 {
			u.left -= float64(lineBytes([]tiers.Range{{Len: len(pins[i].Ranges[0])}}))
		} else {
			u.left -= float64(lineBytes(r.Ranges))
		}
	}
	return pins, nil
}

func (u *run) release() {
	for _, s := range u.segs {
		releaseAll(s.pins, min(1, s.received/float32(u.rows)))
	}
}

func (u *run) request(s *segmentRun, p tiers.Plane, ranges ...tiers.Range) tiers.Request {
	return tiers.Request{Header: s.s.Header, Head: u.q.Head, Plane: p, Ranges: ranges}
}

// scorePages scores all pages and the outliers' keys, and estimates the
// normaliser from them and the exact zone.
func (u *run) scorePages() error {
	var reqs []tiers.Request
	for _, s := range u.segs {
		reqs = append(reqs, u.request(s, tiers.PlanePages))
		if s.view.Info.Outliers > 0 {
			reqs = append(reqs, u.request(s, tiers.PlaneOutliers))
		}
	}
	pins, err := u.pin(reqs)
	if err != nil {
		return err
	}
	for _, s := range u.segs { // all of them, before anything can fail
		n := 1 + min(1, s.view.Info.Outliers)
		s.pins, pins = append(s.pins, pins[:n]...), pins[n:]
	}
	for i, s := range u.segs {
		s.pages, _ = attention.ParseSummaries(s.pins[0].Ranges[0], u.d, s.view.Pages())
		for p := range s.view.Pages() {
			u.pages = append(u.pages, u.unit(unit{seg: i, i: p, place: p * tiers.PageTokens, n: s.view.PageTokens(p), sum: s.pages, at: p}))
		}
		if s.view.Info.Outliers > 0 {
			s.outliers = s.pins[1].Ranges[0]
			if err := u.scoreOutliers(i, s); err != nil {
				return err
			}
		}
	}
	u.acc.Pages, u.acc.PagesTotal = int64(len(u.pages)), int64(len(u.pages))
	for r := range u.rows {
		u.total[r] = u.q.Partials[r].LSE()
		for _, p := range u.pages {
			u.total[r] = logAdd(u.total[r], p.mass[r])
		}
		for _, t := range u.tokens {
			u.total[r] = logAdd(u.total[r], t.log[r])
		}
	}
	return nil
}

// unit scores one page or leaf for every row.
func (u *run) unit(x unit) unit {
	log := make([]float32, 2*u.rows)
	x.mass, x.rank = log[:u.rows], log[u.rows:]
	for r := range u.rows {
		score, spread := attention.Softcap(x.sum.Score(x.at, u.row(r)), u.q.Softcap), u.spread(x.sum, x.at, r)
		x.mass[r] = attention.Mass(x.n, score, spread)
		x.rank[r] = attention.Presence(x.n, score, spread)
	}
	return x
}

func (u *run) spread(s attention.Summaries, at, row int) float32 {
	return s.Spread(at) * u.norm2[row]
}

func (u *run) scoreOutliers(i int, s *segmentRun) error {
	n := s.view.Info.Outliers
	k := make([]float32, n*u.d)
	if err := s.view.OutlierKeys(k, s.outliers); err != nil {
		return fmt.Errorf("segment %v: %w: %w", s.s.Header.ID, tiers.ErrCorrupt, err)
	}
	for t := range n {
		u.tokens = append(u.tokens, token{seg: i, place: s.view.Info.Body + t, leaf: -1, log: u.scores(k[t*u.d : (t+1)*u.d])})
	}
	u.acc.Scanned += int64(n)
	return nil
}

// scores returns the score of one key for every row.
func (u *run) scores(k []float32) []float32 {
	out := make([]float32, u.rows)
	for r := range out {
		out[r] = attention.Softcap(attention.Dot(u.row(r), k), u.q.Softcap)
	}
	return out
}

// share ranks a log weight given by row: its share of the softmax, summed over
// the group's heads.
func (u *run) share(log func(row int) float32) (sum float32) {
	for r := range u.rows {
		sum += exp(log(r) - u.total[r])
	}
	return sum
}

// best returns the indices of the units that most probably hold a strong token.
func (u *run) best(units []unit, count int) []int {
	rank := make([]float32, len(units))
	for i, x := range units {
		rank[i] = u.share(func(r int) float32 { return x.rank[r] })
	}
	return attention.Top(rank, count)
}

// count is a share of n, at least 1, at most n.
func count(share float64, n int) int {
	return min(n, max(1, int(share*float64(n))))
}

// scoreLeaves scores the leaves of the best pages; the other pages are estimated.
func (u *run) scoreLeaves() error {
	chosen := u.best(u.pages, count(u.plan.pages, len(u.pages)))
	ranges := make([][]tiers.Range, len(u.segs))
	pages := make([][]int, len(u.segs))
	picked := make([]bool, len(u.pages))
	for _, c := range chosen {
		p := u.pages[c]
		picked[c] = true
		pages[p.seg] = append(pages[p.seg], p.i)
		ranges[p.seg] = append(ranges[p.seg], u.segs[p.seg].view.LeafSummaries(p.i))
	}
	for i, p := range u.pages {
		if !picked[i] {
			u.estimateUnit(p)
		}
	}
	return u.each(tiers.PlaneLeaves, ranges, func(seg int, b [][]byte) error {
		s := u.segs[seg]
		for i, p := range pages[seg] {
			first, end := s.view.LeavesOf(p)
			sum, _ := attention.ParseSummaries(b[i], u.d, end-first)
			for l := first; l < end; l++ {
				u.leaves = append(u.leaves, u.unit(unit{seg: seg, i: l, place: l * tiers.LeafTokens, n: s.view.LeafTokens(l), sum: sum, at: l - first}))
			}
		}
		u.acc.Leaves = int64(len(u.leaves))
		return nil
	})
}

// each pins ranges of one plane, by segment, and hands their bytes over; they
// stay pinned until the run ends.
func (u *run) each(p tiers.Plane, ranges [][]tiers.Range, use func(seg int, b [][]byte) error) error {
	var reqs []tiers.Request
	var segs []int
	for i, r := range ranges {
		if len(r) > 0 {
			reqs = append(reqs, u.request(u.segs[i], p, r...))
			segs = append(segs, i)
		}
	}
	if len(reqs) == 0 {
		return nil
	}
	pins, err := u.pin(reqs)
	if err != nil {
		return err
	}
	for i, seg := range segs {
		u.segs[seg].pins = append(u.segs[seg].pins, pins[i])
	}
	for i, seg := range segs {
		if err := use(seg, pins[i].Ranges); err != nil {
			return fmt.Errorf("segment %v: %w: %w", u.segs[seg].s.Header.ID, tiers.ErrCorrupt, err)
		}
	}
	return nil
}

// bodyLeaves is the number of leaves of all segments.
func (u *run) bodyLeaves() (n int) {
	for _, s := range u.segs {
		n += s.view.Leaves()
	}
	return n
}

// scan reads the 2-bit keys of the best leaves; the other leaves are estimated.
func (u *run) scan() error {
	chosen := u.best(u.leaves, count(u.plan.leaves, u.bodyLeaves()))
	u.leaves = u.keep(u.leaves, chosen, u.estimateUnit)
	steps, err := u.steps()
	if err != nil {
		return err
	}
	c := newCalibration(u)
	err = u.eachLeaf(tiers.PlaneK2, u.leaves, func(x *unit, b []byte) {
		x.k2, x.steps = b, steps[stepKey{x.seg, x.i * tiers.LeafTokens / tiers.StepTokens}]
		x.keys = make([]float32, tiers.LeafTokens*u.d)
		compress.UnpackKeys(x.keys, b, nil, nil, u.d, x.steps)
		u.scoreLeaf(x)
		u.acc.Scans++
		u.acc.Scanned += int64(x.n)
	})
	c.finish(u)
	return err
}

// keep returns the chosen units and tells rest of the others.
func (u *run) keep(units []unit, chosen []int, rest func(unit)) []unit {
	out := make([]unit, 0, len(chosen))
	for i := range units {
		if len(chosen) > 0 && chosen[0] == i {
			out = append(out, units[i])
			chosen = chosen[1:]
		} else {
			rest(units[i])
		}
	}
	return out
}

type stepKey struct{ seg, group int }

// steps reads the key steps of all chosen leaves.
func (u *run) steps() (map[stepKey]compress.KeySteps, error) {
	ranges := make([][]tiers.Range, len(u.segs))
	groups := make([][]int, len(u.segs))
	for _, x := range u.leaves {
		g := x.i * tiers.LeafTokens / tiers.StepTokens
		if n := len(groups[x.seg]); n == 0 || groups[x.seg][n-1] != g {
			groups[x.seg] = append(groups[x.seg], g)
			ranges[x.seg] = append(ranges[x.seg], u.segs[x.seg].view.StepsOf(x.i))
		}
	}
	out := make(map[stepKey]compress.KeySteps)
	err := u.each(tiers.PlaneSteps, ranges, func(seg int, b [][]byte) error {
		for i, g := range groups[seg] {
			s, err := compress.ParseKeySteps(b[i], u.d, u.segs[seg].view.Info.KeyExp)
			if err != nil {
				return err
			}
			out[stepKey{seg, g}] = s
		}
		return nil
	})
	return out, err
}

// eachLeaf pins the same plane of leaves, which are ordered by segment.
func (u *run) eachLeaf(p tiers.Plane, leaves []unit, use func(x *unit, b []byte)) error {
	ranges := make([][]tiers.Range, len(u.segs))
	first := make([]int, len(u.segs))
	for i, x := range leaves {
		if len(ranges[x.seg]) == 0 {
			first[x.seg] = i
		}
		ranges[x.seg] = append(ranges[x.seg], u.segs[x.seg].view.LeafKeys(x.i))
	}
	return u.each(p, ranges, func(seg int, b [][]byte) error {
		for i := range b {
			use(&leaves[first[seg]+i], b[i])
		}
		return nil
	})
}

// scoreLeaf scores the leaf's tokens from its keys as they are known now. From
// then on it is ranked by its strongest token.
func (u *run) scoreLeaf(x *unit) {
	if x.log == nil {
		x.log = make([][]float32, u.rows)
		all := make([]float32, u.rows*x.n)
		for r := range x.log {
			x.log[r] = all[r*x.n : (r+1)*x.n]
		}
	}
	for r, log := range x.log {
		q := u.row(r)
		for t := range log {
			log[t] = attention.Softcap(attention.Dot(q, x.keys[t*u.d:(t+1)*u.d]), u.q.Softcap)
		}
		x.mass[r], x.rank[r] = logSum(log), slices.Max(log)
	}
}

// refine reads the next 2 bits of the leaves with the strongest tokens; the
// others stand as scanned.
func (u *run) refine() error {
	chosen := u.best(u.leaves, count(u.plan.refine, u.bodyLeaves()))
	u.leaves = u.keep(u.leaves, chosen, func(x unit) {
		u.estimateUnit(x)
		u.trace(x, Scanned)
	})
	return u.eachLeaf(tiers.PlaneK4, u.leaves, func(x *unit, b []byte) {
		compress.UnpackKeys(x.keys, x.k2, b, nil, u.d, x.steps)
		u.scoreLeaf(x)
		u.acc.Refined++
	})
}

func (u *run) trace(x unit, how How) {
	if u.tr.Token == nil {
		return
	}
	for r := range u.rows {
		for t, s := range x.log[r] {
			u.tr.Token(r, u.segs[x.seg].index, x.place+t, s, how)
		}
	}
}
