package ram

import (
	"fmt"

	"kvtier/tiers"
)

// Drop forgets planes of a segment, and with all of them that it is held: a
// segment that comes back under the same name is a new one.
func (t *Tier) Drop(id tiers.ID, planes tiers.PlaneSet) error {
	t.writes.Lock()
	defer t.writes.Unlock()
	t.mu.Lock()
	if t.mu.closed {
		t.mu.Unlock()
		return fmt.Errorf("ram: drop %v: %w", id, tiers.ErrClosed)
	}
	gone := t.piecesLocked(id, planes)
	if s := t.mu.segments[id]; s != nil && planes&tiers.AllPlanes == tiers.AllPlanes {
		if s.held = false; s.pieces == 0 {
			delete(t.mu.segments, id)
		}
	}
	for _, e := range gone {
		t.forgetLocked(e)
	}
	empty := t.trimLocked()
	t.mu.Unlock()
	t.policy.del(gone...)
	return t.unmap(empty)
}

// Hold keeps what is held of a segment, and what will be put, from eviction
// until it is called with false. Held pieces count towards the limit: if they
// fill it, Put returns ErrFull. Drop forgets held pieces too, and Drop of all
// planes ends the hold.
func (t *Tier) Hold(id tiers.ID, held bool) error {
	t.writes.Lock()
	defer t.writes.Unlock()
	t.mu.Lock()
	if t.mu.closed {
		t.mu.Unlock()
		return fmt.Errorf("ram: hold %v: %w", id, tiers.ErrClosed)
	}
	s := t.mu.segments[id]
	if s == nil && held {
		s = &segment{}
		t.mu.segments[id] = s
	}
	if s == nil || s.held == held {
		t.mu.Unlock()
		return nil
	}
	s.held = held
	es := t.piecesLocked(id, tiers.AllPlanes)
	if s.pieces == 0 && !held {
		delete(t.mu.segments, id)
	}
	t.mu.Unlock()
	if held {
		t.policy.del(es...) // what the policy does not know it does not evict
	} else {
		t.policy.add(es...)
	}
	return nil
}

// piecesLocked lists pieces of a segment.
func (t *Tier) piecesLocked(id tiers.ID, planes tiers.PlaneSet) []*entry {
	s := t.mu.segments[id]
	if s == nil {
		return nil
	}
	var out []*entry
	for head := range s.heads {
		for p, e := range s.heads[head] {
			if e != nil && planes.Has(tiers.Plane(p)) {
				out = append(out, e)
			}
		}
	}
	return out
}
