package ram

import (
	"bytes"
	"context"
	"testing"

	"kvtier/tiers"
	"kvtier/tiers/tiertest"
)

// TestDropEndsHold: nothing is left of a held segment that is dropped whole, but for what is pinned of it, and it is not held
// when it comes back. Without some of its planes it stays held.
func TestDropEndsHold(t *testing.T) {
	tier, err := New(Options{Bytes: 8 << 20})
	if err != nil {
		t.Fatal(err)
	}
	defer tier.Close()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	h, pieces := tiertest.Segment(2, 2, 9000)
	put := func() { must(tier.Put(context.Background(), h, pieces)) }
	must(tier.Hold(h.ID, true))
	must(tier.Drop(h.ID, tiers.AllPlanes))
	if n := len(tier.mu.segments); n != 0 {
		t.Errorf("%d segments are listed of which there is nothing", n)
	}
	must(tier.Hold(h.ID, true))
	put()
	must(tier.Drop(h.ID, tiers.LowPlanes))
	if s := tier.mu.segments[h.ID]; s == nil || !s.held {
		t.Error("a segment is not held any more without its low planes")
	}
	r := tiers.Request{Header: h, Head: pieces[0].Head, Plane: pieces[0].Plane}
	pins, err := tier.Pin(context.Background(), []tiers.Request{r})
	must(err)
	must(tier.Drop(h.ID, tiers.AllPlanes))
	if n := len(tier.mu.segments); n != 0 {
		t.Errorf("%d segments are listed after all were dropped", n)
	}
	put()
	if tier.mu.segments[h.ID].held {
		t.Error("a segment that was dropped and put anew is held")
	}
	if !bytes.Equal(pins[0].Ranges[0], pieces[0].Bytes) {
		t.Error("what was pinned changed")
	}
	pins[0].Release(0)
}
