// Package memtier holds whole sealed segments in memory, for measurements.
//
// A Tier is a sparse.Reader without a daemon, a disk or an eviction policy
// behind it: every piece is there, so that a measurement sees what selection
// does and nothing else. What pins transfer is counted exactly as the RAM tier
// counts it, in cache lines of 64 bytes; a test holds the two against each other.
package memtier

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"

	"kvtier/tiers"
	"kvtier/tiers/seal"
)

// Tier holds segments whole. Its methods are safe for concurrent use.
type Tier struct {
	mu struct {
		sync.RWMutex
		segments map[tiers.ID][tiers.NumParts][]byte
	}
	live atomic.Int64
}

// New returns an empty tier.
func New() *Tier {
	t := &Tier{}
	t.mu.segments = make(map[tiers.ID][tiers.NumParts][]byte)
	return t
}

// Add takes over the parts of a segment as seal.Segment returns them; they must
// not change any more. It checks the header's counts and every block's
// checksum. The error is tiers.ErrCorrupt.
func (t *Tier) Add(h *tiers.Header, parts [tiers.NumParts][]byte) error {
	if err := seal.Check(h); err != nil {
		return fmt.Errorf("memtier: add: %w", err)
	}
	for p := range tiers.NumParts {
		if int64(len(parts[p])) != h.Bytes(p) {
			return fmt.Errorf("memtier: add: segment %v: part %d has %d bytes, not %d: %w",
				h.ID, p, len(parts[p]), h.Bytes(p), tiers.ErrCorrupt)
		}
		if err := h.CheckBlocks(p, 0, parts[p]); err != nil {
			return fmt.Errorf("memtier: add: %w", err)
		}
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.mu.segments[h.ID] = parts
	return nil
}

// Clone returns a tier of the same segments, of which place copies each part to
// wherever the caller wants it.
func (t *Tier) Clone(place func(part []byte) []byte) *Tier {
	out := New()
	t.mu.RLock()
	defer t.mu.RUnlock()
	for id, parts := range t.mu.segments {
		for p := range parts {
			parts[p] = place(parts[p])
		}
		out.mu.segments[id] = parts
	}
	return out
}

// Piece returns a piece's bytes without counting them: for what a measurement
// itself wants to know, as the order of tokens. nil if there is no such piece.
func (t *Tier) Piece(h *tiers.Header, head int, p tiers.Plane) []byte {
	off, n, ok := h.Piece(head, p)
	if !ok {
		return nil
	}
	t.mu.RLock()
	part := t.mu.segments[h.ID][p.Part()]
	t.mu.RUnlock()
	if part == nil {
		return nil
	}
	return part[off : off+n : off+n]
}

// Live returns how many pins were not released.
func (t *Tier) Live() int64 { return t.live.Load() }

// Pin returns ranges of pieces, all of them held. Moved.RAM sums the cache
// lines that each request touches. A piece that is not there is
// tiers.ErrNotFound, and a range outside its piece an error, too; nothing is
// pinned then.
func (t *Tier) Pin(ctx context.Context, reqs []tiers.Request) ([]tiers.Pin, tiers.Moved, error) {
	var moved tiers.Moved
	if err := ctx.Err(); err != nil {
		return nil, moved, fmt.Errorf("memtier: pin: %w", err)
	}
	pins := make([]tiers.Pin, len(reqs))
	for i, r := range reqs {
		whole := t.Piece(r.Header, r.Head, r.Plane)
		if whole == nil {
			return nil, tiers.Moved{}, fmt.Errorf("memtier: pin %v, head %d, %v: %w", r.Header.ID, r.Head, r.Plane, tiers.ErrNotFound)
		}
		ranges := r.Ranges
		if len(ranges) == 0 {
			ranges = []tiers.Range{{Len: len(whole)}}
		}
		views, err := cut(whole, ranges)
		if err != nil {
			return nil, tiers.Moved{}, fmt.Errorf("memtier: pin %v, head %d, %v: %w", r.Header.ID, r.Head, r.Plane, err)
		}
		lines := tiers.LineBytes(ranges)
		moved.RAM += int64(lines)
		pins[i] = tiers.NewPin(views, lines, func(float32) { t.live.Add(-1) })
	}
	t.live.Add(int64(len(pins)))
	return pins, moved, nil
}

// cut returns the ranges of b.
func cut(b []byte, ranges []tiers.Range) ([][]byte, error) {
	views := make([][]byte, 0, len(ranges))
	for _, r := range ranges {
		if r.Off < 0 || r.Len < 0 || r.Off > len(b) || r.Len > len(b)-r.Off {
			return nil, fmt.Errorf("range %d+%d outside %d bytes", r.Off, r.Len, len(b))
		}
		views = append(views, b[r.Off:r.Off+r.Len:r.Off+r.Len])
	}
	return views, nil
}
