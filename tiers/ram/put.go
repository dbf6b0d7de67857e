package ram

import (
	"context"
	"fmt"

	"kvtier/tiers"
)

// way is how pieces come by their room.
type way int

const (
	contend way = iota // the policy says whose room they deserve
	offer              // only room that is free
	prime              // as contend; the policy counts uses that are still to come
)

// primeUses is how many uses count in advance of pieces that every query reads.
const primeUses = 8

// Put stores copies of pieces, all or none: where room is short, the policy has
// to admit every one of them, so what is promoted by its use is best put piece by piece.
func (t *Tier) Put(ctx context.Context, h *tiers.Header, pieces []tiers.Piece) error {
	return t.put(ctx, h, pieces, contend)
}

// Offer is Put as far as there is free room: nothing goes for it.
func (t *Tier) Offer(ctx context.Context, h *tiers.Header, pieces []tiers.Piece) error {
	return t.put(ctx, h, pieces, offer)
}

// Prime is Put for pieces that every query will read: they contend as if some had done so.
func (t *Tier) Prime(ctx context.Context, h *tiers.Header, pieces []tiers.Piece) error {
	return t.put(ctx, h, pieces, prime)
}

func (t *Tier) put(ctx context.Context, h *tiers.Header, pieces []tiers.Piece, how way) error {
	t.writes.Lock()
	defer t.writes.Unlock()
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("ram: put %v: %w", h.ID, err)
	}
	es, from, held, err := t.missing(h, pieces)
	if err != nil {
		return fmt.Errorf("ram: put %v: %w", h.ID, err)
	}
	// Those that are there already must not go to make room for the others.
	there := t.there(h.ID, pieces)
	defer func() {
		for _, e := range there {
			t.unpin(e)
		}
	}()
	if len(es) == 0 {
		return nil
	}
	if how == prime {
		for _, e := range es {
			for range primeUses {
				t.policy.touch(e.key)
			}
		}
	}
	if !t.reserve(es, held, how) {
		return fmt.Errorf("ram: put %v: %d pieces: %w", h.ID, len(es), tiers.ErrFull)
	}
	var bytes int64
	for i, e := range es {
		n := copy(e.bytes(), from[i])
		e.whole[0] = e.bytes()[:n:n]
		e.refs.Store(1)
		bytes += int64(n)
	}
	t.mu.Lock()
	s := t.mu.segments[h.ID]
	if s == nil {
		s = &segment{}
		t.mu.segments[h.ID] = s
	}
	for _, e := range es {
		for e.head >= len(s.heads) {
			s.heads = append(s.heads, [tiers.NumPlanes]*entry{})
		}
		s.heads[e.head][e.plane], e.resident = e, true
	}
	s.pieces += len(es)
	t.mu.pieces += int64(len(es))
	t.mu.Unlock()
	t.written.Add(bytes)
	if !held {
		t.policy.add(es...)
	}
	return nil
}

// missing makes entries for the pieces that are not held, with the bytes of each.
func (t *Tier) missing(h *tiers.Header, pieces []tiers.Piece) (es []*entry, from [][]byte, held bool, err error) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	if t.mu.closed {
		return nil, nil, false, tiers.ErrClosed
	}
	type place struct {
		head  int
		plane tiers.Plane
	}
	seen := make(map[place]bool, len(pieces))
	s := t.mu.segments[h.ID]
	for _, p := range pieces {
		if _, n, ok := h.Piece(p.Head, p.Plane); !ok || n != len(p.Bytes) {
			return nil, nil, false, fmt.Errorf("head %d, %v: %d bytes, the header says %d: %w",
				p.Head, p.Plane, len(p.Bytes), n, tiers.ErrCorrupt)
		}
		at := place{p.Head, p.Plane}
		if seen[at] || s.at(p.Head, p.Plane) != nil {
			continue
		}
		seen[at] = true
		es = append(es, newEntry(t, h.ID, p.Head, p.Plane, len(p.Bytes)))
		from = append(from, p.Bytes)
	}
	return es, from, s != nil && s.held, nil
}

// there takes a reference to each of the pieces that is held.
func (t *Tier) there(id tiers.ID, pieces []tiers.Piece) (out []*entry) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	s := t.mu.segments[id]
	for _, p := range pieces {
		if e := s.at(p.Head, p.Plane); e != nil {
			e.refs.Add(1)
			out = append(out, e)
		}
	}
	return out
}

// contests is how often the policy is asked before neighbours are evicted.
const contests = 2

// reserve finds room for all entries or for none. Pieces of a held segment do
// not contend: they take the room that is cheapest to free.
func (t *Tier) reserve(es []*entry, held bool, how way) bool {
	t.mu.Lock()
	var rest []*entry
	for _, e := range es {
		if !t.mu.arena.alloc(e) {
			rest = append(rest, e)
		}
	}
	t.mu.Unlock()
	if len(rest) == 0 {
		return true
	}
	if how == offer && !held {
		t.giveUp(es, rest, nil)
		return false
	}
	var victims []*entry // out of the policy, still in the map
	for round := 0; ; round++ {
		last := held || round == contests
		for _, e := range rest {
			if last {
				break
			}
			v, admitted := t.policy.contest(e)
			if victims = append(victims, v...); !admitted {
				t.giveUp(es, rest, victims)
				return false
			}
		}
		t.mu.Lock()
		evicted, stay, ok := t.exchangeLocked(victims, rest, last)
		t.mu.Unlock()
		if ok {
			t.evictions.Add(int64(len(evicted)))
			t.policy.del(evicted...) // those that the policy did not name
			t.policy.add(stay...)
			return true
		}
		if last {
			t.giveUp(es, rest, victims)
			return false
		}
	}
}

// giveUp undoes a reservation.
func (t *Tier) giveUp(es, rest, victims []*entry) {
	t.mu.Lock()
	without := make(map[*entry]bool, len(rest))
	for _, e := range rest {
		without[e] = true
	}
	for _, e := range es {
		if !without[e] {
			t.mu.arena.free(e)
		}
	}
	empty := t.trimLocked()
	t.mu.Unlock()
	t.policy.add(victims...)
	_ = t.unmap(empty)
}

// exchangeLocked gives the room of idle victims to all of rest, or changes
// nothing. With windows, more pieces go where the holes are too small.
// stay are the victims that somebody reads: their going would free nothing.
func (t *Tier) exchangeLocked(victims, rest []*entry, windows bool) (evicted, stay []*entry, ok bool) {
	a := &t.mu.arena
	gone := make(map[*entry]bool, len(victims))
	evict := func(e *entry) {
		gone[e] = true
		evicted = append(evicted, e)
		a.free(e)
	}
	for _, v := range victims {
		if v.idleLocked() {
			evict(v)
		} else {
			stay = append(stay, v)
		}
	}
	mayGo := func(e *entry) bool { return e.idleLocked() && !t.mu.segments[e.id].held }
	done := 0
	for _, e := range rest {
		if !a.alloc(e) {
			if !windows {
				break
			}
			for _, v := range a.window(e.n, mayGo) {
				evict(v)
			}
			if !a.alloc(e) {
				break
			}
		}
		done++
	}
	if done < len(rest) {
		for _, e := range rest[:done] {
			a.free(e)
		}
		for _, e := range evicted {
			a.reclaim(e)
		}
		return nil, nil, false
	}
	for _, e := range evicted {
		t.unlistLocked(e)
		e.refs.Store(0) // it was idle, and its room has a new owner
	}
	return evicted, stay, true
}
