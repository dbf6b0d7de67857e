package server

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"

	"kvtier/attention"
	kvtierv1 "kvtier/proto/kvtier/v1"
	"kvtier/server/sparse"
	"kvtier/tiers"
)

// call is one query over a snapshot.
type call struct {
	seq    *sequence
	st     *state
	layer  int
	start  uint64
	n      int       // positions
	q      []float32 // [n][queryHeads][headDim], scaled
	budget budget
	shares []float32                      // [kvHeads]; nil: as the budget and what is known of the heads say
	trace  func(kvHead int) *sparse.Trace // or nil
	device *deviceAnswer                  // or nil
	// hasty reads keys and values that may be late, patient all else; nil: everything is waited for.
	hasty, patient sparse.Reader
	patience       *tiers.Patience // of hasty; or nil
	way            way

	segs      []sparse.Segment // of the whole sealed part, as the call reads it; see sealedSegments
	byHead    []float32        // q as [kvHeads][n][group][headDim]
	acc       sparse.Account
	codec     float32 // the stored rows' error, which audits do not see
	stated    statement
	missed    bool  // the target
	exact     int64 // tokens of the exact zone, over positions and KV heads
	zoneBytes int64
	nsZone    int64
	mode      kvtierv1.AttendMode
	heads     []headResult
}

// headResult is what one KV head's group gives.
type headResult struct {
	zone      []attention.Partial // [n*group], position-major: the exact zone alone
	ps        []attention.Partial // [n*group]
	share     float32             // that the last answer might read, a position
	acc       sparse.Account
	vain      tiers.Moved // bytes of narrower answers, which were not good enough
	exact     int64
	zoneBytes int64
	nsZone    int64
	onDevice  bool    // segments in the GPU's memory are left to it
	unread    float32 // the raw error by pages of those that it did not read
}

// hurry has the call wait for reads of keys and values for so long, and no longer: do nothing else, that is, in any of its heads.
func (c *call) hurry(wait time.Duration) {
	st := c.seq.srv.store
	c.patience = tiers.NewPatience(wait)
	c.hasty = st.Within(c.patience)
	// As the store itself, but that the call's end does not wait for a disk that is stuck.
	c.patient = st.Within(tiers.NewPatience(math.MaxInt64))
}

// reader reads what is waited for.
func (c *call) reader() sparse.Reader {
	if c.patient != nil {
		return c.patient
	}
	return c.seq.srv.store
}

// headsAtOnce is how many KV heads of a call are answered at the same time:
// more than there are cores, because they wait for the disk.
const headsAtOnce = 8

// answer computes partials [n][queryHeads]. If low planes went meanwhile, because the sequence has outgrown reading them, it does so anew without them.
func (c *call) answer(ctx context.Context) ([]attention.Partial, error) {
	again := c.shares == nil // what was answered before is answered as it was
	for {
		c.segs = c.seq.srv.segmentsOf(c.st, c.layer, c.st.sealed())
		ps, err := c.answerOnce(ctx, again)
		if !errors.Is(err, tiers.ErrNotFound) || slices.Equal(c.segs, c.seq.srv.segmentsOf(c.st, c.layer, c.st.sealed())) {
			return ps, err
		}
	}
}

// sealedSegments are those of the whole sealed part.
func (c *call) sealedSegments() []sparse.Segment {
	if c.segs != nil {
		return c.segs
	}
	return c.seq.srv.segmentsOf(c.st, c.layer, c.st.sealed())
}

