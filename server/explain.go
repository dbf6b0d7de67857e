package server

import (
	"cmp"
	"context"
	"math"
	"slices"

	"google.golang.org/grpc/codes"

	"kvtier/attention"
	"kvtier/compress"
	kvtierv1 "kvtier/proto/kvtier/v1"
	"kvtier/server/sparse"
	"kvtier/tiers"
	"kvtier/tiers/seal"
)

const (
	defaultTop = 16
	maxTop     = 4096
)

// Explain answers a layer's newest query twice more, as it was answered and
// from everything stored, and shows the difference.
func (x *inspectionService) Explain(ctx context.Context, r *kvtierv1.ExplainRequest) (*kvtierv1.ExplainResponse, error) {
	leave, err := x.srv.enter()
	if err != nil {
		return nil, err
	}
	defer leave()
	s, err := x.srv.sequence(r.SequenceId)
	if err != nil {
		return nil, err
	}
	if int(r.Layer) >= s.spec.layers {
		return nil, invalid(ReasonShape, "layer %d: the model has %d", r.Layer, s.spec.layers)
	}
	top := int(min(r.Top, maxTop))
	if top == 0 {
		top = defaultTop
	}
	spans := int(min(r.TopSpans, maxLabels))
	if spans == 0 {
		spans = defaultTop
	}
	return s.explain(ctx, int(r.Layer), top, spans)
}

// explainRun collects what both answers did. Its tables have a number for each token: those of the segments by segment and
// place, then those of the exact zone.
type explainRun struct {
	first []int // by segment, the number of its first token; the last is the first of the exact zone
	heads []seen
	// offsets holds the offset from its segment's start of each place in it, by KV head and segment.
	offsets [][][]int
}

// seen is what became of tokens in one query head's answer, by number. Only the goroutine that answers its KV head writes it.
type seen struct {
	how  []sparse.How // of tokens in segments
	logs []float32    // of true weights; -Inf of tokens that are not attended
	zone []uint64     // positions of the exact zone's tokens
}

func newExplainRun(segs []sparse.Segment, queryHeads int) *explainRun {
	run := &explainRun{first: []int{0}, heads: make([]seen, queryHeads)}
	n := 0
	for _, seg := range segs {
		n += seg.Header.Tokens
		run.first = append(run.first, n)
	}
	for h := range run.heads {
		x := &run.heads[h]
		x.how, x.logs = make([]sparse.How, n), make([]float32, n)
		for i := range x.logs {
			x.logs[i] = float32(math.Inf(-1))
		}
	}
	return run
}

// of returns a segment's part of a table.
func of[T any](run *explainRun, table []T, segment int) []T {
	return table[run.first[segment]:run.first[segment+1]]
}

func (s *sequence) explain(ctx context.Context, layer, top, topSpans int) (*kvtierv1.ExplainResponse, error) {
	s.mu.RLock()
	last := s.mu.last[layer]
	s.mu.RUnlock()
	st, err := s.readable(layer) // not before: it holds what was asked about
	if err != nil {
		return nil, err
	}
	if last == nil {
		return nil, fail(codes.NotFound, ReasonUnknown, "layer %d of the sequence has answered no query since the daemon started: ask one first", layer)
	}
	if last.position >= st.lens[layer] {
		return nil, fail(codes.NotFound, ReasonUnknown, "the layer's newest query was truncated away")
	}
	run := newExplainRun(s.srv.segmentsOf(&st, layer, last.position+1), s.spec.queryHeads)
	c := &call{seq: s, st: &st, layer: layer, start: last.position, n: 1, q: last.q, budget: last.budget, shares: last.shares, way: last.way, trace: s.traceHow(run)}
	ps, err := c.answer(ctx)
	if err != nil {
		return nil, err
	}
	all := &call{seq: s, st: &st, layer: layer, start: last.position, n: 1, q: last.q,
		budget: budget{mode: kvtierv1.AttendMode_ATTEND_MODE_EXACT}, trace: s.traceTrue(run)}
	truth, err := all.answer(ctx)
	if err != nil {
		return nil, err
	}
	if err := s.readOffsets(ctx, all, run); err != nil {
		return nil, err
	}
	s.byPosition(all, run)
	out := &kvtierv1.ExplainResponse{Position: last.position, Account: c.account(0), PagesTotal: uint64(c.acc.PagesTotal),
		PagesScored: uint64(c.acc.Pages), LeavesScored: uint64(c.acc.Leaves), LeavesScanned: uint64(c.acc.Scans),
		LeavesRefined: uint64(c.acc.Refined), ValuesRead: uint64(c.acc.Read)}
	spans := newSpanMass(&st, last.position+1, s.spec.queryHeads)
	for h := range s.spec.queryHeads {
		if err := s.addFirstTokens(ctx, all, run, h); err != nil {
			return nil, err
		}
		run.addExactZone(all, h)
		e := s.explainHead(&st, run, h, layer, truth[h].LSE(), top, spans)
		a, b := make([]float32, s.spec.headDim), make([]float32, s.spec.headDim)
		ps[h].Output(a)
		truth[h].Output(b)
		e.TrueError = attention.RelativeError(a, b)
		out.Heads = append(out.Heads, e)
	}
	out.Spans, out.MassUnlabelled = spans.result(topSpans)
	return out, nil
}

