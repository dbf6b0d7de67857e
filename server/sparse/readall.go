package sparse

import (
	"context"
	"fmt"
	"time"

	"kvtier/attention"
	"kvtier/attention/kernels"
	"kvtier/compress"
	"kvtier/tiers"
	"kvtier/tiers/seal"
)

func view(s Segment, head int) seal.View {
	return seal.View{D: s.Header.HeadDim, Info: s.Header.Heads[head]}
}

// whole attends to all codes of segments, one after the other.
type whole struct {
	ctx    context.Context
	r      Reader
	tr     *Trace
	q      Query
	ps     []attention.Partial // in rotated space
	out    [][]float32         // their sums
	scorer scorer
	batch  kernels.ValueBatch
	runs   []valueRun // of the group
}

// valueRun is what is stored of n values that lie one after the other, see seal.Codes.Values.
type valueRun struct {
	n                 int
	scales, high, low []byte
}

func newWhole(ctx context.Context, r Reader, q Query, tr *Trace) *whole {
	rows := len(q.Partials)
	d := len(q.Q) / rows
	w := &whole{ctx: ctx, r: r, tr: tr, q: q, ps: attention.NewPartials(rows, d)}
	w.out = attention.AppendSums(nil, w.ps)
	w.scorer = scorer{q: make([]float32, rows*d), softcap: q.Softcap, scores: make([]float32, rows*tiers.StepTokens),
		folded: kernels.KeyQuery{Words: make([]int16, rows*d), Scale: make([]float32, 2*rows)}}
	return w
}

// read attends to every token of a segment that exists for the query.
func (w *whole) read(index int, s Segment) (Account, error) {
	if s.Header.Profile == tiers.ProfileExact {
		return readExact(w.ctx, w.r, index, s, w.q, w.tr)
	}
	start := time.Now()
	b, acc, err := pinCodes(w.ctx, w.r, s, w.q.Head)
	if err != nil {
		return acc, err
	}
	defer releaseAll(b.pins, 1)
	acc.NsFetch += time.Since(start).Nanoseconds()
	start = time.Now()
	n, err := w.attend(b, index, s)
	acc.Scanned, acc.Read = n, n
	acc.NsScan += time.Since(start).Nanoseconds()
	return acc, err
}

// attend attends to codes as they lie, group by group, and returns how many tokens there were.
func (w *whole) attend(b *pinned, index int, s Segment) (n int64, err error) {
	v := view(s, w.q.Head)
	codes, err := v.Codes(b.of)
	if err != nil {
		return 0, corrupt(s, err)
	}
	w.scorer.begin(codes, w.q)
	for g := range v.StepGroups() {
		lo, hi := v.GroupPlaces(g)
		w.takeRuns(codes, lo, hi)
		scores, err := w.scorer.group(g)
		if err != nil {
			return 0, corrupt(s, err)
		}
		if s.Cut() || w.tr.Token != nil {
			n += w.sift(b, index, s, lo, hi, scores)
		} else {
			n += int64(hi - lo)
		}
		attention.Weigh(w.ps, scores, tiers.StepTokens, hi-lo)
		w.addValues(scores, codes.D)
	}
	return n, nil
}

// sift takes those of the tokens at places [lo, hi) out that do not exist for the query, tells of the others, and returns how many these are.
func (w *whole) sift(b *pinned, index int, s Segment, lo, hi int, scores []float32) (n int64) {
	v, order := view(s, w.q.Head), b.of(tiers.PlaneOrder)
	for t := range hi - lo {
		if v.Position(order, lo+t) >= s.Limit {
			for at := t; at < len(scores); at += tiers.StepTokens {
				scores[at] = -inf
			}
			continue
		}
		n++
		if w.tr.Token != nil {
			for row := range w.ps {
				w.tr.Token(row, index, lo+t, scores[row*tiers.StepTokens+t], Read)
			}
		}
	}
	return n
}

// takeRuns finds the values at places [lo, hi), and has the processor fetch their scales, which are read long before the rows beside them.
func (w *whole) takeRuns(codes *seal.Codes, lo, hi int) {
	w.runs = w.runs[:0]
	for at := lo; at < hi; {
		end, scales, high, low := codes.Values(at/tiers.PageTokens, at)
		kernels.Prefetch(scales)
		w.runs = append(w.runs, valueRun{end - at, scales, high, low})
		at = end
	}
}

// addValues adds the values of the runs, d channels each, weighted by scores [rows][tiers.StepTokens], to the sums.
func (w *whole) addValues(scores []float32, d int) {
	for _, r := range w.runs {
		if !w.batch.AppendRun(r.scales, r.high, r.low, r.n, d, kernels.Ahead) {
			scores = w.flush(scores)
			w.batch.AppendRun(r.scales, r.high, r.low, r.n, d, kernels.Ahead)
		}
	}
	w.flush(scores)
}

