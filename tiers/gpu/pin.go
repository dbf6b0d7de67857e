package gpu

import (
	"context"
	"fmt"

	"kvtier/tiers"
	"kvtier/tiers/gpu/cuda"
)

// closeGap is the gap between ranges, in bytes, that is cheaper to copy than to
// leave out: a copy costs about as much as 16 KiB over PCI Express.
const closeGap = 16 << 10

// Pin copies ranges of the pieces that are held into host memory. It is the
// slow way to read: see lease. Transferred counts the bytes copied, with the
// short gaps between ranges. If the device does not answer, the error is ErrStuck.
func (t *Tier) Pin(ctx context.Context, reqs []tiers.Request) ([]tiers.Pin, error) {
	var pins []tiers.Pin
	err := t.patiently(background, t.patience, func() (err error) { pins, err = t.pin(ctx, reqs); return err }, nil)
	if err != nil {
		return nil, fmt.Errorf("gpu: pin: %w", asTier(err))
	}
	return pins, nil
}

func (t *Tier) pin(ctx context.Context, reqs []tiers.Request) ([]tiers.Pin, error) {
	t.reads.RLock()
	defer t.reads.RUnlock()
	if err := t.usable(ctx); err != nil {
		return nil, err
	}
	for i := range reqs {
		if err := check(&reqs[i]); err != nil {
			return nil, err
		}
	}
	leased := make([]*segment, len(reqs))
	rooms := make([]room, len(reqs))
	var hits int64
	t.mu.Lock()
	for i := range reqs {
		s := t.mu.segments[reqs[i].Header.ID]
		if s == nil {
			continue
		}
		if rooms[i] = s.table.at(reqs[i].Head, reqs[i].Plane); rooms[i].slab != nil {
			s.leases++
			leased[i] = s
			hits++
		}
	}
	t.mu.Unlock()
	defer func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		for _, s := range leased {
			if s != nil {
				t.endLocked(s)
			}
		}
	}()
	pins := make([]tiers.Pin, len(reqs))
	var copies []transfer
	for i, s := range leased {
		if s == nil {
			continue
		}
		views, runs := plan(&reqs[i], rooms[i])
		moved := 0
		for _, r := range runs {
			moved += len(r.bytes)
		}
		copies = append(copies, runs...)
		t.read.Add(int64(moved))
		pins[i] = tiers.NewPin(views, moved, func(attention float32) {
			t.mu.Lock()
			defer t.mu.Unlock()
			t.useLocked(s, attention)
		})
	}
	if len(copies) > 0 {
		if err := t.bank.read(ctx, copies); err != nil {
			return nil, err
		}
	}
	t.hits.Add(hits)
	t.misses.Add(int64(len(reqs)) - hits)
	return pins, nil
}

// plan makes the bytes of a request: a view for each range, and the copies that fill them.
func plan(r *tiers.Request, at room) (views [][]byte, runs []transfer) {
	ranges := r.Ranges
	if len(ranges) == 0 {
		_, n, _ := r.Header.Piece(r.Head, r.Plane)
		ranges = []tiers.Range{{Off: 0, Len: n}}
	}
	views = make([][]byte, len(ranges))
	for i := 0; i < len(ranges); {
		lo, hi := ranges[i].Off, ranges[i].Off+ranges[i].Len
		j := i + 1
		for ; j < len(ranges) && ranges[j].Off >= lo && ranges[j].Off <= hi+closeGap; j++ {
			hi = max(hi, ranges[j].Off+ranges[j].Len)
		}
		run := make([]byte, hi-lo)
		for ; i < j; i++ {
			from := ranges[i].Off - lo
			views[i] = run[from : from+ranges[i].Len : from+ranges[i].Len]
		}
		if len(run) > 0 {
			runs = append(runs, transfer{at: at.ptr() + cuda.Ptr(lo), bytes: run})
		}
	}
	return views, runs
}

// check says whether a request names a piece of its segment and lies inside it.
func check(r *tiers.Request) error {
	_, n, _ := r.Header.Piece(r.Head, r.Plane) // a piece that the segment does not have is a miss
	for _, g := range r.Ranges {
		if g.Off < 0 || g.Len < 0 || g.Off > n || g.Len > n-g.Off {
			return fmt.Errorf("%v, head %d, %v: range %d+%d outside %d bytes",
				r.Header.ID, r.Head, r.Plane, g.Off, g.Len, n)
		}
	}
	return nil
}
