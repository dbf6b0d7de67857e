package store

import (
	"testing"
	"time"

	"kvtier/tiers"
)

// storedBelow opens a store that has a segment on NVMe alone.
func storedBelow(t *testing.T, o Options) (*Store, *tiers.Header) {
	t.Helper()
	s, err := Open(t.Context(), t.TempDir(), o)
	if err != nil {
		t.Fatal(err)
	}
	h, parts := sealed(1)
	b := s.NewBatch()
	if err := b.PutSegment(t.Context(), h, parts); err != nil {
		t.Fatal(err)
	}
	if err := b.Commit(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := s.ram.Drop(h.ID, tiers.AllPlanes); err != nil {
		t.Fatal(err)
	}
	return s, h
}

// What queries read from NVMe comes into RAM within its budget: without a limit all of it, and of a budget of a byte a second the first one.
func TestPromotionBudget(t *testing.T) {
	for _, perSecond := range []int64{0, 1} {
		s, h := storedBelow(t, Options{RAMBytes: 32 << 20, DiskBytes: 64 << 20, PromoteBytes: perSecond})
		r := tiers.Request{Header: h, Plane: tiers.PlaneV4}
		_, n, _ := h.Piece(r.Head, r.Plane)
		for range 2 {
			pins, moved, err := s.Pin(t.Context(), []tiers.Request{r})
			if err != nil {
				t.Fatal(err)
			}
			if pins[0].Release(1); moved.RAM == 0 && moved.NVMe < int64(n) {
				t.Errorf("%+v moved of %d bytes", moved, n)
			}
		}
		resident := func() bool { return s.ram.Resident(h.ID, r.Head, r.Plane) }
		if perSecond == 0 {
			for begin := time.Now(); !resident() && time.Since(begin) < 10*time.Second; {
				time.Sleep(time.Millisecond)
			}
			if !resident() || s.Promoted() != int64(n) {
				t.Errorf("without a limit %d of %d bytes came up", s.Promoted(), n)
			}
		} else if time.Sleep(50 * time.Millisecond); resident() || s.Promoted() != 0 {
			t.Errorf("%d bytes came up within a budget of one", s.Promoted())
		}
		if err := s.Close(); err != nil { // without waiting for the budget
			t.Fatal(err)
		}
	}
}

// Of a piece of which queries read a part, that is enough to bring it up while there is room for it, and not any more when something has to go.
func TestPromotionWithRoom(t *testing.T) {
	for _, room := range []int64{32 << 20, 64 << 10} {
		s, h := storedBelow(t, Options{RAMBytes: room, DiskBytes: 64 << 20})
		r := tiers.Request{Header: h, Plane: tiers.PlaneV4}
		_, n, _ := h.Piece(r.Head, r.Plane)
		for seed := uint64(2); room < 1<<20 && s.ram.Room(h, r.Head, r.Plane); seed++ {
			other, parts := sealed(seed)
			for _, piece := range other.Pieces(parts) {
				_ = s.ram.Put(t.Context(), other, []tiers.Piece{piece}) // what does not earn its room is refused
			}
		}
		r.Ranges = []tiers.Range{{Len: 64}}
		pins, moved, err := s.Pin(t.Context(), []tiers.Request{r})
		if err != nil {
			t.Fatal(err)
		}
		if moved.NVMe*8 < int64(n) || moved.NVMe >= int64(n) {
			t.Fatalf("%d of %d bytes were read: neither an eighth nor all", moved.NVMe, n)
		}
		pins[0].Release(0)
		resident := func() bool { return s.ram.Resident(h.ID, r.Head, r.Plane) }
		for begin := time.Now(); room > 1<<20 && !resident() && time.Since(begin) < 10*time.Second; {
			time.Sleep(time.Millisecond)
		}
		if time.Sleep(20 * time.Millisecond); resident() != (room > 1<<20) || (s.Promoted() > 0) != (room > 1<<20) {
			t.Errorf("with %d bytes of RAM: resident %v, %d bytes brought up", room, resident(), s.Promoted())
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
}