func (c *call) answerOnce(ctx context.Context, again bool) ([]attention.Partial, error) {
	sp := c.seq.spec
	c.heads, c.device = make([]headResult, sp.kvHeads), nil
	c.exact, c.zoneBytes, c.nsZone = 0, 0, 0
	if again {
		c.way = c.chooseWay()
		c.shares = c.firstShares()
	}
	for h := range c.heads {
		c.heads[h].share = c.shares[h]
	}
	c.byHead = c.gatherQueries()
	c.device = c.startDevice(ctx)
	defer c.device.wait(c.seq.srv.store)
	if err := c.ask(ctx, func(int) bool { return true }); err != nil {
		return nil, err
	}
	if c.budget.mode == kvtierv1.AttendMode_ATTEND_MODE_TARGET && sp.window[c.layer] == 0 {
		if err := c.widen(ctx, again); err != nil {
			return nil, err
		}
	}
	ps := make([]attention.Partial, c.n*sp.queryHeads)
	grp := sp.group()
	for h := range c.heads {
		res := &c.heads[h]
		for i := range c.n {
			copy(ps[i*sp.queryHeads+h*grp:], res.ps[i*grp:(i+1)*grp])
		}
		res.acc.Moved.Add(res.vain)
		c.exact += res.exact
		c.zoneBytes += res.zoneBytes
		c.nsZone += res.nsZone
	}
	c.sum()
	c.mode = c.budget.mode
	if c.acc.Estimated == 0 && c.acc.Late == 0 {
		c.mode = kvtierv1.AttendMode_ATTEND_MODE_EXACT
	}
	return ps, nil
}

// sum adds the heads' accounts up and states the error.
func (c *call) sum() {
	c.acc = sparse.Account{}
	for h := range c.heads {
		c.acc.Add(c.heads[h].acc)
	}
	c.acc.Add(c.device.account())
	if c.device.chose() {
		c.acc.Error = 0
		for h := range c.heads {
			c.acc.Error += c.heads[h].rawError() / float32(len(c.heads))
		}
	}
	c.codec = c.storedErrors(func(head int) float64 { return c.heads[head].sealedMass() })
	c.stated = statement{}
	if c.acc.Estimated > 0 {
		c.stated = c.seq.srv.calibration.state(c.seq.key(), c.layer, c.kind(), c.acc.Error)
	}
}

// rawError is the estimated error, as if what the host and the GPU did not read erred independently.
func (res *headResult) rawError() float32 {
	return float32(math.Hypot(float64(res.acc.Error), float64(res.unread)))
}

func (c *call) kind() kind {
	if c.device.chose() {
		return kindOf(c.budget, c.asked()).onDevice()
	}
	if c.way == byPage {
		return kindOf(c.budget, c.share()).ofPages()
	}
	return kindOf(c.budget, c.share())
}

// ask answers the chosen KV heads, each with its share.
func (c *call) ask(ctx context.Context, chosen func(head int) bool) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(headsAtOnce)
	for h := range c.heads {
		if !chosen(h) {
			continue
		}
		g.Go(func() (err error) {
			// A panic here would be a defect, but it must not take other sequences down.
			defer func() {
				if r := recover(); r != nil {
					err = fmt.Errorf("attend: %v", r)
				}
			}()
			if c.patience != nil {
				c.patience.Join()
				defer c.patience.Leave()
			}
			return c.head(ctx, h, &c.heads[h])
		})
	}
	return g.Wait()
}

// gatherQueries brings the queries into the order of KV heads, those of a group position-major. Those of one position are in it.
func (c *call) gatherQueries() []float32 {
	if c.n == 1 {
		return c.q
	}
	sp := c.seq.spec
	group := sp.group() * sp.headDim
	out := make([]float32, 0, len(c.q))
	for head := range sp.kvHeads {
		for i := range c.n {
			at := (i*sp.kvHeads + head) * group
			out = append(out, c.q[at:at+group]...)
		}
	}
	return out
}

// groupQueries are the queries of one KV head's group, position-major.
func (c *call) groupQueries(head int) []float32 {
	n := len(c.byHead) / c.seq.spec.kvHeads
	return c.byHead[head*n : (head+1)*n : (head+1)*n]
}

