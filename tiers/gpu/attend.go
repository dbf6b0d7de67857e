package gpu

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"

	"kvtier/attention"
	"kvtier/tiers"
	"kvtier/tiers/gpu/kernels"
)

// Segment is a sealed segment that a query reads, all of its tokens.
type Segment struct {
	Header *tiers.Header
	Low    bool // bits 5 to 8 are stored
}

// attender attends to what the tier holds.
type attender struct {
	tier    *Tier
	kernels *kernels.Attention
	frees   sync.WaitGroup // of plans, under way
	mu      struct {
		sync.Mutex
		plans map[planKey]*kept
		clock int64 // of uses
		bytes int   // of the plans' tables
	}
}

// planKey is what plans are found by: what they hold for is compared then.
type planKey struct {
	first, last *tiers.Header
	segments    int
}

// kept is a plan in device memory, kept for the next query of the same segments.
type kept struct {
	tables  kernels.Tables
	where   []*table // of each segment: another one says that it lies elsewhere now
	lows    []bool
	uses    int // answers under way
	used    int64
	dropped bool // freed with the last answer
}

// mostPlanBytes limits what plans take of device memory, beside the tier's limit: a plan has about
// .9 bytes a token and layer of 8 heads.
const mostPlanBytes = 256 << 20

// rowsAtOnce is how many query rows of a head are answered together; more take turns, so that partials of splits have bounded room.
const rowsAtOnce = kernels.MostRows

// Choice says how much of what the tier holds is read. The zero Choice is everything.
type Choice struct {
	// Share of the pages that each position of a query may read, in (0, 1]; rows that are answered together read what their positions may read
	// together, and everything where that is not worth a choice. 0: everything.
	Share float32
	// Group is how many rows a position has.
	Group int
	// Above is how many tokens the tier has to hold of the layer's for a choice to be made: more than that.
	Above int64
}

const (
	// leastShare of the pages is read whatever may be: to scan costs as much as to read a tenth.
	leastShare = .05
	// mostShare is where a choice would save less than it takes.
	mostShare = .5
)

// of returns the share, in 2^-16, of so many rows that are answered together.
func (c Choice) of(rows int) uint32 {
	positions := (rows + max(1, c.Group) - 1) / max(1, c.Group)
	if share := c.Share * float32(positions); share > 0 && share < mostShare {
		return uint32(max(share, leastShare) * kernels.Everything)
	}
	return kernels.Everything
}

// Answer is the attention over the segments that the tier held.
type Answer struct {
	// Held says which of the segments asked for take part.
	Held []bool
	// Bytes is what kernels read of them, once Wait has returned.
	Bytes int64
	// Scanned, Read and Estimated count, once Wait has returned, tokens over KV heads, and where pages are chosen over the blocks of rows that do so together.
	Scanned, Read, Estimated int64
	// Errors [heads][rows] is, once Wait has returned, how far each output may lie from that of everything, as a distance, by what is known of the pages
	// that were not read; nil if all were.
	Errors []float64

	choice  Choice
	a       *attender
	plan    *kept
	leases  []lease
	q       []float32
	softcap float32
	heads   int
	rows    int
	under   *kernels.Answer // under way: rowsAtOnce of the rows, or what is left
}

// Attends says whether a segment would be attended on the device if it were there.
func (t *Tier) Attends(h *tiers.Header) bool {
	return t.attender != nil && kernels.Supported(h) && kernels.Fit(h.HeadDim, t.dev.Info())
}

// Attend begins to attend to those of the segments, all of one layer, that the tier holds whole: every stored token of them is
// read, or as much as choice says. q is [heads][rows][d], scaled. It returns nil if the tier holds none. What it
// returns must be waited for. Errors are of the device; the segments can be answered from below.
func (t *Tier) Attend(ctx context.Context, segments []Segment, q []float32, softcap float32, choice Choice) (*Answer, error) {
	if t.attender == nil || len(segments) == 0 {
		return nil, nil
	}
	if err := t.usable(ctx); err != nil {
		return nil, fmt.Errorf("gpu: attend: %w", err)
	}
	all := t.leaseAll(segments)
	n := &Answer{Held: make([]bool, len(segments)), a: t.attender, q: q, softcap: softcap, choice: choice}
	of := make([]Segment, 0, len(segments))
	for i, l := range all {
		if l.segment != nil {
			n.Held[i], of = true, append(of, segments[i])
			all[len(of)-1] = l
		}
	}
	if n.leases = all[:len(of)]; len(of) == 0 {
		return nil, nil
	}
	if err := n.patiently(func() error { return n.start(ctx, of) }); err != nil {
		return nil, fmt.Errorf("gpu: attend: %w", asTier(err))
	}
	return n, nil
}

