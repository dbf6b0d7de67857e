package gpu

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"kvtier/tiers"
	"kvtier/tiers/gpu/cuda"
	"kvtier/tiers/tiertest"
)

func put(t *testing.T, tier *Tier, h *tiers.Header, pieces []tiers.Piece) {
	t.Helper()
	if err := tier.Put(ctx, h, pieces); err != nil {
		t.Fatal(err)
	}
}

func is(t *testing.T, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Fatalf("error %v, want %v", err, want)
	}
}

// holds checks that a tier has all pieces of a segment, with their bytes, or none.
func holds(t *testing.T, tier *Tier, h *tiers.Header, pieces []tiers.Piece, want bool) {
	t.Helper()
	reqs := make([]tiers.Request, len(pieces))
	for i, p := range pieces {
		reqs[i] = tiers.Request{Header: h, Head: p.Head, Plane: p.Plane}
		if got := tier.Resident(h.ID, p.Head, p.Plane); got != want {
			t.Fatalf("head %d, %v: resident %v", p.Head, p.Plane, got)
		}
	}
	pins, err := tier.Pin(ctx, reqs)
	if err != nil {
		t.Fatal(err)
	}
	for i := range pins {
		if pins[i].Held() != want || want && !bytes.Equal(pins[i].Ranges[0], pieces[i].Bytes) {
			t.Fatalf("head %d, %v: held %v, want %v, or other bytes", pieces[i].Head, pieces[i].Plane, pins[i].Held(), want)
		}
	}
}

func TestOutOfMemory(t *testing.T) {
	tier, b := openFake(t, 1<<30, 50<<20) // one slab of 32 MiB, then none
	var last *tiers.Header
	var lastPieces []tiers.Piece
	for seed := uint64(0); tier.Usage().Evictions == 0; seed++ {
		last, lastPieces = tiertest.Segment(seed, 4, 100000)
		put(t, tier, last, lastPieces)
	}
	if u := tier.Usage(); u.BytesUsed != 32<<20 || u.BytesLimit != u.BytesUsed {
		t.Fatalf("%d bytes used of %d", u.BytesUsed, u.BytesLimit)
	}
	holds(t, tier, last, lastPieces, true)
	if b.has != 18<<20 {
		t.Fatalf("%d bytes left", b.has)
	}
}

// once fails the nth call of an operation.
func once(op string, n int, err error) func(string) error {
	return func(got string) error {
		if got != op {
			return nil
		}
		if n--; n == 0 {
			return err
		}
		return nil
	}
}

func TestCopyFails(t *testing.T) {
	tier, b := openFake(t, 1<<20, 1<<20)
	h, pieces := tiertest.Segment(1, 2, 9000)
	broken := errors.New("broken")
	for _, op := range []string{"alloc", "write"} {
		b.fail = once(op, 1, broken)
		is(t, tier.Put(ctx, h, pieces), broken)
		holds(t, tier, h, pieces, false)
	}
	b.fail = once("write", len(pieces), broken) // the last one: all others have arrived
	is(t, tier.Put(ctx, h, pieces), broken)
	holds(t, tier, h, pieces, false)
	put(t, tier, h, pieces)
	holds(t, tier, h, pieces, true)
	b.fail = once("read", 2, broken)
	_, err := tier.Pin(ctx, []tiers.Request{{Header: h}, {Header: h}, {Header: h}})
	is(t, err, broken)
	holds(t, tier, h, pieces, true)
	if err := tier.Drop(h.ID, tiers.AllPlanes); err != nil {
		t.Fatal(err)
	}
	empty(t, tier)
}

// empty checks that a tier holds nothing and all its room is free.
func empty(t *testing.T, tier *Tier) {
	t.Helper()
	if u := tier.Usage(); u.Pieces != 0 || len(tier.mu.segments) != 0 || len(tier.mu.ranking) != 0 {
		t.Fatalf("%d pieces, %d segments, %d ranked", u.Pieces, len(tier.mu.segments), len(tier.mu.ranking))
	}
	for _, s := range tier.mu.arena.slabs {
		if len(s.free) != 1 || s.free[0].n != s.size {
			t.Fatalf("free spans %v of %d bytes", s.free, s.size)
		}
	}
}