func (s *sequence) traceHow(run *explainRun) func(int) *sparse.Trace {
	return func(kvHead int) *sparse.Trace {
		return &sparse.Trace{Token: func(row, segment, place int, _ float32, how sparse.How) {
			x := &of(run, run.heads[kvHead*s.spec.group()+row].how, segment)[place]
			*x = max(*x, how)
		}}
	}
}

func (s *sequence) traceTrue(run *explainRun) func(int) *sparse.Trace {
	return func(kvHead int) *sparse.Trace {
		return &sparse.Trace{Token: func(row, segment, place int, log float32, _ sparse.How) {
			of(run, run.heads[kvHead*s.spec.group()+row].logs, segment)[place] = log
		}}
	}
}

// readOffsets learns which position each place in storage is.
func (s *sequence) readOffsets(ctx context.Context, c *call, run *explainRun) error {
	if s.spec.window[c.layer] > 0 {
		return nil // attended by its window alone
	}
	segs := s.srv.segmentsOf(c.st, c.layer, c.start+1)
	for head := range s.spec.kvHeads {
		offsets := make([][]int, len(segs))
		for i, seg := range segs {
			pins, _, err := s.srv.store.Pin(ctx, []tiers.Request{{Header: seg.Header, Head: head, Plane: tiers.PlaneOrder}})
			if err != nil {
				return err
			}
			offsets[i] = seal.View{D: s.spec.headDim, Info: seg.Header.Heads[head]}.Positions(pins[0].Ranges[0])
			pins[0].Release(0)
		}
		run.offsets = append(run.offsets, offsets)
	}
	return nil
}

// byPosition orders by position what the sparse answer did by place: with the profile exact,
// what reads everything reads lossless rows, which are stored by position.
func (s *sequence) byPosition(c *call, run *explainRun) {
	for i, seg := range s.srv.segmentsOf(c.st, c.layer, c.start+1) {
		if seg.Header.Profile != tiers.ProfileExact || seg.Cut() {
			continue
		}
		for h := range run.heads {
			head, how := h/s.spec.group(), of(run, run.heads[h].how, i)
			places := slices.Clone(how)
			for place, offset := range run.offsets[head][i] {
				how[offset-seg.Header.Heads[head].Sinks] = places[place]
			}
		}
	}
}

// addFirstTokens scores the sequence's first tokens, which a sealed span keeps
// unquantised, for query head h.
func (s *sequence) addFirstTokens(ctx context.Context, c *call, run *explainRun, h int) error {
	sp := s.spec
	if sp.window[c.layer] > 0 || len(c.st.spans) == 0 {
		return nil
	}
	first, head, d := c.st.spans[0], h/sp.group(), sp.headDim
	n := first.segments[c.layer].Heads[head].Sinks
	if n == 0 {
		return nil
	}
	pins, _, err := s.srv.store.Pin(ctx, []tiers.Request{{Header: first.segments[c.layer], Head: head, Plane: tiers.PlaneSinks}})
	if err != nil {
		return err
	}
	defer pins[0].Release(0)
	kv := make([]float32, 2*n*d)
	compress.ToFloat32(kv, pins[0].Ranges[0], sp.typ)
	for i := range min(n, first.limit, int(c.start+1-first.Start)) {
		run.score(c, h, int(first.Start)+i, kv[i*d:(i+1)*d])
	}
	return nil
}

