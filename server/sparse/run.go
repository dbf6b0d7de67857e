package sparse

import (
	"context"
	"fmt"
	"math"
	"math/bits"
	"time"

	"kvtier/attention"
	"kvtier/compress"
	"kvtier/tiers"
	"kvtier/tiers/seal"
)

// run is one group's query over the segments that are read in part.
//
// Tables are [rows][slots] unless they say otherwise. A slot is a page, or behind
// all pages, one for each segment, its drains. Of a long context only the pages that may matter are told apart
// (survey.go): "pages" are those alone, and rest is what the others are together.
type run struct {
	ctx  context.Context
	r    Reader // of means
	keen Reader // of keys and values: what it leaves out is late
	tr   *Trace
	q    Query
	d    int
	rows int
	left float64 // bytes of the budget that are left, if all of them lie in RAM
	acc  Account

	all        int // pages that there are
	pages      int // that are told apart
	slots      int
	rest       rest
	planeBytes [compress.NumKeyPlanes]int // of a leaf
	perByte    [compress.NumKeyPlanes]float32
	valueBytes float32             // what reading one value costs, about
	norm2      []float32           // [rows], |q|^2
	total      []float32           // [rows], estimated log of the whole softmax sum
	base       []float32           // [rows], log of the unit of weights
	unit       []float32           // [rows], what share of the softmax that is
	rot        []attention.Partial // [rows], in rotated space
	follows    bool                // the map of values is read
	mapped     attention.ValueMap  // how values follow keys

	first, most int     // pages that are scanned at first, and at most
	closely     bool    // outliers' keys are read at 2 bits, see plan.go
	sparing     bool    // mean values are read only if they are worth it, see standins.go
	pageBytes   float32 // what scanning a page costs
	*scratch
}

// segmentRun is what the run holds of one segment.
type segmentRun struct {
	index      int // in the caller's segments
	s          Segment
	view       seal.View
	firstOfAll int // page, among all that there are
	firstPage  int // in the run's tables, and one behind the last
	endPage    int
	firstGroup int            // of steps, in run.groups
	means      seal.PageMeans // of all its pages
	received   float32        // share of the attention that its read tokens received, summed over heads
	codes      codes          // once any of its pages is scanned
}

// A token among those of run.leaves is known by the leaf's index there and its place in the leaf.
func leafOf(token int) (leaf, t int) { return token / tiers.LeafTokens, token % tiers.LeafTokens }

func newRun(ctx context.Context, r Reader, segments []Segment, part []int, q Query, budget Budget, tr *Trace) *run {
	share := budget.Share
	d, rows := segments[part[0]].Header.HeadDim, len(q.Partials)
	u := &run{ctx: ctx, r: r, keen: r, tr: tr, q: q, d: d, rows: rows,
		rot: attention.NewPartials(rows, d), scratch: scratches.Get().(*scratch)}
	u.segs = sized(u.segs, len(part))
	if q.Hasty != nil {
		u.keen = q.Hasty
	}
	var b body
	groups := 0
	for i, at := range part {
		v := view(segments[at], q.Head)
		u.segs[i] = segmentRun{index: at, s: segments[at], view: v, firstOfAll: u.all, firstGroup: groups}
		u.all += v.Pages()
		groups += v.StepGroups()
		b.add(v)
	}
	u.left = float64(share) * b.full
	if budget.ByPage {
		u.pages = b.skimmedPages(share)
		groups = 0 // nothing is kept of groups and leaves
	} else {
		u.follows = b.withMap(share)
		u.pageBytes = float32(b.scanOfPage())
		u.closely = b.closely(share)
		u.first, u.most = b.scannedPages(share)
		u.pages = toldApart(u.all, max(u.first, u.most))
		u.sparing = b.sparing(share)
	}
	u.slots = u.pages + len(u.segs)
	u.planeBytes = compress.KeyPlaneBytes(d)
	for p, n := range u.planeBytes {
		u.perByte[p] = 1 / float32(n)
	}
	u.valueBytes = valueBytes(d)
	u.scratch.reset(u, max(u.first, u.most)*leavesOfPage, groups)
	u.norm2, u.total, u.base, u.unit = u.floats(rows), u.floats(rows), u.floats(rows), u.floats(rows)
	for i := range rows {
		u.norm2[i] = attention.Dot(u.row(i), u.row(i))
	}
	return u
}

func (u *run) row(i int) []float32 { return u.q.Q[i*u.d : (i+1)*u.d] }

// answer goes through the stages of an answer line by line.
func (u *run) answer() error {
	return u.through(
		stage{u.scorePages, &u.acc.NsScore},
		stage{u.scan, &u.acc.NsScan},
		stage{func() error { return u.refine(1) }, &u.acc.NsScan},
		stage{func() error { return u.refine(2) }, &u.acc.NsScan},
		stage{func() error { return u.refine(3) }, &u.acc.NsScan},
		stage{func() error { return u.refine(4) }, &u.acc.NsScan},
		stage{u.readValues, &u.acc.NsFetch},
		stage{func() error { u.finish(); return nil }, &u.acc.NsScore},
	)
}

