package ram

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"unsafe"

	"kvtier/tiers"
	"kvtier/tiers/memory"
)

// Options configures a tier.
type Options struct {
	// Bytes is the hard limit of memory mapped for slabs. It must be at least 4,096.
	Bytes int64
	// Unmapping is told of memory that Slab may have returned before it is given back to the system. An error says that it must not be: then it
	// stays, and counts. Nil: nobody wants to know.
	Unmapping func(slab []byte) error
}

// Tier holds pieces in RAM. It implements tiers.Tier and tiers.Holder.
type Tier struct {
	// writes serialises what changes the set of pieces (Put, Drop, Hold,
	// Close), because a Put is a dialogue with the policy. It is taken before mu.
	writes    sync.Mutex
	policy    *policy
	unmapping func(slab []byte) error

	mu struct {
		sync.RWMutex // write: below changes; read: references are taken
		segments     map[tiers.ID]*segment
		arena        arena
		pieces       int64
		closed       bool
	}

	hits, misses, read, written, evictions atomic.Int64
}

// segment is what the tier holds of one segment.
type segment struct {
	heads  [][tiers.NumPlanes]*entry
	pieces int
	held   bool // pieces are not evicted
}

// at returns the entry of a piece, nil if there is none.
func (s *segment) at(head int, p tiers.Plane) *entry {
	if s == nil || head < 0 || head >= len(s.heads) || p >= tiers.NumPlanes {
		return nil
	}
	return s.heads[head][p]
}

// New makes an empty tier. Memory is mapped as pieces arrive.
func New(o Options) (*Tier, error) {
	if o.Bytes < pageBytes {
		return nil, fmt.Errorf("ram: a limit of %d bytes holds nothing", o.Bytes)
	}
	p, err := newPolicy(o.Bytes)
	if err != nil {
		return nil, fmt.Errorf("ram: policy: %w", err)
	}
	t := &Tier{policy: p, unmapping: o.Unmapping}
	if t.unmapping == nil {
		t.unmapping = func([]byte) error { return nil }
	}
	t.mu.segments = map[tiers.ID]*segment{}
	t.mu.arena.limit = o.Bytes
	return t, nil
}

// Resident says whether a piece is held. It does not count as a use.
func (t *Tier) Resident(id tiers.ID, head int, p tiers.Plane) bool {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.mu.segments[id].at(head, p) != nil
}

// Holds says whether all pieces are held that a segment has of these planes. It does not count as a use.
func (t *Tier) Holds(h *tiers.Header, planes tiers.PlaneSet) bool {
	t.mu.RLock()
	defer t.mu.RUnlock()
	s := t.mu.segments[h.ID]
	for head := range h.Heads {
		for p := range tiers.NumPlanes {
			if _, _, ok := h.Piece(head, p); ok && planes.Has(p) && s.at(head, p) == nil {
				return false
			}
		}
	}
	return true
}

// Room says whether there is room for a piece for which nothing has to go.
func (t *Tier) Room(h *tiers.Header, head int, p tiers.Plane) bool {
	_, n, _ := h.Piece(head, p)
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.mu.arena.hasRoom(uint32((n + grain - 1) / grain))
}

// Slab returns the mapping that bytes of a pin lie in, which stays until the pin is released; nil if they are none of this tier's.
func (t *Tier) Slab(b []byte) []byte {
	t.mu.RLock()
	defer t.mu.RUnlock()
	at := uintptr(unsafe.Pointer(unsafe.SliceData(b)))
	for _, s := range t.mu.arena.slabs {
		if from := uintptr(unsafe.Pointer(unsafe.SliceData(s.mem))); at >= from && at-from < uintptr(len(s.mem)) {
			return s.mem
		}
	}
	return nil
}

// Usage says what the tier holds now and did so far. BytesUsed counts whole
// slabs: what the system has given.
func (t *Tier) Usage() tiers.Usage {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return tiers.Usage{
		BytesUsed: t.mu.arena.mapped, BytesLimit: t.mu.arena.limit,
		Pieces: t.mu.pieces,
		Hits:   t.hits.Load(), Misses: t.misses.Load(),
		BytesRead: t.read.Load(), BytesWritten: t.written.Load(),
		Evictions: t.evictions.Load(),
	}
}

// Close forgets every piece and gives the memory back. A pin that was not
// released stays valid: its slab goes with its last pin.
func (t *Tier) Close() error {
	t.writes.Lock()
	defer t.writes.Unlock()
	t.mu.Lock()
	if t.mu.closed {
		t.mu.Unlock()
		return nil
	}
	t.mu.closed = true
	for _, s := range t.mu.segments {
		for head := range s.heads {
			for _, e := range s.heads[head] {
				if e != nil {
					t.forgetLocked(e)
				}
			}
		}
	}
	clear(t.mu.segments)
	empty := t.mu.arena.trim(0)
	t.mu.Unlock()
	t.policy.close()
	return t.unmap(empty)
}

// unlistLocked takes a piece from the map.
func (t *Tier) unlistLocked(e *entry) {
	s := t.mu.segments[e.id]
	s.heads[e.head][e.plane], e.resident = nil, false
	t.mu.pieces--
	if s.pieces--; s.pieces == 0 && !s.held {
		delete(t.mu.segments, e.id)
	}
}

// forgetLocked takes a piece from the map. Its room is free with its last reference.
func (t *Tier) forgetLocked(e *entry) {
	t.unlistLocked(e)
	if e.refs.Add(-1) == 0 {
		t.mu.arena.free(e)
	}
}

// trimLocked takes empty slabs from the arena. One stays, so that a tier that
// breathes does not map and unmap.
func (t *Tier) trimLocked() []*slab {
	if t.mu.closed {
		return t.mu.arena.trim(0)
	}
	return t.mu.arena.trim(1)
}

// unmap gives slabs back. They count as used until the system has them.
func (t *Tier) unmap(slabs []*slab) error {
	var errs []error
	for _, s := range slabs {
		size := int64(len(s.mem))
		err := t.unmapping(s.mem)
		if err == nil {
			err = memory.Unmap(s.mem)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("ram: unmap: %w", err))
			continue
		}
		t.mu.Lock()
		t.mu.arena.mapped -= size
		t.mu.Unlock()
	}
	return errors.Join(errs...)
}