func TestCancelled(t *testing.T) {
	tier, b := openFake(t, 1<<20, 1<<20)
	h, pieces := tiertest.Segment(1, 2, 9000)
	dead, cancel := context.WithCancel(ctx)
	b.writing = cancel
	is(t, tier.Put(dead, h, pieces), context.Canceled)
	if b.copies == 0 {
		t.Fatal("nothing was copied: the test is none")
	}
	holds(t, tier, h, pieces, false)
	empty(t, tier)
	put(t, tier, h, pieces)
	holds(t, tier, h, pieces, true)
}

func TestLost(t *testing.T) {
	for _, op := range []string{"alloc", "write", "read", "free"} {
		t.Run(op, func(t *testing.T) {
			tier, b := openFake(t, 1<<20, 1<<20)
			h, pieces := tiertest.Segment(1, 2, 9000)
			request := []tiers.Request{{Header: h}}
			b.fail = once(op, 1, fmt.Errorf("fake: %w", cuda.ErrLost))
			err := tier.Put(ctx, h, pieces)
			if op == "read" {
				if err != nil {
					t.Fatal(err)
				}
				_, err = tier.Pin(ctx, request)
			}
			if op == "free" {
				put(t, tier, h, pieces)
				return // Close finds out, and says nothing
			}
			is(t, err, tiers.ErrLost)
			is(t, err, cuda.ErrLost)
			is(t, tier.Put(ctx, h, pieces), tiers.ErrLost)
			_, err = tier.Pin(ctx, request)
			is(t, err, tiers.ErrLost)
			is(t, tier.Drop(h.ID, tiers.AllPlanes), tiers.ErrLost)
			if _, ok := tier.lease(h, 0); ok {
				t.Fatal("a lease on a device that is lost")
			}
			_ = tier.Usage()
		})
	}
}

// device returns the bytes that lie on the fake device where a lease says.
func device(t *testing.T, b *fakeBank, l *lease, p tiers.Piece) []byte {
	t.Helper()
	b.mu.Lock()
	defer b.mu.Unlock()
	at := l.at(p.Head, p.Plane)
	if at == 0 || at%grain != 0 {
		t.Fatalf("head %d, %v is at %#x", p.Head, p.Plane, at)
	}
	got, err := b.at(transfer{at: at, bytes: p.Bytes})
	if err != nil {
		t.Fatal(err)
	}
	return bytes.Clone(got)
}

func TestLease(t *testing.T) {
	tier, b := openFake(t, 1<<20, 1<<20)
	h, pieces := tiertest.Segment(23, 3, 9000)
	low, main := tiertest.InPart(pieces, tiers.PartLow), tiertest.InPart(pieces, tiers.PartMain)
	if len(low) == 0 {
		t.Fatal("segment 23 has no low part")
	}
	if _, ok := tier.lease(h, tiers.AllPlanes); ok {
		t.Fatal("a lease of nothing")
	}
	put(t, tier, h, main)
	if _, ok := tier.lease(h, tiers.AllPlanes); ok {
		t.Fatal("a lease of planes that are not all resident")
	}
	l, ok := tier.lease(h, tiers.AllPlanes&^tiers.LowPlanes)
	if !ok {
		t.Fatal("no lease of what is resident")
	}
	put(t, tier, h, low)
	if l.at(low[0].Head, low[0].Plane) != 0 || l.at(99, 0) != 0 || l.at(-1, 0) != 0 || l.at(0, tiers.NumPlanes) != 0 {
		t.Fatal("addresses of what was not leased")
	}
	if err := tier.Drop(h.ID, tiers.AllPlanes); err != nil {
		t.Fatal(err)
	}
	holds(t, tier, h, pieces, false)
	for seed := range uint64(40) { // others want the room
		other, otherPieces := tiertest.Segment(100+seed, 2, 9000)
		put(t, tier, other, otherPieces)
	}
	for _, p := range main {
		if !bytes.Equal(device(t, b, l, p), p.Bytes) {
			t.Fatal("leased bytes changed")
		}
	}
	l.release(1)
	l.release(1) // does nothing
	for id := range tier.mu.segments {
		if err := tier.Drop(id, tiers.AllPlanes); err != nil {
			t.Fatal(err)
		}
	}
	empty(t, tier)
}

