package store

import (
	"context"
	"errors"
	"math"
	"slices"
	"sync"
	"sync/atomic"

	"golang.org/x/time/rate"

	"kvtier/tiers"
)

// Promotion: a piece that queries had to read from NVMe is brought into RAM
// once they have read about as much of it as it holds, sooner if their answers
// gave what they read much attention, and after a part of that while there is room for it: after a start nothing
// has to go for it. RAM's own policy then says whether it earns its room; if it does not, it stays below.
const (
	roomyInterest = 1. / 8  // part of it that is enough while there is room
	promoteQueue  = 4096    // pieces waiting; more are forgotten
	interestMost  = 1 << 16 // pieces remembered before all counts are halved
)

type pieceKey struct {
	id    tiers.ID
	head  int
	plane tiers.Plane
}

// promoter brings pieces up in the background: one goroutine owns the RAM
// tier's growth. It reads from NVMe no more than its budget, so that queries,
// which wait for what they read there, have the rest of the disk.
type promoter struct {
	s      *Store
	queue  chan tiers.Request
	budget *rate.Limiter   // bytes
	bytes  atomic.Int64    // read to be brought up
	ctx    context.Context // ends with the store
	cancel context.CancelFunc
	done   sync.WaitGroup
	mu     struct {
		sync.Mutex
		interest map[pieceKey]float32 // reads from below, in whole pieces, and attention received
	}
}

// newPromoter brings up so many bytes a second at most; 0: any number.
func newPromoter(s *Store, perSecond int64) *promoter {
	ctx, cancel := context.WithCancel(context.Background())
	p := &promoter{s: s, queue: make(chan tiers.Request, promoteQueue), budget: rate.NewLimiter(rate.Inf, 0), ctx: ctx, cancel: cancel}
	if perSecond > 0 {
		p.budget = rate.NewLimiter(rate.Limit(perSecond), int(min(perSecond, math.MaxInt32)))
	}
	p.mu.interest = map[pieceKey]float32{}
	p.done.Add(1)
	go func() {
		defer p.done.Done()
		for {
			select {
			case <-ctx.Done():
				return
			case r := <-p.queue:
				p.bringUp(r)
			}
		}
	}()
	return p
}

// bringUp brings a piece up, as soon as the budget allows it.
func (p *promoter) bringUp(r tiers.Request) {
	_, n, _ := r.Header.Piece(r.Head, r.Plane)
	if p.s.ram.Resident(r.Header.ID, r.Head, r.Plane) || !p.pay(n) {
		return
	}
	p.bytes.Add(int64(n))
	p.s.bringUp(p.ctx, []tiers.Request{r}, p.s.ram.Put)
}

// pay waits until n bytes are in the budget; false: the store is closed.
func (p *promoter) pay(n int) bool {
	for most := p.budget.Burst(); p.budget.Limit() != rate.Inf && n > 0; n -= most {
		if p.budget.WaitN(p.ctx, min(n, most)) != nil {
			return false
		}
	}
	return p.ctx.Err() == nil
}

// background does some work until it is done or the store is closed.
func (p *promoter) background(work func(ctx context.Context)) {
	p.done.Add(1)
	go func() {
		defer p.done.Done()
		work(p.ctx)
	}()
}

func (p *promoter) close() {
	p.cancel()
	p.done.Wait()
}

// watch counts a read from below when its pin is released: the share of the piece that was
// transferred, or would have been had it not been late, and the attention it received.
func (p *promoter) watch(r tiers.Request, pin tiers.Pin) tiers.Pin {
	_, n, _ := r.Header.Piece(r.Head, r.Plane)
	reads := float32(pin.Transferred+pin.Late) / float32(max(n, tiers.BlockSize))
	share := min(1, float32(pin.Transferred+pin.Cached)/float32(max(n, 1)))
	out := tiers.NewPin(pin.Ranges, pin.Transferred, func(attention float32) {
		pin.Release(attention)
		p.credit(r, reads+attention*share)
	})
	out.Cached, out.Late = pin.Cached, pin.Late
	return out
}

