package quality

import (
	"context"
	"fmt"
	"sync/atomic"

	"kvtier/tiers"
)

// memory holds segments whole and counts what is read of them.
type memory struct {
	parts map[tiers.ID][tiers.NumParts][]byte
	lines atomic.Int64
	blks  atomic.Int64
}

// moved is what was read: bytes in cache lines, and in the disk's blocks.
type moved struct{ Lines, Blocks int64 }

func newMemory() *memory { return &memory{parts: make(map[tiers.ID][tiers.NumParts][]byte)} }

func (m *memory) Add(h *tiers.Header, parts [tiers.NumParts][]byte) { m.parts[h.ID] = parts }

func (m *memory) Moved() moved { return moved{m.lines.Load(), m.blks.Load()} }

// Pin counts a line or block that ends one range and begins the next once.
func (m *memory) Pin(ctx context.Context, reqs []tiers.Request) ([]tiers.Pin, tiers.Moved, error) {
	var total tiers.Moved
	if err := ctx.Err(); err != nil {
		return nil, total, err
	}
	pins := make([]tiers.Pin, len(reqs))
	for i, r := range reqs {
		off, n, ok := r.Header.Piece(r.Head, r.Plane)
		if !ok {
			return nil, total, fmt.Errorf("segment %v: plane %v: %w", r.Header.ID, r.Plane, tiers.ErrNotFound)
		}
		ranges := r.Ranges
		if len(ranges) == 0 {
			ranges = []tiers.Range{{Len: n}}
		}
		whole := m.parts[r.Header.ID][r.Plane.Part()][off : off+n]
		views := make([][]byte, len(ranges))
		for j, x := range ranges {
			views[j] = whole[x.Off : x.Off+x.Len : x.Off+x.Len]
		}
		const line = 64
		lines := touched(ranges, 0, line)
		m.lines.Add(lines)
		m.blks.Add(touched(ranges, off, tiers.BlockSize))
		total.RAM += lines
		pins[i] = tiers.NewPin(views, int(lines), func(float32) {})
	}
	return pins, total, nil
}

// touched is how many bytes of whole units ranges touch, base being where the
// piece begins. Each unit counts once.
func touched(ranges []tiers.Range, base, unit int) int64 {
	seen := make(map[int]bool)
	for _, r := range ranges {
		for u := (base + r.Off) / unit; r.Len > 0 && u <= (base+r.Off+r.Len-1)/unit; u++ {
			seen[u] = true
		}
	}
	return int64(len(seen) * unit)
}