// head answers one KV head's group. Called again it answers with the share
// that res holds by then, and keeps account of what was read before.
func (c *call) head(ctx context.Context, head int, res *headResult) error {
	sp := c.seq.spec
	q := c.groupQueries(head)
	if res.zone == nil {
		res.ps = attention.NewPartials(c.n*sp.group(), sp.headDim)
		begin := time.Now()
		if err := c.exactZone(ctx, head, q, res); err != nil {
			return err
		}
		res.nsZone = time.Since(begin).Nanoseconds()
		res.zone = res.ps
	}
	res.vain.Add(res.acc.Moved)
	res.acc = sparse.Account{}
	if sp.window[c.layer] > 0 {
		return nil
	}
	res.ps = attention.ClonePartials(res.zone)
	if c.device == nil {
		return c.sealed(ctx, head, q, res)
	}
	return c.withDevice(ctx, head, q, res)
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
		if err := c.rows(ctx, head, segs, q, res, i*g, (i+1)*g, 1); err != nil {
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
	segs := c.sealedSegments()
	if res.onDevice {
		segs = c.device.held(false)
	}
	if res.share*float32(c.n) >= 1 || c.n == 1 {
		return c.rows(ctx, head, segs, q, res, 0, c.n*g, float32(c.n))
	}
	for i := range c.n {
		if err := c.rows(ctx, head, segs, q, res, i*g, (i+1)*g, 1); err != nil {
			return err
		}
	}
	return nil
}

// share is the share of the sealed bytes that one position may read, before
// budgets are moved among heads; in mode target the most it may read.
func (c *call) share() float32 {
	switch c.way {
	case whole:
		return 1
	case byPage:
		return c.times(pageFactor)
	}
	return c.asked()
}

// asked is that share, wherever the bytes lie.
func (c *call) asked() float32 { return c.times(1) }

// times is so many times the bytes of what the budget says.
func (c *call) times(factor float32) float32 {
	switch {
	case c.budget.mode == kvtierv1.AttendMode_ATTEND_MODE_EXACT,
		c.start+uint64(c.n) <= uint64(c.seq.srv.opt.ReadAllTokens),
		c.budget.mode == kvtierv1.AttendMode_ATTEND_MODE_TARGET && c.budget.share == 0:
		return 1
	case c.budget.tokens > 0:
		return min(1, sparse.MeansShare(c.seq.spec.headDim)+factor*float32(float64(c.budget.tokens)/float64(c.st.sealed())))
	}
	return min(1, factor*c.budget.share)
}

// wholeShare is where reading in part no longer pays.
const wholeShare = .95

// rows answers rows [lo, hi) of the group, which stand for so many positions.
func (c *call) rows(ctx context.Context, head int, segs []sparse.Segment, q []float32, res *headResult, lo, hi int, positions float32) error {
	d := c.seq.spec.headDim
	var tr *sparse.Trace
	if c.trace != nil {
		tr = c.trace(head)
	}
	share := min(1, res.share*positions)
	sq := sparse.Query{Head: head, Q: q[lo*d : hi*d], Softcap: c.seq.spec.softcap, Hasty: c.hasty, Partials: res.ps[lo:hi]}
	acc, err := sparse.Attend(ctx, c.reader(), segs, sq, sparse.Budget{All: share >= wholeShare, Share: share, ByPage: c.way == byPage}, tr)
	if err != nil {
		return err
	}
	res.acc.Add(acc)
	return nil
}

// storedError is the error of what is stored of a head, mean over segments.
func storedError(segs []sparse.Segment, head int) float32 {
	var sum float32
	for _, s := range segs {
		sum += s.StoredError(head)
	}
	return sum / float32(max(1, len(segs)))
}

func (c *call) account(total time.Duration) *kvtierv1.Account {
	return &kvtierv1.Account{
		TokensExact: uint64(c.exact), TokensScanned: uint64(c.acc.Scanned), TokensRead: uint64(c.acc.Read),
		TokensEstimated: uint64(c.acc.Estimated), BytesGpu: uint64(c.acc.Moved.GPU), BytesRam: uint64(c.acc.Moved.RAM), BytesNvme: uint64(c.acc.Moved.NVMe),
		BytesFull: uint64(c.acc.Full), BytesExactZone: uint64(c.zoneBytes),
		EstimatedError: c.stated.estimate, CodecError: c.codec,
		NsScore: uint64(c.acc.NsScore), NsScan: uint64(c.acc.NsScan), NsFetch: uint64(c.acc.NsFetch),
		NsExactZone: uint64(c.nsZone), NsTotal: uint64(total.Nanoseconds()), Mode: c.mode,
		ErrorP95: c.stated.p95, CalibrationAudits: uint32(c.stated.audits), TargetMissed: c.missed,
		TokensLate: uint64(c.acc.Late), BytesLate: uint64(c.acc.LateBytes),
	}
}
