package tiertest

import (
	"errors"

	"kvtier/tiers"
)

func (s *suite) dropPinned() {
	h, pieces := Segment(21, 3, 30000)
	s.ok(s.tier.Put(ctx, h, pieces))
	pins := s.pin(h, pieces)
	s.ok(s.tier.Drop(h.ID, tiers.AllPlanes))
	s.wantHeld(h, pieces, 0)
	// Others come and want the room; the pinned bytes stay.
	for seed := range uint64(40) {
		other, otherPieces := Segment(100+seed, 3, 30000)
		s.ok(s.tier.Put(ctx, other, otherPieces))
		s.compare(pins, pieces)
	}
	s.ok(s.tier.Put(ctx, h, pieces)) // also the segment itself
	again := s.pin(h, pieces)
	for i := range pins {
		if !pins[i].Held() || !again[i].Held() {
			s.Fatalf("piece %d is not held", i)
		}
		pins[i].Release(0)
	}
	s.compare(again, pieces)
	for i := range again {
		again[i].Release(1)
	}
}

func (s *suite) dropPlanes() {
	h, pieces := Segment(22, 3, 9000)
	for seed := uint64(23); len(InPart(pieces, tiers.PartLow)) == 0; seed++ {
		h, pieces = Segment(seed, 3, 9000)
	}
	low, main := InPart(pieces, tiers.PartLow), InPart(pieces, tiers.PartMain)
	s.ok(s.tier.Put(ctx, h, main))
	s.wantHeld(h, main, len(main))
	s.wantHeld(h, low, 0)
	s.ok(s.tier.Put(ctx, h, pieces))
	s.wantHeld(h, pieces, len(pieces))
	s.ok(s.tier.Drop(h.ID, tiers.LowPlanes))
	s.wantHeld(h, low, 0)
	s.wantHeld(h, main, len(main))
	one := main[0].Plane
	s.ok(s.tier.Drop(h.ID, 1<<one))
	for _, p := range main {
		want := 1
		if p.Plane == one {
			want = 0
		}
		s.wantHeld(h, []tiers.Piece{p}, want)
	}
	s.ok(s.tier.Put(ctx, h, pieces))
	s.wantHeld(h, pieces, len(pieces))
	s.ok(s.tier.Drop(h.ID, tiers.AllPlanes&^tiers.LowPlanes))
	s.wantHeld(h, main, 0)
	s.wantHeld(h, low, len(low))
	s.ok(s.tier.Drop(h.ID, tiers.AllPlanes))
	s.wantHeld(h, pieces, 0)
	if u := s.usage(); u.Pieces != 0 {
		s.Fatalf("%d pieces left", u.Pieces)
	}
}

// limit fills a tier well past its limit: it is never over, a Put is all or
// none, and one that fails changes nothing.
func (s *suite) limit() {
	type segment struct {
		h      *tiers.Header
		pieces []tiers.Piece
	}
	var all []segment
	full := 0
	for seed := range uint64(60) {
		h, pieces := Segment(200+seed, 2, 12000)
		all = append(all, segment{h, pieces})
		var before [][]bool
		for _, g := range all {
			held, _ := s.held(g.h, g.pieces)
			before = append(before, held)
		}
		evicted := s.usage().Evictions
		err := s.tier.Put(ctx, h, pieces)
		s.usage()
		switch {
		case err == nil:
			if s.usage().Evictions == evicted {
				for i, g := range all[:len(all)-1] {
					s.sameHeld(g.h, g.pieces, before[i])
				}
			}
			s.wantHeld(h, pieces, len(pieces))
		case errors.Is(err, tiers.ErrFull):
			full++
			for i, g := range all {
				s.sameHeld(g.h, g.pieces, before[i])
			}
			s.drop(all[int(seed)/2].h)
		default:
			s.Fatal(err)
		}
	}
	if full == 0 && s.usage().Evictions == 0 {
		s.Fatal("60 segments fit a limit for 10")
	}
	for _, g := range all {
		s.drop(g.h)
	}
	// All room is free again.
	s.ok(s.tier.Put(ctx, all[0].h, all[0].pieces))
	s.wantHeld(all[0].h, all[0].pieces, len(all[0].pieces))
}

func (s *suite) drop(h *tiers.Header) {
	s.Helper()
	s.ok(s.tier.Drop(h.ID, tiers.AllPlanes))
}

func (s *suite) sameHeld(h *tiers.Header, pieces []tiers.Piece, want []bool) {
	s.Helper()
	got, _ := s.held(h, pieces)
	for i := range got {
		if got[i] != want[i] {
			s.Fatalf("head %d, %v: held %v, before %v", pieces[i].Head, pieces[i].Plane, got[i], want[i])
		}
	}
}

// limitPinned fills a tier whose pieces are all pinned: nothing is freed under a reader.
func (s *suite) limitPinned() {
	var pins []tiers.Pin
	var of []tiers.Piece
	for seed := range uint64(60) {
		h, pieces := Segment(300+seed, 2, 12000)
		switch err := s.tier.Put(ctx, h, pieces); {
		case err == nil:
			for i, p := range s.pin(h, pieces) {
				if p.Held() {
					pins, of = append(pins, p), append(of, pieces[i])
				}
			}
			if seed%3 == 0 {
				s.drop(h)
			}
		case !errors.Is(err, tiers.ErrFull):
			s.Fatal(err)
		}
		s.usage()
		s.compare(pins, of)
	}
	for i := range pins {
		pins[i].Release(0.1)
	}
	h, pieces := Segment(399, 1, 12000)
	if s.usage().Evictions > 0 {
		s.ok(s.tier.Put(ctx, h, pieces))
		s.wantHeld(h, pieces, len(pieces))
	}
}

func (s *suite) tooLarge() {
	small, smallPieces := Segment(41, 1, 5000)
	s.ok(s.tier.Put(ctx, small, smallPieces))
	h, pieces := Segment(42, 8, 100000)
	if size(pieces) < tight {
		s.Fatal("segment 42 is too small for the test")
	}
	s.is(s.tier.Put(ctx, h, pieces), tiers.ErrFull)
	s.wantHeld(h, pieces, 0)
	s.wantHeld(small, smallPieces, len(smallPieces))
}
