package store

import (
	"testing"
	"time"

	"kvtier/tiers"
)

// What queries read from NVMe comes into RAM within its budget: without a limit all of it, and of a budget of a byte a second the first one.
func TestPromotionBudget(t *testing.T) {
	for _, perSecond := range []int64{0, 1} {
		s, err := Open(t.Context(), t.TempDir(), Options{RAMBytes: 32 << 20, DiskBytes: 64 << 20, PromoteBytes: perSecond})
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
