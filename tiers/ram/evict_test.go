package ram_test

import (
	"context"
	"errors"
	"math/rand/v2"
	"testing"
	"time"

	"kvtier/tiers"
	"kvtier/tiers/ram"
	"kvtier/tiers/tiertest"
)

var ctx = context.Background()

type segment struct {
	h      *tiers.Header
	pieces []tiers.Piece
}

func segments(from, n uint64, heads, size int) (out []segment) {
	for i := range n {
		h, pieces := tiertest.Segment(from+i, heads, size)
		out = append(out, segment{h, pieces})
	}
	return out
}

func (s segment) requests() (reqs []tiers.Request) {
	for _, p := range s.pieces {
		reqs = append(reqs, tiers.Request{Header: s.h, Head: p.Head, Plane: p.Plane})
	}
	return reqs
}

func (s segment) resident(tier *ram.Tier) (n int) {
	for _, p := range s.pieces {
		if tier.Resident(s.h.ID, p.Head, p.Plane) {
			n++
		}
	}
	return n
}

// use pins what is held of a segment and releases it with an attention.
func (s segment) use(t testing.TB, tier *ram.Tier, attention float32) {
	t.Helper()
	pins, err := tier.Pin(ctx, s.requests())
	if err != nil {
		t.Fatal(err)
	}
	for i := range pins {
		pins[i].Release(attention)
	}
}

// TestAttentionKeeps: what receives attention survives a scan; what is only read does not.
func TestAttentionKeeps(t *testing.T) {
	if raceEnabled {
		t.Skip("ristretto counts through sync.Pool, which forgets at random under -race")
	}
	tier := open(t, 4<<20)
	defer tier.Close()
	hot, cold := segments(0, 3, 3, 20000), segments(10, 5, 3, 20000)
	for _, s := range append(hot, cold...) {
		if err := tier.Put(ctx, s.h, s.pieces); err != nil {
			t.Fatal(err)
		}
	}
	for range 60 {
		for _, s := range hot {
			s.use(t, tier, 0.3)
		}
		for _, s := range cold {
			s.use(t, tier, 0)
		}
	}
	time.Sleep(50 * time.Millisecond) // ristretto counts in the background
	for _, s := range segments(100, 60, 3, 20000) {
		if err := tier.Put(ctx, s.h, s.pieces); err != nil && !errors.Is(err, tiers.ErrFull) {
			t.Fatal(err)
		}
	}
	share := func(of []segment) float64 {
		n, all := 0, 0
		for _, s := range of {
			n += s.resident(tier)
			all += len(s.pieces)
		}
		return float64(n) / float64(all)
	}
	t.Logf("held: %.2f of what was attended, %.2f of what was scanned", share(hot), share(cold))
	if share(hot) < 0.9 || share(cold) > share(hot) {
		t.Error("eviction does not follow attention")
	}
}

// TestHold: held pieces stay, those to come get room, and all of it is within the limit.
func TestHold(t *testing.T) {
	tier := open(t, 2<<20)
	defer tier.Close()
	all := segments(0, 40, 2, 20000)
	keep := all[0]
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(tier.Put(ctx, keep.h, keep.pieces[:len(keep.pieces)/2]))
	must(tier.Hold(keep.h.ID, true))
	must(tier.Hold(all[39].h.ID, true)) // before it is put
	for _, s := range all[1:39] {
		s.use(t, tier, 0)
		if err := tier.Put(ctx, s.h, s.pieces); err != nil && !errors.Is(err, tiers.ErrFull) {
			t.Fatal(err)
		}
		s.use(t, tier, 1)
	}
	if n := keep.resident(tier); n != len(keep.pieces)/2 {
		t.Fatalf("%d held pieces left", n)
	}
	must(tier.Put(ctx, keep.h, keep.pieces))
	must(tier.Put(ctx, all[39].h, all[39].pieces))
	if keep.resident(tier) != len(keep.pieces) || all[39].resident(tier) != len(all[39].pieces) {
		t.Fatal("a held segment is not whole")
	}
	must(tier.Hold(keep.h.ID, false))
	must(tier.Hold(keep.h.ID, false))
	for range 20 {
		for _, s := range all[1:39] {
			s.use(t, tier, 1)
		}
	}
	time.Sleep(50 * time.Millisecond)
	for _, s := range all[1:39] {
		for i := range s.pieces { // one by one: a Put of many needs every one to be admitted
			if err := tier.Put(ctx, s.h, s.pieces[i:i+1]); err != nil && !errors.Is(err, tiers.ErrFull) {
				t.Fatal(err)
			}
		}
	}
	if n := keep.resident(tier); n == len(keep.pieces) {
		t.Error("what is no longer held is not evicted")
	}
	// Held pieces alone can fill the tier.
	full := false
	for _, s := range all[1:39] {
		must(tier.Hold(s.h.ID, true))
		if err := tier.Put(ctx, s.h, s.pieces); err != nil {
			full = full || errors.Is(err, tiers.ErrFull)
		}
	}
	if !full {
		t.Error("the limit does not bind held pieces")
	}
	if u := tier.Usage(); u.BytesUsed > u.BytesLimit {
		t.Errorf("%d bytes used of %d", u.BytesUsed, u.BytesLimit)
	}
}

