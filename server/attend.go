package server

import (
	"context"
	"fmt"
	"math"
	"math/rand/v2"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc/codes"

	"kvtier/attention"
	"kvtier/compress"
	kvtierv1 "kvtier/proto/kvtier/v1"
	"kvtier/server/sparse"
)

// recentTokens stay unsealed behind the newest token, so that they are attended exactly.
const recentTokens = 256

// budget is a checked budget.
type budget struct {
	mode   kvtierv1.AttendMode
	share  float32
	tokens uint64
	target float32
}

func (srv *Server) budgetOf(b *kvtierv1.Budget) (budget, error) {
	out := budget{mode: b.GetMode(), share: b.GetShare(), tokens: b.GetTokens(), target: b.GetTargetError()}
	switch out.mode {
	case kvtierv1.AttendMode_ATTEND_MODE_UNSPECIFIED:
		return budget{mode: kvtierv1.AttendMode_ATTEND_MODE_BUDGET, share: srv.opt.DefaultShare}, nil
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
	default:
		return out, invalid(ReasonArgument, "mode %d is unknown", out.mode)
	}
	return out, nil
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
	st := s.snapshot()
	if end := in.start + uint64(n); end > st.lens[in.layer] {
		return nil, fail(codes.OutOfRange, ReasonPastEnd, "queries at %d to %d, but layer %d has %d tokens: append them first, or in the same call",
			in.start, end-1, in.layer, st.lens[in.layer])
	}
	s.observe(in.layer, sampleOf(q, s.spec, in.start))
	for i := range q {
		q[i] *= s.spec.scale
	}
	c := &call{seq: s, st: &st, layer: in.layer, start: in.start, n: n, q: q, budget: in.budget}
	ps, err := c.answer(ctx)
	if err != nil {
		return nil, err
	}
	// What deeper layers will append for these positions comes from a sparse
	// answer; tokens that every layer has already do not.
	if pos := max(in.start, st.accepted); c.acc.Estimated > 0 && pos < in.start+uint64(n) {
		s.wasSparse(pos)
	}
	s.remember(c)
	for i := range own {
		ps[i].Merge(&own[i])
	}
	out := s.finish(ps)
	out.account = c.account(time.Since(begin))
	out.ack = s.ack()
	s.srv.metrics.observe(out.account)
	s.srv.auditor.consider(c, ps, own != nil)
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
	l := &lastQuery{position: c.start + uint64(c.n) - 1, budget: c.budget,
		q: append([]float32(nil), c.q[(c.n-1)*row:]...)}
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

// call is one query over a snapshot.
type call struct {
	seq    *sequence
	st     *state
	layer  int
	start  uint64
	n      int       // positions
	q      []float32 // [n][queryHeads][headDim], scaled
	budget budget
	trace  func(kvHead int) *sparse.Trace // or nil

	acc       sparse.Account
	exact     int64 // tokens of the exact zone, over positions and KV heads
	zoneBytes int64
	nsZone    int64
	mode      kvtierv1.AttendMode
}

// headResult is what one KV head's group gives.
type headResult struct {
	ps        []attention.Partial // [n*group], position-major
	acc       sparse.Account
	exact     int64
	zoneBytes int64
	nsZone    int64
}

// headsAtOnce is how many KV heads of a call are answered at the same time:
// more than there are cores, because they wait for the disk.
const headsAtOnce = 8

// answer computes partials [n][queryHeads].
func (c *call) answer(ctx context.Context) ([]attention.Partial, error) {
	sp := c.seq.spec
	res := make([]headResult, sp.kvHeads)
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(headsAtOnce)
	for h := range sp.kvHeads {
		g.Go(func() (err error) {
			// A panic here would be a defect, but it must not take other sequences down.
			defer func() {
				if r := recover(); r != nil {
					err = fmt.Errorf("attend: %v", r)
				}
			}()
			return c.head(ctx, h, &res[h])
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	ps := make([]attention.Partial, c.n*sp.queryHeads)
	grp := sp.group()
	for h := range res {
		for i := range c.n {
			copy(ps[i*sp.queryHeads+h*grp:], res[h].ps[i*grp:(i+1)*grp])
		}
		c.acc.Add(res[h].acc)
		c.exact += res[h].exact
		c.zoneBytes += res[h].zoneBytes
		c.nsZone += res[h].nsZone
	}
	c.mode = c.budget.mode
	if c.acc.Estimated == 0 {
		c.mode = kvtierv1.AttendMode_ATTEND_MODE_EXACT
	}
	return ps, nil
}

// groupQueries gathers the queries of one KV head's group, position-major.
func (c *call) groupQueries(head int) []float32 {
	sp := c.seq.spec
	d, g := sp.headDim, sp.group()
	out := make([]float32, 0, c.n*g*d)
	for i := range c.n {
		at := (i*sp.queryHeads + head*g) * d
		out = append(out, c.q[at:at+g*d]...)
	}
	return out
}

func (c *call) head(ctx context.Context, head int, res *headResult) error {
	sp := c.seq.spec
	q := c.groupQueries(head)
	res.ps = attention.NewPartials(c.n*sp.group(), sp.headDim)
	begin := time.Now()
	if err := c.exactZone(ctx, head, q, res); err != nil {
		return err
	}
	res.nsZone = time.Since(begin).Nanoseconds()
	if sp.window[c.layer] > 0 {
		return nil
	}
	return c.sealed(ctx, head, q, res)
}

// sealed attends to the sealed spans.
func (c *call) sealed(ctx context.Context, head int, q []float32, res *headResult) error {
	if c.st.sealed() == 0 {
		return nil
	}
	if c.start+1 >= c.st.sealed() {
		return c.together(ctx, head, q, res)
	}
	// A query inside the sealed part sees less of it than the next position does.
	sp := c.seq.spec
	g := sp.group()
	for i := range c.n {
		segs := c.seq.srv.segmentsOf(c.st, c.layer, c.start+uint64(i)+1)
		if err := c.ask(ctx, head, segs, q, res, i*g, (i+1)*g, 1); err != nil {
			return err
		}
	}
	return nil
}

// together answers positions that all see the whole sealed part. What may be
// read for a chunk is what its positions may read together: a chunk that may
// read everything once does, and shares it.
func (c *call) together(ctx context.Context, head int, q []float32, res *headResult) error {
	g := c.seq.spec.group()
	segs := c.seq.srv.segmentsOf(c.st, c.layer, c.st.sealed())
	if c.share()*float32(c.n) >= 1 || c.n == 1 {
		return c.ask(ctx, head, segs, q, res, 0, c.n*g, float32(c.n))
	}
	for i := range c.n {
		if err := c.ask(ctx, head, segs, q, res, i*g, (i+1)*g, 1); err != nil {
			return err
		}
	}
	return nil
}

// share is the share of the sealed bytes that one position may read.
func (c *call) share() float32 {
	switch {
	case c.budget.mode == kvtierv1.AttendMode_ATTEND_MODE_EXACT,
		c.start+uint64(c.n) <= uint64(c.seq.srv.opt.ReadAllTokens):
		return 1
	case c.budget.mode == kvtierv1.AttendMode_ATTEND_MODE_TARGET:
		return targetShares[0]
	case c.budget.tokens > 0:
		return min(1, float32(float64(c.budget.tokens)/float64(c.st.sealed())))
	}
	return c.budget.share
}

// targetShares are tried in turn until the estimated error is under the target.
var targetShares = []float32{.1, .2, .4, .7, 1}

// wholeShare is where reading in part no longer pays.
const wholeShare = .95

// ask answers rows [lo, hi) of the group, which stand for so many positions.
func (c *call) ask(ctx context.Context, head int, segs []sparse.Segment, q []float32, res *headResult, lo, hi int, positions float32) error {
	d := c.seq.spec.headDim
	var tr *sparse.Trace
	if c.trace != nil {
		tr = c.trace(head)
	}
	shares := []float32{min(1, c.share()*positions)}
	if c.budget.mode == kvtierv1.AttendMode_ATTEND_MODE_TARGET && shares[0] < 1 {
		shares = targetShares
	}
	for i, share := range shares {
		ps := res.ps[lo:hi]
		last := i == len(shares)-1
		if !last {
			ps = clonePartials(ps)
		}
		sq := sparse.Query{Head: head, Q: q[lo*d : hi*d], Softcap: c.seq.spec.softcap, Partials: ps}
		acc, err := sparse.Attend(ctx, c.seq.srv.store, segs, sq, sparse.Budget{All: share >= wholeShare, Share: share}, tr)
		if err != nil {
			return err
		}
		if !last && math.Hypot(float64(acc.Error), float64(acc.Codec)) > float64(c.budget.target) {
			res.acc.Moved.Add(acc.Moved) // what was read in vain counts too
			continue
		}
		copy(res.ps[lo:hi], ps)
		res.acc.Add(acc)
		return nil
	}
	return nil
}

func clonePartials(ps []attention.Partial) []attention.Partial {
	out := make([]attention.Partial, len(ps))
	for i, p := range ps {
		p.Out = append([]float32(nil), p.Out...)
		out[i] = p
	}
	return out
}

func (c *call) account(total time.Duration) *kvtierv1.Account {
	return &kvtierv1.Account{
		TokensExact: uint64(c.exact), TokensScanned: uint64(c.acc.Scanned), TokensRead: uint64(c.acc.Read),
		TokensEstimated: uint64(c.acc.Estimated), BytesRam: uint64(c.acc.Moved.RAM), BytesNvme: uint64(c.acc.Moved.NVMe),
		BytesFull: uint64(c.acc.Full), BytesExactZone: uint64(c.zoneBytes),
		EstimatedError: c.acc.Error, CodecError: c.acc.Codec,
		NsScore: uint64(c.acc.NsScore), NsScan: uint64(c.acc.NsScan), NsFetch: uint64(c.acc.NsFetch),
		NsExactZone: uint64(c.nsZone), NsTotal: uint64(total.Nanoseconds()), Mode: c.mode,
	}
}

// chance is true for a share of calls.
func chance(share float32) bool { return share > 0 && rand.Float32() < share }
