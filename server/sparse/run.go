package sparse

import (
	"context"
	"fmt"
	"time"

	"kvtier/attention"
	"kvtier/compress"
	"kvtier/kernels"
	"kvtier/tiers"
	"kvtier/tiers/seal"
)

// run is one group's query over the segments that are read in part.
type run struct {
	ctx     context.Context
	r       Reader
	tr      *Trace
	q       Query
	d       int
	rows    int
	scanned int     // pages
	left    float64 // bytes of the budget that are left, if all of them lie in RAM
	acc     Account

	segs    []*segmentRun
	norm2   []float32           // [rows], |q|^2
	total   []float32           // [rows], estimated log of the whole softmax sum
	rot     []attention.Partial // [rows], in rotated space
	follows bool                // the map of values is read
	values  *attention.ValueMap // how values follow keys
	unread  []unread            // what was estimated, for the error

	keys   []float32 // [16][d], those of one leaf
	scores []float32 // [rows][16], those of one leaf
	row2   []float32 // [2][d], scratch
	rest   []float32 // [rows], see unknown
	restOf restOf

	pages  []page
	leaves []leaf // of the pages that are scanned
	tokens []token
	// What scanned pages taught about their means, [rows]: the log by which they
	// underestimate masses, and the relative variance of what is left of the error.
	bias    []float32
	massVar []float64
}

// segmentRun is what the run holds of one segment.
type segmentRun struct {
	index        int // in the caller's segments
	s            Segment
	view         seal.View
	keys, values attention.Means // of pages
	pins         []tiers.Pin
	received     float32 // share of the attention that its read tokens received, summed over heads
	codes        *codes  // once any of its pages is scanned
	// deviation is by how much the keys of unread tokens deviate from their pages'
	// means, each times its share: [rows][d], channels in stored order.
	deviation []float32
}

// page is 64 tokens under consideration.
type page struct {
	seg, i  int
	n       int       // tokens
	mass    []float32 // [rows], estimated log mass
	rank    []float32 // [rows], log weight by which it is ranked
	scatter []float32 // [rows], mean square of its values' distance from their mean, over the output's square
	far     []float32 // [rows], the same from the output
}

// token is a candidate for reading its value.
type token struct{ leaf, t int } // index in run.leaves, and in the leaf

func newRun(ctx context.Context, r Reader, segments []Segment, part []int, q Query, share float32, tr *Trace) *run {
	d := segments[part[0]].Header.HeadDim
	rows := len(q.Partials)
	u := &run{ctx: ctx, r: r, tr: tr, q: q, d: d, rows: rows,
		norm2: make([]float32, rows), total: make([]float32, rows), rot: attention.NewPartials(rows, d),
		keys: make([]float32, tiers.LeafTokens*d), scores: make([]float32, rows*tiers.LeafTokens),
		row2: make([]float32, 2*d), rest: make([]float32, rows)}
	for i := range rows {
		u.norm2[i] = attention.Dot(u.row(i), u.row(i))
	}
	var b body
	for _, i := range part {
		v := view(segments[i], q.Head)
		u.segs = append(u.segs, &segmentRun{index: i, s: segments[i], view: v})
		b.add(v)
	}
	u.follows = b.withMap(share)
	u.scanned, u.left = scannedPages(share, b), float64(share)*b.full
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
		{u.scan, &u.acc.NsScore},
		{func() error { return u.refine(1) }, &u.acc.NsScan},
		{func() error { return u.refine(2) }, &u.acc.NsScan},
		{func() error { return u.refine(3) }, &u.acc.NsScan},
		{func() error { return u.refine(4) }, &u.acc.NsScan},
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
			u.left -= float64(tiers.LineBytes([]tiers.Range{{Len: len(pins[i].Ranges[0])}}))
		} else {
			u.left -= float64(tiers.LineBytes(r.Ranges))
		}
	}
	return pins, nil
}

func (u *run) release() {
	for _, s := range u.segs {
		releaseAll(s.pins, min(1, s.received/float32(u.rows)))
	}
}

