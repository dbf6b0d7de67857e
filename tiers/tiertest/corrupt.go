package tiertest

import "kvtier/tiers"

// Corrupter is what an opened tier may do besides, for the test of corruption:
// change a stored byte of a piece behind the tier's back.
type Corrupter interface {
	Corrupt(h *tiers.Header, head int, p tiers.Plane) error
}

func (s *suite) corrupt() {
	c, ok := s.tier.(Corrupter)
	if !ok {
		s.Skip("nothing to corrupt")
	}
	h, pieces := Segment(17, 2, 9000)
	other, otherPieces := Segment(18, 2, 9000)
	s.ok(s.tier.Put(ctx, h, pieces))
	s.ok(s.tier.Put(ctx, other, otherPieces))
	s.ok(c.Corrupt(h, pieces[2].Head, pieces[2].Plane))
	_, err := s.tier.Pin(ctx, append(whole(other, otherPieces), whole(h, pieces)...))
	s.is(err, tiers.ErrCorrupt)
	if u := s.usage(); u.Corruptions == 0 {
		s.Fatal("not counted")
	}
	s.wantHeld(other, otherPieces, len(otherPieces))
	s.ok(s.tier.Drop(h.ID, tiers.AllPlanes))
	s.ok(s.tier.Put(ctx, h, pieces))
	s.wantHeld(h, pieces, len(pieces))
}
