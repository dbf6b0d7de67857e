package server

import (
	"cmp"
	"context"
	"math"
	"slices"
	"sync"

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

// seen is what became of a token in one query head's answer.
type seen struct {
	segment, place int // or segment -1: position in place, in the exact zone
	log            float32
}

// explainRun collects what both answers did, by query head.
type explainRun struct {
	mu   sync.Mutex // KV heads are answered at the same time
	how  []map[[2]int]sparse.How
	true [][]seen
	// offsets holds the offset from its segment's start of each place in it, by KV head and segment.
	offsets [][][]int
}

// howIn says what became of a token in query head h's answer.
func (run *explainRun) howIn(h int, t seen) sparse.How {
	return run.how[h][[2]int{t.segment, t.place}]
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
	run := &explainRun{how: make([]map[[2]int]sparse.How, s.spec.queryHeads), true: make([][]seen, s.spec.queryHeads)}
	for i := range run.how {
		run.how[i] = map[[2]int]sparse.How{}
	}
	c := &call{seq: s, st: &st, layer: layer, start: last.position, n: 1, q: last.q, budget: last.budget, shares: last.shares, trace: s.traceHow(run)}
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
			run.mu.Lock()
			defer run.mu.Unlock()
			m := run.how[kvHead*s.spec.group()+row]
			m[[2]int{segment, place}] = max(how, m[[2]int{segment, place}])
		}}
	}
}

func (s *sequence) traceTrue(run *explainRun) func(int) *sparse.Trace {
	return func(kvHead int) *sparse.Trace {
		return &sparse.Trace{Token: func(row, segment, place int, log float32, _ sparse.How) {
			run.mu.Lock()
			defer run.mu.Unlock()
			h := kvHead*s.spec.group() + row
			run.true[h] = append(run.true[h], seen{segment, place, log})
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

// byPosition renames the places of a sparse answer: with the profile exact,
// what reads everything reads lossless rows, which are stored by position.
func (s *sequence) byPosition(c *call, run *explainRun) {
	segs := s.srv.segmentsOf(c.st, c.layer, c.start+1)
	for h, how := range run.how {
		head := h / s.spec.group()
		renamed := make(map[[2]int]sparse.How, len(how))
		for at, x := range how {
			if seg := segs[at[0]]; seg.Header.Profile == tiers.ProfileExact && !seg.Cut() {
				at[1] = run.offsets[head][at[0]][at[1]] - seg.Header.Heads[head].Sinks
			}
			renamed[at] = x
		}
		run.how[h] = renamed
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
	run.true[h] = append(run.true[h], seen{-1, position, score})
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
	kb, _ := rows.slice(lo, hi, sp.rowBytes())
	k := make([]float32, int(hi-lo)*d)
	widenRows(k, kb[h/sp.group()*d*sp.typ.Size():], int(hi-lo), sp.kvHeads*d, d, sp.typ)
	for i := range int(hi - lo) {
		run.score(c, h, int(lo)+i, k[i*d:(i+1)*d])
	}
}

func (s *sequence) explainHead(st *state, run *explainRun, h, layer int, lse float32, top int, spans *spanMass) *kvtierv1.ExplainHead {
	out := &kvtierv1.ExplainHead{QueryHead: uint32(h)}
	tokens := run.true[h]
	sum := float32(0)
	for _, t := range tokens {
		w := float32(math.Exp(float64(t.log - lse)))
		sum += w
		kind := massExact
		if t.segment >= 0 {
			kind = massOf[run.howIn(h, t)]
		}
		*[...]*float32{&out.MassExact, &out.MassRead, &out.MassScanned, &out.MassEstimated}[kind] += w
		spans.add(kind, s.positionOf(st, run, layer, h, t), w)
	}
	spans.endHead()
	out.MassExact += max(0, 1-sum) // learned sinks: part of the normaliser, but no token
	slices.SortFunc(tokens, func(a, b seen) int { return cmp.Compare(b.log, a.log) })
	for _, t := range tokens[:min(top, len(tokens))] {
		e := &kvtierv1.ExplainToken{Position: s.positionOf(st, run, layer, h, t), Weight: float32(math.Exp(float64(t.log - lse))), How: "exact"}
		if t.segment >= 0 {
			e.How = [...]string{"estimated", "scanned", "read"}[run.howIn(h, t)]
		}
		s.label(st, e)
		out.Tokens = append(out.Tokens, e)
	}
	return out
}

// positionOf finds the position of a token that query head h saw.
func (s *sequence) positionOf(st *state, run *explainRun, layer, h int, t seen) uint64 {
	if t.segment < 0 {
		return uint64(t.place)
	}
	head := h / s.spec.group()
	seg := st.spans[t.segment].segments[layer]
	if seg.Profile == tiers.ProfileExact {
		// Lossless rows are stored by position.
		return seg.Start + uint64(seg.Heads[head].Sinks+t.place)
	}
	return seg.Start + uint64(run.offsets[head][t.segment][t.place])
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
