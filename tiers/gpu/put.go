package gpu

import (
	"container/heap"
	"context"
	"errors"
	"fmt"
	"slices"

	"kvtier/tiers"
	"kvtier/tiers/gpu/cuda"
)

// Put stores copies of pieces, all or none, and returns when they have arrived.
// Colder segments go where room is short; tiers.ErrFull says that this does not suffice. If the device does not answer, the error is
// ErrStuck, and the pieces are read, and may arrive, later: they must not change then. See PutFrom.
func (t *Tier) Put(ctx context.Context, h *tiers.Header, pieces []tiers.Piece) error {
	return t.PutFrom(ctx, h, pieces, func() {})
}

// PutFrom is Put for pieces that are somebody's: release is called, once, when they are not read any more. The device copies by itself from those
// that lie in slabs (Options.Slab).
func (t *Tier) PutFrom(ctx context.Context, h *tiers.Header, pieces []tiers.Piece, release func()) error {
	err := t.usable(ctx)
	if err != nil {
		release()
	} else {
		err = t.patiently(background, t.patience, func() error { // ctx ends it early, but not under a copy
			defer release()
			return t.put(ctx, h, pieces)
		}, nil)
	}
	if err != nil {
		return fmt.Errorf("gpu: put %v: %w", h.ID, asTier(err))
	}
	return nil
}

func (t *Tier) put(ctx context.Context, h *tiers.Header, pieces []tiers.Piece) error {
	t.writes.Lock()
	defer t.writes.Unlock()
	if err := t.usable(ctx); err != nil {
		return err
	}
	missing, err := t.missing(h, pieces)
	if err != nil || len(missing) == 0 {
		return err
	}
	sizes := make([]int, len(missing))
	for i, p := range missing {
		sizes[i] = len(p.Bytes)
	}
	rooms, err := t.reserve(h.ID, sizes)
	if err != nil {
		return err
	}
	copies := make([]transfer, len(missing))
	bytes := 0
	for i, p := range missing {
		copies[i] = transfer{at: rooms[i].ptr(), bytes: p.Bytes, pinned: t.pinned.holds(t.bank, p.Bytes)}
		bytes += len(p.Bytes)
	}
	err = t.bank.write(ctx, copies)
	t.mu.Lock()
	defer t.mu.Unlock()
	dropped := t.mu.coming.dropped
	t.mu.coming.id = tiers.ID{}
	if err != nil {
		t.mu.arena.release(rooms)
		return err
	}
	t.listLocked(h, missing, rooms)
	t.written.Add(int64(bytes))
	if s := t.mu.segments[h.ID]; dropped != 0 {
		t.forgetLocked(h.ID, s, dropped)
	}
	return nil
}

// missing returns the pieces that are not held, each once, which are coming now. The error is ErrCorrupt.
func (t *Tier) missing(h *tiers.Header, pieces []tiers.Piece) (out []tiers.Piece, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.mu.coming.id, t.mu.coming.dropped = h.ID, 0
	s := t.mu.segments[h.ID]
	type place struct {
		head  int
		plane tiers.Plane
	}
	seen := make(map[place]bool, len(pieces))
	for _, p := range pieces {
		if _, n, ok := h.Piece(p.Head, p.Plane); !ok || n != len(p.Bytes) {
			return nil, fmt.Errorf("head %d, %v: %d bytes, the header says %d: %w",
				p.Head, p.Plane, len(p.Bytes), n, tiers.ErrCorrupt)
		}
		at := place{p.Head, p.Plane}
		if seen[at] || s != nil && s.table.at(p.Head, p.Plane).slab != nil {
			continue
		}
		seen[at] = true
		out = append(out, p)
	}
	return out, nil
}

// reserve finds room for pieces of a segment, of so many bytes each, for all or for none: in the slabs
// there are, in new ones up to the limit, or in that of colder segments. The caller holds writes.
func (t *Tier) reserve(id tiers.ID, pieces []int) ([]room, error) {
	sizes := make([]int, len(pieces))
	total := 0
	for i, n := range pieces {
		sizes[i] = roundUp(n)
		total += sizes[i]
	}
	full := fmt.Errorf("%d pieces, %d bytes: %w", len(pieces), total, tiers.ErrFull)
	for {
		t.mu.Lock()
		if int64(total) > t.mu.arena.limit {
			t.mu.Unlock()
			return nil, full
		}
		rooms, ok := t.mu.arena.allocAll(sizes)
		t.mu.Unlock()
		if ok {
			return rooms, nil
		}
		if grown, err := t.grow(slices.Max(sizes)); err != nil {
			return nil, err
		} else if !grown {
			break
		}
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if rooms, ok := t.evictLocked(id, sizes); ok {
		return rooms, nil
	}
	return nil, full
}

// grow adds a slab that has room for a piece of so many bytes. Where the device
// has less than the limit allows, a smaller one, and at last the limit becomes
// what there is.
func (t *Tier) grow(largest int) (bool, error) {
	t.mu.Lock()
	size := t.mu.arena.slabSize(largest)
	t.mu.Unlock()
	for size > 0 {
		p, err := t.bank.alloc(size)
		if err == nil {
			t.mu.Lock()
			t.mu.arena.add(p, size)
			t.mu.Unlock()
			return true, nil
		}
		if !errors.Is(err, cuda.ErrOutOfMemory) {
			return false, err
		}
		if size /= 2; size < max(largest, minSlab) {
			t.mu.Lock()
			t.mu.arena.limit = t.mu.arena.mapped
			t.mu.Unlock()
			return false, nil
		}
		size = roundUp(size)
	}
	return false, nil
}

// MarkAhead notes that a segment, if it is held, came up before it was asked for: see Ahead.
func (t *Tier) MarkAhead(id tiers.ID) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if s := t.mu.segments[id]; s != nil && !s.ahead {
		s.ahead = true
		t.ahead.Add(1)
	}
}

// Ahead returns how many segments came up before they were asked for, and how many of them were then attended while they were there.
func (t *Tier) Ahead() (came, used int64) { return t.ahead.Load(), t.aheadUsed.Load() }

// listLocked makes pieces visible.
func (t *Tier) listLocked(h *tiers.Header, pieces []tiers.Piece, rooms []room) {
	s := t.mu.segments[h.ID]
	if s == nil {
		s = &segment{id: h.ID, attends: t.Attends(h), table: &table{heads: make([][tiers.NumPlanes]room, len(h.Heads))}, heat: t.absentLocked(h.ID)}
		t.mu.segments[h.ID] = s
		delete(t.mu.absent, h.ID)
		defer heap.Push(&t.mu.ranking, s) // with its heat
	}
	n := &table{heads: slices.Clone(s.table.heads), pieces: s.table.pieces + len(pieces), complete: tiers.AllPlanes}
	for i, p := range pieces {
		n.heads[p.Head][p.Plane] = rooms[i]
	}
	for head := range n.heads {
		for p, r := range n.heads[head] {
			if _, _, has := h.Piece(head, tiers.Plane(p)); has && r.slab == nil {
				n.complete &^= 1 << p
			}
		}
	}
	s.table = n
	t.mu.pieces += int64(len(pieces))
	t.useLocked(s, 0) // who is new is not colder than who was never used since
}
