package server

import (
	"context"
	"math"
	"math/rand/v2"
	"time"

	"google.golang.org/grpc/codes"

	"kvtier/attention"
	"kvtier/compress"
	kvtierv1 "kvtier/proto/kvtier/v1"
)

// recentTokens stay unsealed behind the newest token, so that they are attended exactly.
const recentTokens = 256

// budget is a checked budget.
type budget struct {
	mode   kvtierv1.AttendMode
	share  float32
	tokens uint64
	target float32
	wait   time.Duration // for reads of keys and values, in mode budget; 0: for as long as it takes
}

// waitForever is the read_wait_us of a call that waits although the daemon's default is not to.
const waitForever = math.MaxUint32

func (srv *Server) budgetOf(b *kvtierv1.Budget) (budget, error) {
	out := budget{mode: b.GetMode(), share: b.GetShare(), tokens: b.GetTokens(), target: b.GetTargetError(), wait: srv.opt.ReadWait}
	switch us := b.GetReadWaitUs(); us {
	case 0:
	case waitForever:
		out.wait = 0
	default:
		out.wait = time.Duration(us) * time.Microsecond
	}
	switch out.mode {
	case kvtierv1.AttendMode_ATTEND_MODE_UNSPECIFIED:
		return budget{mode: kvtierv1.AttendMode_ATTEND_MODE_BUDGET, share: srv.opt.DefaultShare, wait: out.wait}, nil
	case kvtierv1.AttendMode_ATTEND_MODE_EXACT:
	case kvtierv1.AttendMode_ATTEND_MODE_BUDGET:
		if out.tokens == 0 && out.share == 0 {
			out.share = srv.opt.DefaultShare
		}
		if out.share < 0 || out.share > 1 || !finite(out.share) {
			return out, invalid(ReasonArgument, "share is %v, not in (0, 1]", out.share)
		}
	case kvtierv1.AttendMode_ATTEND_MODE_TARGET:
		if !(out.target > 0 && out.target < 1) {
			return out, invalid(ReasonArgument, "target_error is %v, not between 0 and 1", out.target)
		}
		out.tokens = 0
		if !(out.share >= 0 && out.share <= 1) {
			return out, invalid(ReasonArgument, "share is %v: for a target it is the most that may be read, from 0 (no limit) to 1", out.share)
		}
	default:
		return out, invalid(ReasonArgument, "mode %d is unknown", out.mode)
	}
	return out, nil
}

func (b budget) proto() *kvtierv1.Budget {
	us := uint32(waitForever)
	if b.wait > 0 {
		us = uint32(min(b.wait.Microseconds(), waitForever-1))
	}
	return &kvtierv1.Budget{Mode: b.mode, Share: b.share, Tokens: b.tokens, TargetError: b.target, ReadWaitUs: us}
}

// query is one item of an Attend, from either front end.
type query struct {
	layer   int
	start   uint64
	q       []byte // [n][queryHeads][headDim] of typ
	typ     compress.ElementType
	append  *appendRequest // or nil
	partial *workerPartial // or nil
	budget  budget
}

// workerPartial is what the worker attended itself.
type workerPartial struct {
	out, lse []byte // f32 [n][queryHeads][headDim] and [n][queryHeads]
}

// answer is the result of one item.
type answer struct {
	out, lse []float32
	account  *kvtierv1.Account
	ack      *kvtierv1.Ack
}

// lastQuery is the newest query of a layer, kept for Explain and audits.
type lastQuery struct {
	position uint64
	q        []float32 // [queryHeads][headDim], scaled
	budget   budget
	shares   []float32 // that its KV heads might read, in the end
	way      way
}

// attend appends, if the query asks for it, and answers.
func (s *sequence) attend(ctx context.Context, in *query) (*answer, error) {
	begin := time.Now()
	q, n, err := s.checkQuery(in)
	if err != nil {
		return nil, err
	}
	own, err := s.workerPartials(in.partial, n)
	if err != nil {
		return nil, err
	}
	if in.append != nil {
		if err := s.append(ctx, in.append); err != nil {
			return nil, err
		}
	} else if err := s.usable(); err != nil {
		return nil, err
	}
	st, err := s.readable(in.layer)
	if err != nil {
		return nil, err
	}
	if end := in.start + uint64(n); end > st.lens[in.layer] {
		return nil, fail(codes.OutOfRange, ReasonPastEnd, "queries at %d to %d, but layer %d has %d tokens: append them first, or in the same call",
			in.start, end-1, in.layer, st.lens[in.layer])
	}
	s.observe(in.layer, sampleOf(q, s.spec, in.start))
	for i := range q {
		q[i] *= s.spec.scale
	}
	c := &call{seq: s, st: &st, layer: in.layer, start: in.start, n: n, q: q, budget: in.budget}
	if in.budget.wait > 0 && in.budget.mode == kvtierv1.AttendMode_ATTEND_MODE_BUDGET {
		c.hurry(in.budget.wait)
	}
	ps, err := c.answer(ctx)
	if err != nil {
		return nil, err
	}
	// What deeper layers will append for these positions comes from a sparse
	// answer; tokens that every layer has already do not.
	if pos := max(in.start, st.accepted); c.acc.Estimated > 0 && pos < in.start+uint64(n) {
		s.wasSparse(pos)
	}
	s.steering.learn(c)
	s.remember(c)
	for i := range own {
		ps[i].Merge(&own[i])
	}
	out := s.finish(ps)
	out.account = c.account(time.Since(begin))
	out.ack = s.ack()
	s.srv.metrics.observe(out.account)
	s.srv.auditor.consider(c, ps, own != nil)
	s.srv.auditor.considerDevice(c)
	return out, nil
}

