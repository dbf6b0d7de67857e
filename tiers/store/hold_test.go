package store

import (
	"context"
	"errors"
	"testing"
	"time"

	"kvtier/tiers"
)

// busy is a context that is asked for its error inside a Put, and keeps it waiting.
type busy struct {
	context.Context
	inside, open chan struct{}
}

func (b busy) Err() error {
	close(b.inside)
	<-b.open
	return context.Canceled
}

// wantUnheld fails if RAM holds a segment: of one that it holds, pieces take the room of others.
func wantUnheld(t *testing.T, s *Store, h *tiers.Header, parts [tiers.NumParts][]byte) {
	t.Helper()
	full := false
	for seed := uint64(100); !full && seed < 1000; seed++ {
		other, parts := sealed(seed)
		full = errors.Is(s.ram.Offer(t.Context(), other, other.Pieces(parts)), tiers.ErrFull)
	}
	if err := s.ram.Offer(t.Context(), h, h.Pieces(parts)); !full || !errors.Is(err, tiers.ErrFull) {
		t.Errorf("full %v; a piece that nobody holds: %v", full, err)
	}
}

// A segment that is removed while it comes to be held is not held.
func TestHoldBesideRemoval(t *testing.T) {
	s, h := storedBelow(t, Options{RAMBytes: 1 << 20, DiskBytes: 64 << 20})
	defer s.Close()
	b := busy{t.Context(), make(chan struct{}), make(chan struct{})}
	go s.ram.Put(b, h, nil)
	<-b.inside
	held := make(chan error, 1)
	go func() {
		_, err := s.Hold(h.ID, true, 0)
		held <- err
	}()
	select {
	case err := <-held:
		t.Fatalf("held beside a Put: %v", err)
	case <-time.After(20 * time.Millisecond): // it has the header, and waits for the Put
	}
	s.mu.Lock()
	delete(s.mu.headers, h.ID)
	s.mu.Unlock()
	close(b.open)
	if err := <-held; !errors.Is(err, tiers.ErrNotFound) {
		t.Errorf("hold what was removed meanwhile: %v", err)
	}
	_, parts := sealed(1)
	wantUnheld(t, s, h, parts)
}

// What a segment holds of RAM can be let go after it was removed, too, and with its removal nothing stays held.
func TestUnholdRemoved(t *testing.T) {
	s, h := storedBelow(t, Options{RAMBytes: 1 << 20, DiskBytes: 64 << 20})
	defer s.Close()
	if _, err := s.Hold(h.ID, true, 0); err != nil {
		t.Fatal(err)
	}
	b := s.NewBatch()
	defer b.Close()
	if err := errors.Join(b.DropSegment(h.ID), b.Commit(t.Context())); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Hold(h.ID, false, 0); err != nil {
		t.Errorf("let go what was removed: %v", err)
	}
	_, parts := sealed(1)
	wantUnheld(t, s, h, parts)
}
