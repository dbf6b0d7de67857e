package sparse

import (
	"context"
	"fmt"
	"time"

	"kvtier/attention"
	"kvtier/attention/kernels"
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
	left float64 // bytes of the budget that are left, if all of them lie in RAM
	acc  Account

	segs    []*segmentRun
	norm2   []float32           // [rows], |q|^2
	total   []float32           // [rows], estimated log of the whole softmax sum
	rot     []attention.Partial // [rows], in rotated space
	follows bool                // the map of values is read
	values  *attention.ValueMap // how values follow keys

	leafKeys []float32 // [16][d], those of one leaf
	// See weigh: [rows] curves, [rows][16] their values, [rows][2] the sums of these, and a leaf's valueGain.
	curves        []kernels.Curve
	squares, sums []float32
	gain          [1][]float32
	row2          []float32 // [2][d], scratch
	rest          []float32 // [rows], see unknown
	restOf        restOf
	mean          []float32 // [d], see unpack
	meanOf        int       // page
	less          []float32 // [rows], see deviate

	pages       []page
	first, most int     // pages that are scanned at first, and at most
	pageBytes   float32 // what scanning a page costs
	*scratch            // leaves of the pages that are scanned, and what goes with them
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
	// means, each times its share: [rows][d], channels in stored order; nil if there are none.
	deviation [][]float32
}

// page is 64 tokens under consideration.
type page struct {
	index   int // in run.pages
	seg, i  int
	scanned bool
	n       int       // tokens
	mass    []float32 // [rows], estimated log mass
	rank    []float32 // [rows], log weight by which it is ranked
	scatter []float32 // [rows], mean square of its values' distance from their mean, over the output's square
	far     []float32 // [rows], the same from the output
}

// A token among those of run.leaves is known by the leaf's index there and its place in the leaf.
func leafOf(token int) (leaf, t int) { return token / tiers.LeafTokens, token % tiers.LeafTokens }

func newRun(ctx context.Context, r Reader, segments []Segment, part []int, q Query, share float32, tr *Trace) *run {
	d := segments[part[0]].Header.HeadDim
	rows := len(q.Partials)
	u := &run{ctx: ctx, r: r, tr: tr, q: q, d: d, rows: rows,
		norm2: make([]float32, rows), total: make([]float32, rows), rot: attention.NewPartials(rows, d),
		leafKeys: make([]float32, tiers.LeafTokens*d), curves: make([]kernels.Curve, rows),
		squares: make([]float32, rows*tiers.LeafTokens), sums: make([]float32, 2*rows),
		row2: make([]float32, 2*d), rest: make([]float32, rows), mean: make([]float32, d), meanOf: -1, less: make([]float32, rows)}
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
	u.left, u.pageBytes = float64(share)*b.full, float32(b.scanOfPage())
	u.first, u.most = b.scannedPages(share)
	u.scratch = newScratch(rows, max(u.first, u.most)*tiers.PageTokens/tiers.LeafTokens)
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
	u.scratch.free()
	u.scratch = nil
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

// share is what a log weight [rows] is of the softmax, summed over the group's heads.
func (u *run) share(log []float32) (sum float32) {
	for r, x := range log {
		sum += exp(x - u.total[r])
	}
	return sum
}