func (s *sequence) checkQuery(in *query) (q []float32, n int, err error) {
	sp := s.spec
	if in.layer < 0 || in.layer >= sp.layers {
		return nil, 0, invalid(ReasonShape, "layer %d: the model has %d", in.layer, sp.layers)
	}
	if in.typ == 0 {
		in.typ = compress.F32
	}
	if q, err = toFloats("q", in.q, in.typ); err != nil {
		return nil, 0, err
	}
	row := sp.queryHeads * sp.headDim
	if len(q) == 0 || len(q)%row != 0 {
		return nil, 0, invalid(ReasonShape, "q has %d elements, not a positive multiple of query_heads x head_dim = %d", len(q), row)
	}
	n = len(q) / row
	if err := checkMagnitude("q, scaled,", q, sp.scale); err != nil {
		return nil, 0, err
	}
	if in.start > 1<<40 {
		return nil, 0, invalid(ReasonArgument, "start %d is out of range", in.start)
	}
	if a := in.append; a != nil {
		a.layer, a.start, a.convert = in.layer, in.start, true
		if a.typ == 0 {
			a.typ = in.typ
		}
		if want := n * sp.kvHeads * sp.headDim * a.typ.Size(); len(a.k) != want {
			return nil, 0, invalid(ReasonShape, "k has %d bytes for %d queries, not %d", len(a.k), n, want)
		}
	}
	return q, n, nil
}

func (s *sequence) workerPartials(p *workerPartial, n int) ([]attention.Partial, error) {
	if p == nil {
		return nil, nil
	}
	rows, d := n*s.spec.queryHeads, s.spec.headDim
	if len(p.out) != rows*d*4 || len(p.lse) != rows*4 {
		return nil, invalid(ReasonShape, "the worker's partial has %d and %d bytes, not %d and %d", len(p.out), len(p.lse), rows*d*4, rows*4)
	}
	out, err := toFloats("partial_output", p.out, compress.F32)
	if err != nil {
		return nil, err
	}
	lse := make([]float32, rows)
	compress.ToFloat32(lse, p.lse, compress.F32)
	ps := make([]attention.Partial, rows)
	for i := range ps {
		if !finite(lse[i]) && !math.IsInf(float64(lse[i]), -1) {
			return nil, invalid(ReasonValue, "partial_lse holds NaN or +infinity")
		}
		ps[i] = attention.FromOutput(out[i*d:(i+1)*d], lse[i])
	}
	return ps, nil
}

// wasSparse notes that tokens from pos on are computed from a sparse answer.
func (s *sequence) wasSparse(pos uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if pos >= s.mu.exactUntil {
		return
	}
	s.mu.exactUntil = pos
	// Blocks named as exact that reach past pos lose their name.
	if keep := int(pos / blockTokens); keep < len(s.mu.names) {
		s.srv.names.remove(s, s.mu.names[keep:])
		s.mu.names = s.mu.names[:keep:keep]
		s.extendNamesLocked()
	}
}

func (s *sequence) remember(c *call) {
	row := s.spec.queryHeads * s.spec.headDim
	l := &lastQuery{position: c.start + uint64(c.n) - 1, budget: c.budget, way: c.way,
		q: append([]float32(nil), c.q[(c.n-1)*row:]...)}
	for h := range c.heads {
		l.shares = append(l.shares, c.heads[h].share)
	}
	s.mu.Lock()
	s.mu.last[c.layer] = l
	s.mu.used = time.Now()
	s.mu.Unlock()
}

func (s *sequence) finish(ps []attention.Partial) *answer {
	d := s.spec.headDim
	a := &answer{out: make([]float32, len(ps)*d), lse: make([]float32, len(ps))}
	for i := range ps {
		ps[i].Output(a.out[i*d : (i+1)*d])
		a.lse[i] = ps[i].LSE()
	}
	return a
}

// chance is true for a share of calls.
func chance(share float32) bool { return share > 0 && rand.Float32() < share }
