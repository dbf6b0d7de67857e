package server

import (
	"cmp"
	"context"
	"math"
	"slices"
	"sync"

	"google.golang.org/grpc/codes"

	"kvtier/attention"
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
	return s.explain(ctx, int(r.Layer), top)
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
}

func (s *sequence) explain(ctx context.Context, layer, top int) (*kvtierv1.ExplainResponse, error) {
	s.mu.RLock()
	last := s.mu.last[layer]
	st := s.copyLocked()
	s.mu.RUnlock()
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
	c := &call{seq: s, st: &st, layer: layer, start: last.position, n: 1, q: last.q, budget: last.budget, trace: s.traceHow(run)}
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
	if err := s.byPosition(ctx, &st, layer, run); err != nil {
		return nil, err
	}
	out := &kvtierv1.ExplainResponse{Position: last.position, Account: c.account(0), PagesTotal: uint64(c.acc.PagesTotal),
		PagesScored: uint64(c.acc.Pages), LeavesScored: uint64(c.acc.Leaves), LeavesScanned: uint64(c.acc.Scans),
		LeavesRefined: uint64(c.acc.Refined), ValuesRead: uint64(c.acc.Read)}
	for h := range s.spec.queryHeads {
		run.addExactZone(all, h)
		e := s.explainHead(ctx, &st, run, h, layer, truth[h].LSE(), top)
		a, b := make([]float32, s.spec.headDim), make([]float32, s.spec.headDim)
		ps[h].Output(a)
		truth[h].Output(b)
		e.TrueError = attention.RelativeError(a, b)
		out.Heads = append(out.Heads, e)
	}
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

// byPosition renames the places of a sparse answer: with the profile exact,
// what reads everything reads lossless rows, which are stored by position.
func (s *sequence) byPosition(ctx context.Context, st *state, layer int, run *explainRun) error {
	segs := s.srv.segmentsOf(st, layer, st.sealed())
	for h, how := range run.how {
		renamed := make(map[[2]int]sparse.How, len(how))
		for at, x := range how {
			seg := segs[at[0]]
			if seg.Header.Profile != tiers.ProfileExact || seg.Cut() {
				renamed[at] = x
				continue
			}
			pos, err := s.offsetOf(ctx, seg.Header, h/s.spec.group(), at[1])
			if err != nil {
				return err
			}
			renamed[[2]int{at[0], pos - seg.Header.Heads[h/s.spec.group()].Sinks}] = x
		}
		run.how[h] = renamed
	}
	return nil
}

// offsetOf returns the offset from the segment's start of the token at a place.
func (s *sequence) offsetOf(ctx context.Context, h *tiers.Header, head, place int) (int, error) {
	pins, _, err := s.srv.store.Pin(ctx, []tiers.Request{{Header: h, Head: head, Plane: tiers.PlaneOrder}})
	if err != nil {
		return 0, err
	}
	defer pins[0].Release(0)
	return seal.View{D: h.HeadDim, Info: h.Heads[head]}.Positions(pins[0].Ranges[0])[place], nil
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
	gatherHead(k, sp, kb, h/sp.group())
	for i := range int(hi - lo) {
		score := attention.Softcap(attention.Dot(c.q[h*d:(h+1)*d], k[i*d:(i+1)*d]), sp.softcap)
		run.true[h] = append(run.true[h], seen{-1, int(lo) + i, score})
	}
}

func (s *sequence) explainHead(ctx context.Context, st *state, run *explainRun, h, layer int, lse float32, top int) *kvtierv1.ExplainHead {
	out := &kvtierv1.ExplainHead{QueryHead: uint32(h)}
	tokens := run.true[h]
	sum := float32(0)
	for _, t := range tokens {
		w := float32(math.Exp(float64(t.log - lse)))
		sum += w
		switch {
		case t.segment < 0:
			out.MassExact += w
		case run.how[h][[2]int{t.segment, t.place}] == sparse.Read:
			out.MassRead += w
		case run.how[h][[2]int{t.segment, t.place}] == sparse.Scanned:
			out.MassScanned += w
		default:
			out.MassEstimated += w
		}
	}
	out.MassExact += max(0, 1-sum) // the first tokens and learned sinks: never scored apart
	slices.SortFunc(tokens, func(a, b seen) int { return cmp.Compare(b.log, a.log) })
	for _, t := range tokens[:min(top, len(tokens))] {
		e := &kvtierv1.ExplainToken{Weight: float32(math.Exp(float64(t.log - lse))), How: "exact"}
		if t.segment < 0 {
			e.Position = uint64(t.place)
		} else {
			pos, err := s.positionOf(ctx, st, layer, h/s.spec.group(), t)
			if err != nil {
				continue
			}
			e.Position = pos
			e.How = [...]string{"estimated", "scanned", "read"}[run.how[h][[2]int{t.segment, t.place}]]
		}
		s.label(st, e)
		out.Tokens = append(out.Tokens, e)
	}
	return out
}

// positionOf finds the position of a stored token.
func (s *sequence) positionOf(ctx context.Context, st *state, layer, head int, t seen) (uint64, error) {
	h := s.srv.segmentsOf(st, layer, st.sealed())[t.segment].Header
	info := h.Heads[head]
	if h.Profile == tiers.ProfileExact {
		// Lossless rows are stored by position.
		return h.Start + uint64(info.Sinks+t.place), nil
	}
	off, err := s.offsetOf(ctx, h, head, t.place)
	return h.Start + uint64(off), err
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
