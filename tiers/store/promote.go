package store

import (
	"context"
	"errors"
	"sync"

	"kvtier/tiers"
)

// Promotion: a piece that queries had to read from NVMe is brought into RAM
// once they have read about as much of it as it holds, sooner if their answers
// gave it much attention. RAM's own policy then
// says whether it earns its room; if it does not, it stays below.
const (
	promoteQueue = 256     // pieces waiting; more are forgotten
	interestMost = 1 << 16 // pieces remembered before all counts are halved
)

type pieceKey struct {
	id    tiers.ID
	head  int
	plane tiers.Plane
}

// promoter brings pieces up in the background: one goroutine owns the RAM
// tier's growth.
type promoter struct {
	s      *Store
	queue  chan tiers.Request
	cancel context.CancelFunc
	done   sync.WaitGroup
	mu     struct {
		sync.Mutex
		interest map[pieceKey]float32 // reads from below, in whole pieces, and attention received
	}
}

func newPromoter(s *Store) *promoter {
	ctx, cancel := context.WithCancel(context.Background())
	p := &promoter{s: s, queue: make(chan tiers.Request, promoteQueue), cancel: cancel}
	p.mu.interest = map[pieceKey]float32{}
	p.done.Add(1)
	go func() {
		defer p.done.Done()
		for {
			select {
			case <-ctx.Done():
				return
			case r := <-p.queue:
				p.bringUp(ctx, r)
			}
		}
	}()
	return p
}

func (p *promoter) close() {
	p.cancel()
	p.done.Wait()
}

// watch counts a read from below: the share of the piece that was
// transferred, and, when the pin is released, the attention it received.
func (p *promoter) watch(r tiers.Request, pin tiers.Pin) tiers.Pin {
	_, n, _ := r.Header.Piece(r.Head, r.Plane)
	p.credit(r, float32(pin.Transferred)/float32(max(n, tiers.BlockSize)))
	return tiers.NewPin(pin.Ranges, pin.Transferred, func(attention float32) {
		pin.Release(attention)
		p.credit(r, attention)
	})
}

// credit raises the interest in a piece; at 1 it is brought up.
func (p *promoter) credit(r tiers.Request, by float32) {
	if by <= 0 {
		return
	}
	k := pieceKey{r.Header.ID, r.Head, r.Plane}
	p.mu.Lock()
	c := p.mu.interest[k] + by
	if c < 1 {
		p.mu.interest[k] = c
	} else {
		delete(p.mu.interest, k)
	}
	if len(p.mu.interest) > interestMost {
		p.halveLocked()
	}
	p.mu.Unlock()
	if c >= 1 {
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

func (p *promoter) bringUp(ctx context.Context, r tiers.Request) {
	if p.s.ram.Resident(r.Header.ID, r.Head, r.Plane) {
		return
	}
	pins, err := p.s.nvme.Pin(ctx, []tiers.Request{r})
	if err != nil {
		p.s.noteDamage([]tiers.Request{r}, err)
		return
	}
	defer releaseAll(pins)
	if !pins[0].Held() {
		return // dropped meanwhile
	}
	err = p.s.ram.Put(ctx, r.Header, []tiers.Piece{{Head: r.Head, Plane: r.Plane, Bytes: pins[0].Ranges[0]}})
	if err != nil && !errors.Is(err, tiers.ErrFull) && !errors.Is(err, tiers.ErrClosed) && ctx.Err() == nil {
		p.s.log.Warn("bring a piece into RAM", "segment", r.Header.ID, "plane", r.Plane, "err", err)
	}
	// A segment that was removed meanwhile must not linger in RAM.
	if _, err := p.s.Header(r.Header.ID); err != nil {
		_ = p.s.ram.Drop(r.Header.ID, tiers.AllPlanes)
	}
}