// each pins ranges of one plane, by segment, and hands their bytes over; they
// stay pinned until the run ends.
func (u *run) each(p tiers.Plane, ranges [][]tiers.Range, use func(seg int, b [][]byte) error) error {
	var reqs []tiers.Request
	var segs []int
	for i, r := range ranges {
		if len(r) > 0 {
			reqs = append(reqs, tiers.Request{Header: u.segs[i].s.Header, Head: u.q.Head, Plane: p, Ranges: r})
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
	for i, seg := range segs { // all of them, before anything can fail
		u.segs[seg].pins = append(u.segs[seg].pins, pins[i])
	}
	for i, seg := range segs {
		if err := use(seg, pins[i].Ranges); err != nil {
			return fmt.Errorf("segment %v: %w: %w", u.segs[seg].s.Header.ID, tiers.ErrCorrupt, err)
		}
	}
	return nil
}

// scorePages scores all pages, and estimates the normaliser from them and the
// exact zone.
func (u *run) scorePages() error {
	ranges := make([][]tiers.Range, len(u.segs))
	for i, s := range u.segs {
		ranges[i] = []tiers.Range{{Len: 2 * attention.MeansBytes(s.view.Pages(), u.d)}}
	}
	err := u.each(tiers.PlanePages, ranges, func(seg int, b [][]byte) error {
		s := u.segs[seg]
		s.keys, s.values = s.view.PageMeans(b[0])
		u.scoreMeans(seg)
		return nil
	})
	if err != nil {
		return err
	}
	if u.follows {
		if err := u.readMap(); err != nil {
			return err
		}
	}
	u.acc.Pages, u.acc.PagesTotal = int64(len(u.pages)), int64(len(u.pages))
	for r := range u.rows {
		u.total[r] = u.q.Partials[r].LSE()
		for _, p := range u.pages {
			u.total[r] = logAdd(u.total[r], p.mass[r])
		}
	}
	u.judge()
	return nil
}

// scoreMeans adds a segment's pages to those under consideration.
func (u *run) scoreMeans(seg int) {
	s := u.segs[seg]
	pages := s.view.Pages()
	scores, x := make([]float32, u.rows*pages), make([]float32, 4*u.rows*pages)
	next := func() (row []float32) {
		row, x = x[:u.rows], x[u.rows:]
		return row
	}
	s.keys.Scores(scores, u.q.Q, 0, pages)
	for i := range pages {
		p := page{seg: seg, i: i, n: s.view.PageTokens(i), mass: next(), rank: next(), scatter: next(), far: next()}
		for r := range u.rows {
			score, spread := attention.Softcap(scores[r*pages+i], u.q.Softcap), s.keys.Spread(i)*u.norm2[r]
			p.mass[r] = attention.Mass(p.n, score, spread)
			p.rank[r] = attention.Presence(p.n, score, spread)
		}
		u.pages = append(u.pages, p)
	}
}

// share ranks a log weight given by row: its share of the softmax, summed over
// the group's heads.
func (u *run) share(log func(row int) float32) (sum float32) {
	for r := range u.rows {
		sum += exp(log(r) - u.total[r])
	}
	return sum
}

// outlierPlanes is how many planes of outliers' keys are always read: nothing
// else says which of them matter.
const outlierPlanes = 3

// scan reads the first bits of all keys in the pages that most probably hold a
// strong token, and in pages of outliers; the other pages are estimated.
func (u *run) scan() error {
	rank := make([]float32, len(u.pages))
	for i, p := range u.pages {
		rank[i] = u.share(func(r int) float32 { return p.rank[r] })
		if u.segs[p.seg].view.Outliers(p.i) {
			rank[i] = inf
		}
	}
	chosen := attention.Top(rank, u.scanned)
	u.leaves = make([]leaf, 0, len(chosen)*tiers.PageTokens/tiers.LeafTokens)
	for i, at := 0, 0; i < len(u.pages); i++ {
		p := &u.pages[i]
		if at == len(chosen) || chosen[at] != i {
			u.estimatePage(p)
			continue
		}
		at++
		first, end := u.segs[p.seg].view.LeavesOf(p.i)
		for l := first; l < end; l++ {
			u.leaves = append(u.leaves, u.newLeaf(i, l))
		}
	}
	if err := u.readSteps(); err != nil {
		return err
	}
	all := make([]int, len(u.leaves))
	for i := range all {
		all[i] = i
	}
	u.acc.Leaves = int64(len(all))
	if err := u.readKeys(0, all); err != nil {
		return err
	}
	var outliers []int
	for i := range u.leaves {
		if x := &u.leaves[i]; u.segs[x.seg].view.Outliers(u.pages[x.page].i) {
			outliers = append(outliers, i)
		}
	}
	for plane := 1; plane < outlierPlanes; plane++ {
		if err := u.readKeys(plane, outliers); err != nil {
			return err
		}
	}
	u.normalise()
	for i := range u.leaves {
		u.weigh(&u.leaves[i])
	}
	u.calibrate(chosen)
	return nil
}

// refine reads the next plane of keys of the leaves where that is worth more
// than anything else that the rest of the budget can buy.
func (u *run) refine(plane int) error {
	bytes := compress.KeyPlaneBytes(u.d)
	var items []item
	var candidates []int
	for i := range u.leaves {
		x := &u.leaves[i]
		if len(x.planes) < plane {
			continue // what was not worth the plane before, or has no more
		}
		if len(x.planes) == plane && plane < x.most {
			candidates = append(candidates, i)
		}
		for p := len(x.planes); p < x.most; p++ {
			items = append(items, item{x.keyGain[p], float32(bytes[p])})
		}
		for t := range x.n {
			items = append(items, item{x.valueGain[t], u.valueBytes()})
		}
	}
	least := threshold(items, u.left)
	var chosen []int
	for _, i := range candidates {
		if u.leaves[i].keyGain[plane]/float32(bytes[plane]) >= least {
			chosen = append(chosen, i)
		}
	}
	if plane == 1 {
		u.acc.Scans = int64(len(chosen))
	} else if plane == 3 {
		u.acc.Refined = int64(len(chosen))
	}
	if err := u.readKeys(plane, chosen); err != nil {
		return err
	}
	for _, i := range chosen {
		u.weigh(&u.leaves[i])
	}
	return nil
}

// valueBytes is about what reading one value costs: its row, and a share of the
// line that holds its scale.
func (u *run) valueBytes() float32 { return float32(lines(compress.ValueRowBytes(u.d))) + 32 }

// aheadLeaves is how many leaves before their use keys are fetched into the cache.
const aheadLeaves = 8

// readKeys reads a plane of the chosen leaves, which are in order of place, and
// scores their tokens anew.
func (u *run) readKeys(plane int, chosen []int) error {
	ranges := make([][]tiers.Range, len(u.segs))
	bySeg := make([][]int, len(u.segs))
	from := tiers.KeyPlanes[plane]
	if from == tiers.PlaneK8 {
		from = tiers.PlaneDrains
	}
	for _, i := range chosen {
		x := &u.leaves[i]
		bySeg[x.seg] = append(bySeg[x.seg], i)
		at := u.segs[x.seg].view.LeafKeys(plane, x.i)
		if from == tiers.PlaneDrains {
			at = u.segs[x.seg].view.DrainKeys()
		}
		ranges[x.seg] = append(ranges[x.seg], at)
	}
	if plane == 0 {
		for _, i := range chosen {
			u.acc.Scanned += int64(u.leaves[i].n)
		}
	}
	return u.each(from, ranges, func(seg int, b [][]byte) error {
		for i, at := range bySeg[seg] {
			kernels.Prefetch(b[min(i+aheadLeaves, len(b)-1)])
			u.leaves[at].planes = append(u.leaves[at].planes, b[i])
			u.scoreLeaf(&u.leaves[at])
		}
		return nil
	})
}

// readSteps reads how the keys of all scanned leaves are coded.
func (u *run) readSteps() error {
	ranges := make([][]tiers.Range, len(u.segs))
	groups := make([][]int, len(u.segs))
	for _, x := range u.leaves {
		v := u.segs[x.seg].view
		if len(ranges[x.seg]) == 0 {
			ranges[x.seg] = append(ranges[x.seg], v.KeyOrder())
		}
		if n := len(groups[x.seg]); n == 0 || groups[x.seg][n-1] != x.group {
			groups[x.seg] = append(groups[x.seg], x.group)
			ranges[x.seg] = append(ranges[x.seg], v.Steps(x.group))
		}
	}
	return u.each(tiers.PlaneSteps, ranges, func(seg int, b [][]byte) error {
		order, err := compress.ParseKeyOrder(b[0], u.d)
		if err != nil {
			return err
		}
		s := u.segs[seg]
		s.codes = newCodes(order, u.q.Q, s.view.StepGroups())
		for i, g := range groups[seg] {
			if err := s.codes.addGroup(g, b[i+1], s.view.Info.KeyExp); err != nil {
				return err
			}
		}
		return nil
	})
}
