package gpu

import (
	"testing"

	"kvtier/tiers"
	"kvtier/tiers/tiertest"
)

// layered is one context's segments, by layer, as a model walks through them.
type layered struct {
	headers [][]*tiers.Header
	pieces  [][][]tiers.Piece
}

func newLayered(seed uint64, layers, segments int) (c layered) {
	for l := range layers {
		c.headers, c.pieces = append(c.headers, nil), append(c.pieces, nil)
		for s := range segments {
			h, pieces := tiertest.Segment(seed+uint64(l*segments+s), 1, 3000)
			c.headers[l], c.pieces[l] = append(c.headers[l], h), append(c.pieces[l], pieces)
		}
	}
	return c
}

// walk asks all layers once, brings the next layer's segments up ahead as the store does, and says how many of the segments asked for were there, and how many were copied.
func (c layered) walk(t *testing.T, tier *Tier, deserves func(id, like tiers.ID, bytes int64) bool) (hits, copied int) {
	t.Helper()
	for l, headers := range c.headers {
		segments := make([]Segment, len(headers))
		for i, h := range headers {
			segments[i].Header = h
			if s := tier.mu.segments[h.ID]; s != nil {
				s.attends = true // it has no device to ask
			}
		}
		leases := tier.leaseAll(segments)
		missing := false
		for i := range leases {
			if leases[i].segment != nil {
				hits++
			} else {
				missing = true
			}
		}
		tier.releaseAll(leases)
		if !missing {
			continue
		}
		n := (l + 1) % len(c.headers)
		for i, h := range c.headers[n] {
			if tier.Resident(h.ID, c.pieces[n][i][0].Head, c.pieces[n][i][0].Plane) || !deserves(h.ID, headers[i].ID, size(c.pieces[n][i])) {
				continue
			}
			if err := tier.Put(ctx, h, c.pieces[n][i]); err != nil {
				t.Fatal(err)
			}
			tier.MarkAhead(h.ID)
			copied++
		}
	}
	return hits, copied
}

// TestAhead walks through contexts that are larger than the device: what came ahead fills it and then stays, where bringing everything up ahead goes on copying
// for as many hits. A context that is used more takes the place of one that is not.
func TestAhead(t *testing.T) {
	const layers, segments, rounds = 8, 6, 6
	a := newLayered(1000, layers, segments)
	total := int64(0)
	for l := range a.pieces {
		for _, p := range a.pieces[l] {
			for _, x := range p {
				total += int64(roundUp(len(x.Bytes)))
			}
		}
	}
	all := layers * segments
	tier, _ := openFake(t, total/2, total/2)
	always, _ := openFake(t, total/2, total/2)
	inVain := 0
	for r := range rounds {
		hits, copied := a.walk(t, tier, tier.Deserves)
		thrashed, copies := a.walk(t, always, func(tiers.ID, tiers.ID, int64) bool { return true })
		t.Logf("round %d: %d of %d there, %d copied; brought up in any case: %d, %d", r, hits, all, copied, thrashed, copies)
		if r > 0 && (hits < all*2/5 || copied > all/20) {
			t.Errorf("round %d: %d of %d were there, %d were copied", r, hits, all, copied)
		}
		if r > 0 {
			inVain += copies
		}
	}
	if inVain < all/2 {
		t.Errorf("only %d segments are copied where all may come: the test is none", inVain)
	}
	came, used := tier.Ahead()
	if came < int64(all/3) || used < came*9/10 {
		t.Errorf("%d came ahead, %d of them were used", came, used)
	}
	b := newLayered(2000, layers, segments)
	var hits []int
	for range 3 * rounds {
		n, _ := b.walk(t, tier, tier.Deserves)
		hits = append(hits, n)
	}
	t.Logf("another context: %v of %d there", hits, all)
	if hits[0] > 0 || hits[len(hits)-1] < all*2/5 {
		t.Error("a context that alone is used does not take the place of one that is not")
	}
}
