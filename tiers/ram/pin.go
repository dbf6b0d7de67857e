package ram

import (
	"context"
	"fmt"
	"math"
	"math/rand/v2"

	"kvtier/tiers"
)

// Pin returns ranges of the pieces that are held. One lock serves the whole
// batch, and neighbouring requests of one segment share a look-up.
func (t *Tier) Pin(ctx context.Context, reqs []tiers.Request) ([]tiers.Pin, error) {
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("ram: pin: %w", err)
	}
	count := 0
	for i := range reqs {
		count += len(reqs[i].Ranges)
	}
	pins := make([]tiers.Pin, len(reqs))
	entries := make([]*entry, len(reqs))
	var views [][]byte
	if count > 0 {
		views = make([][]byte, 0, count)
	}
	var read, hits int64
	t.mu.RLock()
	if t.mu.closed {
		t.mu.RUnlock()
		return nil, fmt.Errorf("ram: pin: %w", tiers.ErrClosed)
	}
	// All are looked up before any is counted: in between a processor fetches no memory ahead.
	if err := t.findLocked(entries, reqs); err != nil {
		t.mu.RUnlock()
		return nil, fmt.Errorf("ram: pin: %w", err)
	}
	for i, e := range entries {
		r := &reqs[i]
		if e == nil {
			t.missedLocked(r)
			continue
		}
		e.refs.Add(1)
		hits++
		moved := 0
		if len(r.Ranges) == 0 {
			moved = tiers.LineBytes([]tiers.Range{{Len: len(e.whole[0])}})
			pins[i] = tiers.NewPin(e.whole[:], moved, e.release)
		} else {
			from := len(views)
			for _, x := range r.Ranges {
				views = append(views, e.whole[0][x.Off:x.Off+x.Len:x.Off+x.Len])
			}
			moved = tiers.LineBytes(r.Ranges)
			pins[i] = tiers.NewPin(views[from:len(views):len(views)], moved, e.release)
		}
		e.share.Store(math.Float32bits(min(1, float32(moved)/float32(len(e.whole[0])))))
		read += int64(moved)
	}
	t.mu.RUnlock()
	t.hits.Add(hits)
	t.misses.Add(int64(len(reqs)) - hits)
	t.read.Add(read)
	return pins, nil
}

// findLocked looks up what is held of each request, nil if it is not, and checks that requests lie inside their pieces.
func (t *Tier) findLocked(entries []*entry, reqs []tiers.Request) error {
	var h *tiers.Header
	var s *segment
	for i := range reqs {
		r := &reqs[i]
		if r.Header != h {
			h, s = r.Header, t.mu.segments[r.Header.ID]
		}
		n := 0
		if e := s.at(r.Head, r.Plane); e != nil {
			entries[i], n = e, len(e.whole[0])
		} else {
			_, n, _ = h.Piece(r.Head, r.Plane)
		}
		for _, g := range r.Ranges {
			if g.Off < 0 || g.Len < 0 || g.Off > n || g.Len > n-g.Off {
				return fmt.Errorf("%v, head %d, %v: range %d+%d outside %d bytes", h.ID, r.Head, r.Plane, g.Off, g.Len, n)
			}
		}
	}
	return nil
}

// missedLocked tells the policy of a piece that was wanted, once in missShare, and less often if little of it was.
func (t *Tier) missedLocked(r *tiers.Request) {
	share := 1.
	if _, n, _ := r.Header.Piece(r.Head, r.Plane); n > 0 && len(r.Ranges) > 0 {
		share = math.Sqrt(min(1, float64(tiers.LineBytes(r.Ranges))/float64(n)))
	}
	if rand.Float64()*missShare < share {
		t.policy.touch(pieceKey(r.Header.ID, r.Head, r.Plane))
	}
}