// flush adds the batch's values to the sums, and returns the weights of those behind them.
func (w *whole) flush(weights []float32) (rest []float32) {
	n := w.batch.Len()
	w.batch.AddTo(w.out, weights, tiers.StepTokens)
	w.batch.Reset()
	return weights[n:]
}

// scorer scores groups of tokens in their order.
type scorer struct {
	*seal.Codes
	q       []float32 // [rows][d], channels in stored order
	softcap float32
	scores  []float32        // [rows][tiers.StepTokens]
	folded  kernels.KeyQuery // the query in the bins of the group, by the layout
}

// begin goes on to the next segment.
func (s *scorer) begin(c *seal.Codes, q Query) {
	s.Codes = c
	c.Order().Permute(s.q, q.Q)
}

// group returns the scores [rows][tiers.StepTokens] of group g, until the next call.
func (s *scorer) group(g int) (scores []float32, err error) {
	lo, hi := s.GroupPlaces(g)
	end := (hi + tiers.LeafTokens - 1) / tiers.LeafTokens
	for from, to := lo/tiers.LeafTokens, 0; from < end; from = to {
		layout := s.Layout(from)
		for to = from + 1; to < end && s.Layout(to) == layout; to++ {
		}
		if err := s.Fold(s.folded, s.q, layout, g); err != nil {
			return nil, err
		}
		planes, steps := s.Leaves(from)
		layout.ScoreLeaves(s.scores[from*tiers.LeafTokens-lo:], tiers.LeafTokens, tiers.StepTokens, s.folded, planes[:], steps[:], to-from, kernels.Ahead)
	}
	attention.SoftcapAll(s.scores, s.softcap)
	return s.scores, nil
}

// readExact attends to a segment's lossless rows.
func readExact(ctx context.Context, r Reader, index int, s Segment, q Query, tr *Trace) (Account, error) {
	start := time.Now()
	rows, acc, err := exactRows(ctx, r, s, q.Head)
	if err != nil {
		return acc, err
	}
	acc.NsFetch += time.Since(start).Nanoseconds()
	start = time.Now()
	d := s.Header.HeadDim
	attention.Attend(q.Partials, q.Q, rows.K, rows.V, d, q.Softcap, nil)
	if tr.Token != nil {
		traceAll(index, rows, q, d, tr)
	}
	n := int64(len(rows.K) / d)
	acc.Scanned, acc.Read = n, n
	acc.NsScan += time.Since(start).Nanoseconds()
	return acc, nil
}

func traceAll(index int, rows *DecodedRows, q Query, d int, tr *Trace) {
	for row := range q.Partials {
		qr := q.Q[row*d : (row+1)*d]
		for t, place := range rows.Places {
			s := attention.Softcap(attention.Dot(qr, rows.K[t*d:(t+1)*d]), q.Softcap)
			tr.Token(row, index, place, s, Read)
		}
	}
}

// mergeRotated merges partials whose values are rotated.
func mergeRotated(dst, rotated []attention.Partial, d int) {
	for i := range rotated {
		compress.Unrotate(rotated[i].Out, d)
		dst[i].Merge(&rotated[i])
	}
}

// DecodedRows are keys and values of one head of a segment, decompressed.
type DecodedRows struct {
	K, V []float32 // [n][d]
	// Rotated says that values are in rotated space.
	Rotated bool
	// Places holds the place of each row in storage; with lossless rows, which
	// are stored by position, the position's offset past the sinks.
	Places []int
	// Positions holds each row's offset from the segment's start.
	Positions []int
	// Exact says that rows are bit-identical to what was appended.
	Exact bool
}

// Rows reads all stored tokens of a head that exist for the query, sinks aside.
func Rows(ctx context.Context, r Reader, s Segment, head int) (*DecodedRows, Account, error) {
	if s.Header.Profile == tiers.ProfileExact {
		return exactRows(ctx, r, s, head)
	}
	return codedRows(ctx, r, s, head)
}