// TestLeasedStays fills a tier whose segments are all leased: nothing goes under a kernel.
func TestLeasedStays(t *testing.T) {
	tier, b := openFake(t, 1<<20, 1<<20)
	var leases []*lease
	var of [][]tiers.Piece
	for seed := range uint64(20) {
		h, pieces := tiertest.Segment(seed, 2, 12000)
		if err := tier.Put(ctx, h, pieces); err != nil {
			is(t, err, tiers.ErrFull)
			continue
		}
		l, ok := tier.lease(h, tiers.AllPlanes)
		if !ok {
			t.Fatal("not resident")
		}
		leases, of = append(leases, l), append(of, pieces)
	}
	if len(leases) == 20 || tier.Usage().Evictions != 0 {
		t.Fatalf("%d segments of 20 fit, %d evictions", len(leases), tier.Usage().Evictions)
	}
	for i, l := range leases {
		for _, p := range of[i] {
			if !bytes.Equal(device(t, b, l, p), p.Bytes) {
				t.Fatal("leased bytes changed")
			}
		}
		l.release(0)
	}
	h, pieces := tiertest.Segment(99, 2, 12000)
	put(t, tier, h, pieces)
	holds(t, tier, h, pieces, true)
}

// TestColdestGoes gives most attention to the segments that were put first.
func TestColdestGoes(t *testing.T) {
	tier, _ := openFake(t, 1<<20, 1<<20)
	var hot []*tiers.Header
	var hotPieces [][]tiers.Piece
	for seed := range uint64(60) {
		h, pieces := tiertest.Segment(seed, 1, 12000)
		put(t, tier, h, pieces)
		if seed < 3 {
			hot, hotPieces = append(hot, h), append(hotPieces, pieces)
		}
		for _, h := range hot {
			l, ok := tier.lease(h, 0)
			if !ok {
				t.Fatalf("what is attended most is gone after %d segments", seed)
			}
			l.release(0.3)
		}
		l, ok := tier.lease(h, 0)
		if !ok {
			t.Fatal("what was just put is gone")
		}
		l.release(0)
	}
	if tier.Usage().Evictions == 0 {
		t.Fatal("60 segments fit")
	}
	for i, h := range hot {
		holds(t, tier, h, hotPieces[i], true)
	}
}

// TestGiveUp: a tier that is given up holds nothing and takes nothing, and says why; its memory is free at once, and it is closed as ever.
func TestGiveUp(t *testing.T) {
	tier, b := openFake(t, 1<<20, 1<<20)
	h, pieces := tiertest.Segment(1, 2, 9000)
	put(t, tier, h, pieces)
	why := errors.New("it answers wrongly")
	for range 2 {
		if err := tier.GiveUp(why); err != nil {
			t.Fatal(err)
		}
	}
	if u := tier.Usage(); b.has != 1<<20 || u.BytesUsed != 0 || u.Pieces != 0 || tier.Resident(h.ID, 0, 0) {
		t.Errorf("%d bytes are free, %+v", b.has, u)
	}
	_, err := tier.Pin(ctx, []tiers.Request{{Header: h}})
	for _, err := range []error{err, tier.Put(ctx, h, pieces), tier.Drop(h.ID, tiers.AllPlanes)} {
		is(t, err, tiers.ErrLost)
		is(t, err, why)
	}
	if _, ok := tier.lease(h, 0); ok {
		t.Error("a lease of nothing")
	}
	if err := tier.Close(); err != nil {
		t.Fatal(err)
	}
	if err := tier.GiveUp(why); err != nil {
		t.Fatal(err)
	}
	is(t, tier.Put(ctx, h, pieces), tiers.ErrClosed)
}