// patiently starts something of the answer. If it fails, or is left, that is the answer's end.
func (n *Answer) patiently(start func() error) error {
	t := n.a.tier
	return t.patiently(background, t.patience, func() error {
		err := start()
		if err != nil {
			n.end()
		}
		return err
	}, func(err error) {
		if err == nil {
			_, _ = n.under.Wait(background)
			n.end()
		}
	})
}

func (n *Answer) start(ctx context.Context, of []Segment) (err error) {
	h := of[0].Header
	n.heads = len(h.Heads)
	row := n.heads * h.HeadDim
	if len(n.q) == 0 || len(n.q)%row != 0 {
		return fmt.Errorf("a query of %d numbers for %d heads of %d", len(n.q), n.heads, h.HeadDim)
	}
	n.rows = len(n.q) / row
	if n.plan, err = n.a.plan(ctx, of, n.leases); err != nil {
		return err
	}
	plan := n.plan.tables.Plan()
	if plan.Tokens <= n.choice.Above*int64(n.heads) {
		n.choice = Choice{}
	}
	n.under, err = n.begin(ctx, 0)
	return err
}

// begin starts rows from lo on.
func (n *Answer) begin(ctx context.Context, lo int) (*kernels.Answer, error) {
	return n.a.kernels.StartChoosing(ctx, n.plan.tables, n.block(lo), n.softcap, n.choice.of(min(rowsAtOnce, n.rows-lo)))
}

// block returns the query's rows from lo on, rowsAtOnce or what is left, of all heads.
func (n *Answer) block(lo int) []float32 {
	if n.rows <= rowsAtOnce {
		return n.q
	}
	d, hi := len(n.q)/n.heads/n.rows, min(lo+rowsAtOnce, n.rows)
	out := make([]float32, 0, n.heads*(hi-lo)*d)
	for h := range n.heads {
		out = append(out, n.q[(h*n.rows+lo)*d:(h*n.rows+hi)*d]...)
	}
	return out
}

// Wait returns the partials, [heads][rows]. If the device does not answer, the error is ErrStuck after Options.Patience: what it
// was asked goes on without anybody, and keeps its segments where they are.
func (n *Answer) Wait() ([]attention.Partial, error) {
	t := n.a.tier
	ctx, cancel := context.WithTimeout(background, t.patience)
	defer cancel()
	out := make([]attention.Partial, n.heads*n.rows)
	for lo := 0; lo < n.rows; lo += rowsAtOnce {
		if lo > 0 {
			err := n.patiently(func() (err error) { n.under, err = n.begin(background, lo); return err })
			if err != nil {
				return nil, fmt.Errorf("gpu: attend: %w", asTier(err))
			}
		}
		ps, err := n.under.Wait(ctx)
		if err != nil && ctx.Err() != nil {
			t.late.Add(1)
			go n.outlast()
			return nil, fmt.Errorf("gpu: attend: %w: nothing came in %v", ErrStuck, t.patience)
		}
		if err != nil {
			n.end()
			return nil, asTier(err)
		}
		rows := len(ps) / n.heads
		for h := range n.heads {
			copy(out[h*n.rows+lo:], ps[h*rows:(h+1)*rows])
		}
		n.addCost(lo, rows, n.under.Unread())
		n.addErrors(lo, rows, ps, n.under.Unread())
	}
	n.end()
	return out, nil
}

// addCost adds up what answering rows from lo on took.
func (n *Answer) addCost(lo, rows int, unread []kernels.Unread) {
	scanned, read, estimated, bytes := n.plan.tables.Plan().Cost(rows, n.choice.of(rows), unread)
	n.Bytes += bytes
	if lo == 0 || unread != nil {
		n.Scanned, n.Read, n.Estimated = n.Scanned+scanned, n.Read+read, n.Estimated+estimated
	}
}

// addErrors takes over what of rows from lo on, [heads][rows], was not read.
func (n *Answer) addErrors(lo, rows int, ps []attention.Partial, unread []kernels.Unread) {
	if unread == nil {
		return
	}
	if n.Errors == nil {
		n.Errors = make([]float64, n.heads*n.rows)
	}
	for i, u := range unread {
		n.Errors[i/rows*n.rows+lo+i%rows] = u.Error(&ps[i])
	}
}

