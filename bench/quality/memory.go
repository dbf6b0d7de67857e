package quality

import (
	"context"
	"sync/atomic"

	"kvtier/bench/memtier"
	"kvtier/tiers"
)

// counted is a tier in memory that also counts what a disk would have moved.
type counted struct {
	*memtier.Tier
	blocks atomic.Int64 // bytes, in whole blocks
}

// Pin counts the blocks that each request touches.
func (c *counted) Pin(ctx context.Context, reqs []tiers.Request) ([]tiers.Pin, tiers.Moved, error) {
	for _, r := range reqs {
		off, n, _ := r.Header.Piece(r.Head, r.Plane)
		ranges := r.Ranges
		if len(ranges) == 0 {
			ranges = []tiers.Range{{Len: n}}
		}
		c.blocks.Add(blockBytes(ranges, off))
	}
	return c.Tier.Pin(ctx, reqs)
}

// blockBytes is how many bytes of whole blocks ranges touch, base being where
// the piece begins. A block counts once.
func blockBytes(ranges []tiers.Range, base int) int64 {
	seen := make(map[int]bool)
	for _, r := range ranges {
		for b := (base + r.Off) / tiers.BlockSize; r.Len > 0 && b <= (base+r.Off+r.Len-1)/tiers.BlockSize; b++ {
			seen[b] = true
		}
	}
	return int64(len(seen) * tiers.BlockSize)
}