func TestAbandon(t *testing.T) {
	tier, b := openFake(t, 1<<20, 1<<20)
	h, pieces := tiertest.Segment(1, 2, 9000)
	put(t, tier, h, pieces)
	l, _ := tier.lease(h, tiers.AllPlanes)
	tier.abandon(cuda.Event{}, l)
	closed := make(chan error)
	go func() { closed <- tier.Close() }()
	select {
	case err := <-closed:
		t.Fatalf("closed under a kernel: %v", err)
	case <-time.After(20 * time.Millisecond):
	}
	close(b.events)
	if err := <-closed; err != nil {
		t.Fatal(err)
	}
}

// TestLeasesConcurrent reads leased bytes while others put and drop.
func TestLeasesConcurrent(t *testing.T) {
	tier, b := openFake(t, 1<<20, 1<<20)
	const segments, workers, steps = 10, 6, 200
	var headers [segments]*tiers.Header
	var pieces [segments][]tiers.Piece
	for i := range segments {
		headers[i], pieces[i] = tiertest.Segment(uint64(i), 2, 12000)
	}
	var wg sync.WaitGroup
	for w := range uint64(workers) {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(w, 1))
			type kept struct {
				l *lease
				p tiers.Piece
			}
			var leased []kept
			end := func(k kept) {
				if !bytes.Equal(device(t, b, k.l, k.p), k.p.Bytes) {
					t.Error("leased bytes changed")
				}
				k.l.release(rng.Float32())
			}
			for range steps {
				i := rng.IntN(segments)
				switch rng.IntN(5) {
				case 0, 1:
					if err := tier.Put(ctx, headers[i], pieces[i]); err != nil && !errors.Is(err, tiers.ErrFull) {
						t.Error(err)
					}
				case 2:
					if err := tier.Drop(headers[i].ID, tiers.AllPlanes); err != nil {
						t.Error(err)
					}
				default:
					if l, ok := tier.lease(headers[i], tiers.AllPlanes); ok {
						leased = append(leased, kept{l, pieces[i][rng.IntN(len(pieces[i]))]})
					}
				}
				if len(leased) > 3 {
					end(leased[0])
					leased = leased[1:]
				}
			}
			for _, k := range leased {
				end(k)
			}
		})
	}
	wg.Wait()
	for _, h := range headers {
		if err := tier.Drop(h.ID, tiers.AllPlanes); err != nil {
			t.Fatal(err)
		}
	}
	empty(t, tier)
}

// TestDropWhileComing drops planes of a segment while a Put copies: what it brought of them is not there afterwards.
func TestDropWhileComing(t *testing.T) {
	tier, b := openFake(t, 1<<20, 1<<20)
	h, pieces := tiertest.Segment(23, 3, 9000)
	low, main := tiertest.InPart(pieces, tiers.PartLow), tiertest.InPart(pieces, tiers.PartMain)
	for _, planes := range []tiers.PlaneSet{tiers.LowPlanes, tiers.AllPlanes} {
		b.writing = func() {
			if err := tier.Drop(h.ID, planes); err != nil {
				t.Error(err)
			}
		}
		put(t, tier, h, pieces)
		holds(t, tier, h, low, false)
		holds(t, tier, h, main, planes == tiers.LowPlanes)
	}
	b.writing = nil
	put(t, tier, h, pieces)
	holds(t, tier, h, pieces, true)
	if err := tier.Drop(h.ID, tiers.AllPlanes); err != nil {
		t.Fatal(err)
	}
	empty(t, tier)
}
