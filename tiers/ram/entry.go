package ram

import (
	"math"
	"sync/atomic"

	"kvtier/tiers"
)

// entry is one piece and the room it has. The arena's fields are guarded by Tier.mu.
type entry struct {
	// First what every pin needs: a cold entry costs it one cache line.
	whole [1][]byte // the bytes; never changed once the entry is in the map
	// refs counts one for being in the map and one for each pin. It grows only
	// under Tier.mu (read), and only while the entry is in the map.
	refs    atomic.Int32
	credit  atomic.Uint32           // use that the policy was not yet told of, in 1/creditUnit
	share   atomic.Uint32           // of the piece that the newest pin read, float32 bits
	release func(attention float32) // made once, so that a pin allocates nothing

	slab     *slab
	off      uint32 // of the slab, in grains
	n        uint32 // grains
	resident bool   // in the map; guarded by Tier.mu

	id    tiers.ID
	head  int
	plane tiers.Plane
	key   string // the policy's name for it
}

const (
	creditUnit  = 256
	creditFloor = creditUnit / missShare
	missShare   = 8 // a miss is told to the policy once in this many
)

func newEntry(t *Tier, id tiers.ID, head int, p tiers.Plane, size int) *entry {
	e := &entry{id: id, head: head, plane: p, key: pieceKey(id, head, p), n: uint32((size + grain - 1) / grain)}
	e.release = func(attention float32) { t.release(e, attention) }
	return e
}

// cost is what the policy is told the piece weighs, in bytes.
func (e *entry) cost() int64 { return int64(e.n) * grain }

// idleLocked says that the piece is resident and nobody reads it. Tier.mu is
// held (write), so that it stays so.
func (e *entry) idleLocked() bool { return e.resident && e.refs.Load() == 1 }

// release ends a pin.
func (t *Tier) release(e *entry, attention float32) {
	c := credit(attention, math.Float32frombits(e.share.Load()))
	if total := e.credit.Add(c); total/creditUnit != (total-c)/creditUnit {
		t.mu.RLock()
		if !t.mu.closed {
			t.policy.touch(e.key)
		}
		t.mu.RUnlock()
	}
	t.unpin(e)
}

// unpin gives a reference back, and with the last one the room.
func (t *Tier) unpin(e *entry) {
	if e.refs.Add(-1) > 0 {
		return
	}
	t.mu.Lock()
	t.mu.arena.free(e)
	empty := t.trimLocked()
	t.mu.Unlock()
	_ = t.unmap(empty) // a slab that stays mapped stays counted
}

// credit is what a release is worth that read a share of its piece; see the package documentation.
func credit(attention, share float32) uint32 {
	c := float64(creditFloor)
	if attention > 0 { // or it is no number
		c += (creditUnit - creditFloor) * math.Sqrt(math.Min(float64(attention), 1))
	}
	return uint32(math.Ceil(c * math.Sqrt(float64(share))))
}