func exactRows(ctx context.Context, r Reader, s Segment, head int) (*DecodedRows, Account, error) {
	h, v := s.Header, view(s, head)
	reqs := []tiers.Request{{Header: h, Head: head, Plane: tiers.PlaneKX}, {Header: h, Head: head, Plane: tiers.PlaneVX}}
	pins, moved, err := r.Pin(ctx, reqs)
	if err != nil {
		return nil, Account{}, err
	}
	defer releaseAll(pins, 1)
	n, sinks := max(0, s.Limit-v.Info.Sinks), v.Info.Sinks
	out := &DecodedRows{Exact: true}
	for i, dst := range []*[]float32{&out.K, &out.V} {
		if *dst, err = decodeExact(pins[i].Ranges[0], v.Stored(), h.HeadDim, compress.ElementType(h.Type)); err != nil {
			return nil, Account{}, corrupt(s, err)
		}
		*dst = (*dst)[:n*h.HeadDim]
	}
	for t := range n {
		out.Places = append(out.Places, t)
		out.Positions = append(out.Positions, t+sinks)
	}
	return out, Account{Moved: moved}, nil
}

func decodeExact(packed []byte, n, d int, t compress.ElementType) ([]float32, error) {
	row := d * t.Size()
	b := make([]byte, n*row)
	for p := 0; p*tiers.PageTokens < n; p++ {
		lo, hi := p*tiers.PageTokens, min((p+1)*tiers.PageTokens, n)
		if err := compress.UnpackExactPage(b[lo*row:hi*row], packed, p, n, d, t); err != nil {
			return nil, err
		}
	}
	out := make([]float32, n*d)
	compress.ToFloat32(out, b, t)
	return out, nil
}

// pinned is all that is stored of a head's codes.
type pinned struct {
	planes [tiers.NumPlanes][]byte
	pins   []tiers.Pin
}

func (p *pinned) of(plane tiers.Plane) []byte { return p.planes[plane] }

// WholePlanes are the planes of a segment's codes that reading everything reads, of those that it has.
func WholePlanes(s Segment) tiers.PlaneSet {
	set := tiers.PlaneSet(1<<tiers.PlaneSteps | 1<<tiers.PlaneV4 | 1<<tiers.PlaneOrder)
	for _, p := range tiers.KeyPlanes[:4] {
		set |= 1 << p
	}
	if s.Low {
		return set | tiers.LowPlanes
	}
	return set | 1<<tiers.PlaneDrains
}

func pinCodes(ctx context.Context, r Reader, s Segment, head int) (*pinned, Account, error) {
	var reqs []tiers.Request
	wanted := WholePlanes(s)
	for p := range tiers.NumPlanes {
		if _, _, ok := s.Header.Piece(head, p); ok && wanted.Has(p) { // small dimensions and segments lack the last ones
			reqs = append(reqs, tiers.Request{Header: s.Header, Head: head, Plane: p})
		}
	}
	pins, moved, err := r.Pin(ctx, reqs)
	if err != nil {
		return nil, Account{}, err
	}
	out := &pinned{pins: pins}
	for i, r := range reqs {
		out.planes[r.Plane] = pins[i].Ranges[0]
	}
	return out, Account{Moved: moved}, nil
}

func codedRows(ctx context.Context, r Reader, s Segment, head int) (*DecodedRows, Account, error) {
	b, acc, err := pinCodes(ctx, r, s, head)
	if err != nil {
		return nil, acc, err
	}
	defer releaseAll(b.pins, 1)
	v, d := view(s, head), s.Header.HeadDim
	out := &DecodedRows{K: make([]float32, v.Stored()*d), V: make([]float32, v.Stored()*d), Rotated: true,
		Positions: v.Positions(b.of(tiers.PlaneOrder))}
	if err := v.Keys(out.K, b.of); err != nil {
		return nil, Account{}, corrupt(s, err)
	}
	v.Values(out.V, b.of)
	for t := range v.Stored() {
		out.Places = append(out.Places, t)
	}
	if s.Cut() {
		out.keepBefore(s.Limit, d)
	}
	return out, acc, nil
}

// corrupt says that a segment's bytes cannot be read.
func corrupt(s Segment, err error) error {
	return fmt.Errorf("segment %v: %w: %w", s.Header.ID, tiers.ErrCorrupt, err)
}

// keepBefore drops the tokens at and after offset limit.
func (o *DecodedRows) keepBefore(limit, d int) {
	n := 0
	for t, pos := range o.Positions {
		if pos < limit {
			copy(o.K[n*d:(n+1)*d], o.K[t*d:(t+1)*d])
			copy(o.V[n*d:(n+1)*d], o.V[t*d:(t+1)*d])
			o.Places[n], o.Positions[n] = o.Places[t], pos
			n++
		}
	}
	o.K, o.V, o.Places, o.Positions = o.K[:n*d], o.V[:n*d], o.Places[:n], o.Positions[:n]
}

func releaseAll(pins []tiers.Pin, attention float32) {
	for i := range pins {
		pins[i].Release(attention)
	}
}