// TestFragments: after much coming and going of small pieces, large ones still fit.
func TestFragments(t *testing.T) {
	tier := open(t, 4<<20)
	defer tier.Close()
	rng := rand.New(rand.NewPCG(1, 1))
	for i := range uint64(400) {
		h, pieces := tiertest.Segment(i, 1, 1000<<rng.IntN(7))
		if err := tier.Put(ctx, h, pieces); err != nil && !errors.Is(err, tiers.ErrFull) {
			t.Fatal(err)
		}
	}
	for i := range uint64(20) {
		h, pieces := tiertest.Segment(1000+i, 1, 400000)
		if err := tier.Put(ctx, h, pieces[:1]); err != nil {
			t.Fatalf("segment %d, %d bytes: %v", i, len(pieces[0].Bytes), err)
		}
	}
}

// TestClosePinned: bytes stay readable when a tier is closed under a reader.
func TestClosePinned(t *testing.T) {
	tier := open(t, 1<<20)
	s := segments(1, 1, 1, 9000)[0]
	if err := tier.Put(ctx, s.h, s.pieces); err != nil {
		t.Fatal(err)
	}
	pins, err := tier.Pin(ctx, s.requests())
	if err != nil {
		t.Fatal(err)
	}
	if err := tier.Close(); err != nil {
		t.Fatal(err)
	}
	for i := range pins {
		if string(pins[i].Ranges[0]) != string(s.pieces[i].Bytes) {
			t.Fatal("other bytes")
		}
		pins[i].Release(1)
	}
	if u := tier.Usage(); u.BytesUsed != 0 {
		t.Fatalf("%d bytes left", u.BytesUsed)
	}
}

// TestOfferAndPrime: what is offered takes free room alone; what is primed, which every query will read, takes that of
// pieces that nobody uses.
func TestOfferAndPrime(t *testing.T) {
	if raceEnabled {
		t.Skip("ristretto counts through sync.Pool, which forgets at random under -race")
	}
	tier := open(t, 4<<20)
	defer tier.Close()
	cold := segments(0, 60, 3, 20000)
	full := false
	for _, s := range cold {
		if err := tier.Offer(ctx, s.h, s.pieces); errors.Is(err, tiers.ErrFull) {
			full = true
		} else if err != nil {
			t.Fatal(err)
		}
	}
	if !full {
		t.Fatal("everything has room")
	}
	held := 0
	for _, s := range cold {
		held += s.resident(tier)
	}
	evictions := tier.Usage().Evictions
	if evictions > 0 {
		t.Errorf("%d pieces went for what was offered", evictions)
	}
	primed := segments(100, 4, 3, 20000)
	for _, s := range primed {
		for i := range s.pieces {
			if err := tier.Prime(ctx, s.h, s.pieces[i:i+1]); err != nil && !errors.Is(err, tiers.ErrFull) {
				t.Fatal(err)
			}
		}
	}
	have, all := 0, 0
	for _, s := range primed {
		have, all = have+s.resident(tier), all+len(s.pieces)
	}
	if have < all*3/4 { // a hole for a long piece may take a neighbour's room
		t.Errorf("%d of %d primed pieces are here", have, all)
	}
	now := 0
	for _, s := range cold {
		now += s.resident(tier)
	}
	if now >= held || tier.Usage().Evictions == 0 {
		t.Errorf("%d cold pieces before, %d after", held, now)
	}
}