// score adds a token of the exact zone.
func (run *explainRun) score(c *call, h, position int, key []float32) {
	d := c.seq.spec.headDim
	score := attention.Softcap(attention.Dot(c.q[h*d:(h+1)*d], key), c.seq.spec.softcap)
	x := &run.heads[h]
	x.zone, x.logs = append(x.zone, uint64(position)), append(x.logs, score)
}

// addExactZone scores the tokens of the tail, or the window, for query head h.
func (run *explainRun) addExactZone(c *call, h int) {
	sp := c.seq.spec
	d := sp.headDim
	rows := c.st.rows[c.layer]
	lo, hi := rows.base, c.start+1
	if w := uint64(sp.window[c.layer]); w > 0 && hi > w {
		lo = max(lo, hi-w)
	}
	if hi <= lo {
		return
	}
	key := make([]float32, d)
	for p := range rows.pieces(sp, lo, hi) {
		k, _ := p.head(sp, h/sp.group())
		for i := range p.n {
			compress.ToFloat32(key, k[i*sp.headBytes():][:sp.headBytes()], sp.typ)
			run.score(c, h, int(p.start)+i, key)
		}
	}
}

func (s *sequence) explainHead(st *state, run *explainRun, h, layer int, lse float32, top int, spans *spanMass) *kvtierv1.ExplainHead {
	out := &kvtierv1.ExplainHead{QueryHead: uint32(h)}
	x := &run.heads[h]
	weight := func(token int) float32 { return float32(math.Exp(float64(x.logs[token] - lse))) }
	sum, segment := float32(0), 0
	for token, log := range x.logs {
		if math.IsInf(float64(log), -1) {
			continue
		}
		for segment < len(run.first)-1 && token >= run.first[segment+1] {
			segment++
		}
		w, kind := weight(token), massExact
		if token < len(x.how) {
			kind = massOf[x.how[token]]
		}
		sum += w
		*[...]*float32{&out.MassExact, &out.MassRead, &out.MassScanned, &out.MassEstimated}[kind] += w
		spans.add(kind, s.positionOf(st, run, layer, h, segment, token), w)
	}
	spans.endHead()
	out.MassExact += max(0, 1-sum) // learned sinks: part of the normaliser, but no token
	best := attention.Top(x.logs, top)
	slices.SortStableFunc(best, func(a, b int) int { return cmp.Compare(x.logs[b], x.logs[a]) })
	for _, token := range best {
		if math.IsInf(float64(x.logs[token]), -1) {
			break
		}
		segment, _ := slices.BinarySearch(run.first, token+1)
		e := &kvtierv1.ExplainToken{Position: s.positionOf(st, run, layer, h, segment-1, token), Weight: weight(token), How: "exact"}
		if token < len(x.how) {
			e.How = [...]string{"estimated", "scanned", "read"}[x.how[token]]
		}
		s.label(st, e)
		out.Tokens = append(out.Tokens, e)
	}
	return out
}

// positionOf finds the position of a token of a segment, or of the exact zone, that query head h saw.
func (s *sequence) positionOf(st *state, run *explainRun, layer, h, segment, token int) uint64 {
	if x := &run.heads[h]; token >= len(x.how) {
		return x.zone[token-len(x.how)]
	}
	head, place := h/s.spec.group(), token-run.first[segment]
	seg := st.spans[segment].segments[layer]
	if seg.Profile == tiers.ProfileExact {
		// Lossless rows are stored by position.
		return seg.Start + uint64(seg.Heads[head].Sinks+place)
	}
	return seg.Start + uint64(run.offsets[head][segment][place])
}

// label adds a token's text, id and span.
func (s *sequence) label(st *state, e *kvtierv1.ExplainToken) {
	e.TokenId = noToken
	if sealed := st.sealed(); e.Position >= sealed {
		if i := e.Position - sealed; i < uint64(len(st.ids)) {
			e.TokenId, e.Text = st.ids[i], st.texts[i]
		}
	} else {
		for _, ref := range st.spans {
			if i := int(e.Position - ref.Start); e.Position >= ref.Start && i < ref.Tokens {
				e.TokenId = ref.TokenIDs[i]
				if texts, err := unpackTexts(ref.Texts, ref.Tokens); err == nil {
					e.Text = texts[i]
				}
			}
		}
	}
	for _, l := range st.labels {
		if e.Position >= l.Start && e.Position < l.End {
			e.Label = l.Label
		}
	}
}