// outlast ends an answer that was given up, once the device has done with it.
func (n *Answer) outlast() {
	<-n.under.Done()
	n.end()
	n.a.tier.late.Add(-1)
}

func (n *Answer) end() {
	if n.leases != nil {
		n.leases[0].tier.releaseAll(n.leases)
	}
	n.leases = nil
	if n.plan != nil {
		n.a.done(n.plan)
	}
	n.plan = nil
}

// plan returns the plan of segments that are leased, for one use.
func (a *attender) plan(ctx context.Context, of []Segment, leases []lease) (*kept, error) {
	key := planKey{of[0].Header, of[len(of)-1].Header, len(of)}
	a.mu.Lock()
	a.mu.clock++
	p := a.mu.plans[key]
	if p != nil && p.holds(of, leases) {
		p.uses++
		p.used = a.mu.clock
		a.mu.Unlock()
		return p, nil
	}
	a.mu.Unlock()
	segments := make([]kernels.Segment, len(of))
	for i, s := range of {
		l := &leases[i]
		segments[i] = kernels.Segment{Header: s.Header, Low: s.Low, At: func(head int, p tiers.Plane) kernels.Address { return kernels.Address(l.at(head, p)) }}
	}
	warps, err := a.kernels.Warps(ctx, of[0].Header.HeadDim)
	if err != nil {
		return nil, err
	}
	p = &kept{uses: 1}
	if p.tables, err = a.kernels.Upload(ctx, kernels.NewPlan(segments, warps)); err != nil {
		return nil, err
	}
	for i, s := range of {
		p.where, p.lows = append(p.where, leases[i].table), append(p.lows, s.Low)
	}
	a.mu.Lock()
	old := a.mu.plans[key]
	a.mu.plans[key] = p
	p.used = a.mu.clock
	a.mu.bytes += p.tables.Bytes()
	gone := a.makeRoomLocked(old)
	a.mu.Unlock()
	return p, a.free(gone)
}

// holds says whether the plan is of these segments, where they lie now.
func (p *kept) holds(of []Segment, leases []lease) bool {
	for i, s := range of {
		if p.where[i] != leases[i].table || p.lows[i] != s.Low {
			return false
		}
	}
	return true
}

// makeRoomLocked takes out a plan that was replaced, and the least recently used ones beyond the limit. It returns those that nobody uses.
func (a *attender) makeRoomLocked(old *kept) (gone []*kept) {
	drop := func(p *kept) {
		p.dropped = true
		a.mu.bytes -= p.tables.Bytes()
		if p.uses == 0 {
			gone = append(gone, p)
		}
	}
	if old != nil {
		drop(old)
	}
	for a.mu.bytes > mostPlanBytes && len(a.mu.plans) > 1 {
		var oldest planKey
		for k, p := range a.mu.plans {
			if o := a.mu.plans[oldest]; o == nil || p.used < o.used {
				oldest = k
			}
		}
		drop(a.mu.plans[oldest])
		delete(a.mu.plans, oldest)
	}
	return gone
}

// done ends a use.
func (a *attender) done(p *kept) {
	a.mu.Lock()
	p.uses--
	last := p.uses == 0 && p.dropped
	a.mu.Unlock()
	if last {
		a.frees.Go(func() { _ = a.free([]*kept{p}) }) // it waits for others' answers; an error is the device's, and the next call's
	}
}

func (a *attender) free(plans []*kept) error {
	var errs []error
	for _, p := range plans {
		errs = append(errs, a.kernels.FreeTables(background, p.tables))
	}
	return errors.Join(errs...)
}

// close frees the plans. No answer is under way.
func (a *attender) close() error {
	a.frees.Wait()
	a.mu.Lock()
	all := slices.Collect(maps.Values(a.mu.plans))
	clear(a.mu.plans)
	a.mu.Unlock()
	return errors.Join(a.free(all), a.kernels.Close(background))
}

// newAttender makes a device ready to attend.
func newAttender(t *Tier) (*attender, error) {
	k, err := kernels.New(background, t.dev)
	if err != nil {
		return nil, err
	}
	a := &attender{tier: t, kernels: k}
	a.mu.plans = map[planKey]*kept{}
	return a, nil
}