// stage is a part of an answer, and what its time is added to.
type stage struct {
	do func() error
	ns *int64
}

// through goes through stages, up to the first that fails, and releases what the run holds.
func (u *run) through(stages ...stage) error {
	defer u.release()
	for _, stage := range stages {
		start := time.Now()
		if err := stage.do(); err != nil {
			return err
		}
		*stage.ns += time.Since(start).Nanoseconds()
	}
	return nil
}

// pin pins requests of a plane and keeps account. What is late counts as if it had been read: it will be, and a budget
// is for all that a query has read.
func (u *run) pin(p tiers.Plane, reqs []tiers.Request) ([]tiers.Pin, error) {
	r := u.keen
	if p == tiers.PlanePages || p == tiers.PlaneMap { // nothing stands for what stands for everything else
		r = u.r
	}
	pins, moved, err := r.Pin(u.ctx, reqs)
	if err != nil {
		return nil, err
	}
	u.acc.Moved.Add(moved)
	for _, r := range reqs {
		u.left -= float64(tiers.LineBytes(r.Ranges))
	}
	return pins, nil
}

func (u *run) release() {
	for i := range u.pins {
		s := &u.segs[u.pinned[i]]
		u.pins[i].Release(min(1, s.received/float32(u.rows)))
	}
	u.scratch.free()
	u.scratch = nil
}

// want asks for a range of a segment, in order of segments and places, for the next call of each. If it begins
// where the last one ends, it becomes a part of that.
func (u *run) want(seg int, x tiers.Range) {
	if n := len(u.wanted); n == 0 || u.wanted[n-1].seg != seg {
		u.wanted = append(u.wanted, wanted{seg, len(u.ranges), len(u.ranges)})
	}
	w := &u.wanted[len(u.wanted)-1]
	if w.end > w.begin {
		if last := &u.ranges[w.end-1]; last.Off+last.Len == x.Off {
			last.Len += x.Len
			return
		}
	}
	u.ranges = append(u.ranges, x)
	w.end++
}

// wanted are the ranges [begin, end) that are asked for of a segment.
type wanted struct{ seg, begin, end int }

// each pins the ranges that are wanted of one plane, and hands their bytes over by segment; they
// stay pinned until the run ends.
func (u *run) each(p tiers.Plane, use func(seg int, got got) error) error {
	asked := u.wanted
	u.reqs = u.reqs[:0]
	for _, w := range asked {
		u.reqs = append(u.reqs, tiers.Request{Header: u.segs[w.seg].s.Header, Head: u.q.Head, Plane: p, Ranges: u.ranges[w.begin:w.end:w.end]})
	}
	u.wanted, u.ranges = u.wanted[:0], u.ranges[:0]
	if len(asked) == 0 {
		return nil
	}
	pins, err := u.pin(p, u.reqs)
	if err != nil {
		return err
	}
	for i, w := range asked { // all of them, before anything can fail
		u.pins, u.pinned = append(u.pins, pins[i]), append(u.pinned, w.seg)
		u.acc.LateBytes += int64(pins[i].Late)
	}
	for i, w := range asked {
		if err := use(w.seg, got{asked: u.reqs[i].Ranges, b: pins[i].Ranges}); err != nil {
			return fmt.Errorf("segment %v: %w: %w", u.segs[w.seg].s.Header.ID, tiers.ErrCorrupt, err)
		}
	}
	return nil
}

// got is what came of ranges that were asked for.
type got struct {
	asked []tiers.Range
	b     [][]byte // nil: late
	left  []byte   // of the first one, which is no longer in b; see next
	late  int      // so many bytes of it are late
}

// next returns the next n bytes, as they were asked for before neighbours were joined; nil if they are late.
func (g *got) next(n int) []byte {
	if len(g.left) == 0 && g.late == 0 {
		if g.left = g.b[0]; g.left == nil {
			g.late = g.asked[0].Len
		}
		g.asked, g.b = g.asked[1:], g.b[1:]
	}
	if g.late > 0 {
		g.late -= n
		return nil
	}
	out := g.left[:n:n]
	g.left = g.left[n:]
	return out
}

// anyLate says whether anything is late so far. Nearly always nothing is: what is to be done about it is not looked for.
func (u *run) anyLate() bool { return u.acc.LateBytes > 0 }

// isLate notes that some of a leaf's tokens, a bit for each, are known less well than they should be.
func (u *run) isLate(x *leaf, tokens uint16) {
	u.acc.Late += int64(bits.OnesCount16(tokens &^ x.late))
	x.late |= tokens
}

// ofSegment takes the leaves of a segment, or their tokens, from the front of a list in order of place.
func (u *run) ofSegment(list *[]int, seg int, leaf func(int) int) []int {
	n := 0
	for n < len(*list) && int(u.leaves[leaf((*list)[n])].seg) == seg {
		n++
	}
	out := (*list)[:n]
	*list = (*list)[n:]
	return out
}

// ofRow returns row r of a table of slots.
func (u *run) ofRow(table []float32, r int) []float32 { return table[r*u.slots:][:u.slots] }

// table returns a table of slots, all 0.
func (u *run) table() []float32 { return u.floats(u.rows * u.slots) }

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