// credit raises the interest in a piece; at 1 it is brought up.
func (p *promoter) credit(r tiers.Request, by float32) {
	if by <= 0 {
		return
	}
	k := pieceKey{r.Header.ID, r.Head, r.Plane}
	p.mu.Lock()
	c := p.mu.interest[k] + by
	p.mu.interest[k] = c
	if len(p.mu.interest) > interestMost {
		p.halveLocked()
	}
	p.mu.Unlock()
	if c >= 1 || c >= roomyInterest && p.s.ram.Room(r.Header, r.Head, r.Plane) {
		p.mu.Lock()
		delete(p.mu.interest, k)
		p.mu.Unlock()
		p.want(r)
	}
}

func (p *promoter) halveLocked() {
	for k, c := range p.mu.interest {
		if c /= 2; c < 1.0/64 {
			delete(p.mu.interest, k)
		} else {
			p.mu.interest[k] = c
		}
	}
}

// want queues a piece; if the queue is full it is forgotten: it will be wanted again.
func (p *promoter) want(r tiers.Request) {
	r.Ranges = nil
	select {
	case p.queue <- r:
	default:
	}
}

// bringUpFirst brings what every query reads of all segments into RAM, the means of pages before the rest: after a start
// it lies on disk alone. A plane's heads lie next to each other: they are one read.
func (s *Store) bringUpFirst(ctx context.Context) {
	s.mu.RLock()
	headers := make([]*tiers.Header, 0, len(s.mu.headers))
	for _, h := range s.mu.headers {
		headers = append(headers, h)
	}
	s.mu.RUnlock()
	for plane := range tiers.NumPlanes {
		if !everyQuery.Has(plane) {
			continue
		}
		for rest := headers; len(rest) > 0 && ctx.Err() == nil; {
			some := rest[:min(segmentsAtOnce, len(rest))]
			rest = rest[len(some):]
			s.bringUp(ctx, wholePlane(some, plane), s.ram.Prime)
		}
	}
}

// segmentsAtOnce is of how many segments a plane is read together: as many reads as the disk has under way at once.
const segmentsAtOnce = 32

// wholePlane asks for a plane of all heads of segments.
func wholePlane(headers []*tiers.Header, plane tiers.Plane) (reqs []tiers.Request) {
	for _, h := range headers {
		for head := range h.Heads {
			if _, _, ok := h.Piece(head, plane); ok {
				reqs = append(reqs, tiers.Request{Header: h, Head: head, Plane: plane})
			}
		}
	}
	return reqs
}

// bringUp reads whole pieces that are not in RAM yet from NVMe and puts them there, one by one: what does not earn
// its room stays below.
func (s *Store) bringUp(ctx context.Context, reqs []tiers.Request, put func(context.Context, *tiers.Header, []tiers.Piece) error) {
	reqs = slices.DeleteFunc(reqs, func(r tiers.Request) bool { return s.ram.Resident(r.Header.ID, r.Head, r.Plane) })
	pins, err := s.nvme.Pin(ctx, reqs)
	if err != nil {
		s.noteDamage(reqs, err)
		return // queries say so, too
	}
	defer releaseAll(pins)
	for i, r := range reqs {
		if !pins[i].Held() {
			continue // dropped meanwhile
		}
		err := put(ctx, r.Header, []tiers.Piece{{Head: r.Head, Plane: r.Plane, Bytes: pins[i].Ranges[0]}})
		if err != nil && !errors.Is(err, tiers.ErrFull) && !errors.Is(err, tiers.ErrClosed) && ctx.Err() == nil {
			s.log.Warn("bring a piece into RAM", "segment", r.Header.ID, "plane", r.Plane, "err", err)
		}
		// A segment that was removed meanwhile must not linger in RAM.
		if _, err := s.Header(r.Header.ID); err != nil {
			_ = s.ram.Drop(r.Header.ID, tiers.AllPlanes)
		}
	}
}

// Promoted is how many bytes were read from NVMe to be brought into RAM because queries read them. What does not earn its
// room there is among them.
func (s *Store) Promoted() int64 { return s.up.bytes.Load() }
