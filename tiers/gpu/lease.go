package gpu

import (
	"errors"
	"math/bits"

	"kvtier/tiers"
	"kvtier/tiers/gpu/cuda"
)

// lease keeps the pieces of a segment where they are on the device.
type lease struct {
	tier    *Tier
	segment *segment
	table   *table
}

// lease leases what the tier holds of a segment. ok is false unless all pieces
// that the segment has of planes, of all its heads, are resident: a miss.
// Kernels on any stream may read at once: what is resident has arrived.
func (t *Tier) lease(h *tiers.Header, planes tiers.PlaneSet) (l *lease, ok bool) {
	wanted := int64(bits.OnesCount16(uint16(planes)) * len(h.Heads))
	if t.bank.err() != nil {
		t.misses.Add(wanted)
		return nil, false
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	s := t.mu.segments[h.ID]
	if s == nil || s.table.complete&planes != planes || t.mu.gone != nil {
		t.misses.Add(wanted)
		return nil, false
	}
	t.hits.Add(wanted)
	s.leases++
	return &lease{t, s, s.table}, true
}

// at returns the device address of a piece, a multiple of 256; 0 if it is absent.
func (l *lease) at(head int, p tiers.Plane) cuda.Ptr { return l.table.at(head, p).ptr() }

// release ends the lease and says what share of the query's attention the
// segment received, 0 to 1. The kernels that read must be done: who cannot wait
// for them uses abandon instead. Releasing twice does nothing.
func (l *lease) release(attention float32) {
	t, s := l.tier, l.segment
	if s == nil {
		return
	}
	l.segment = nil
	t.mu.Lock()
	defer t.mu.Unlock()
	t.useLocked(s, attention)
	t.endLocked(s)
}

// abandon lets the tier release leases when e, recorded behind the last kernel
// that reads them, has happened. The tier destroys e. If the device is lost
// meanwhile, nothing reads any more.
func (t *Tier) abandon(e cuda.Event, leases ...*lease) {
	t.abandoned.Go(func() {
		if err := t.bank.wait(e); err != nil && !errors.Is(err, cuda.ErrLost) {
			return // nobody knows whether the kernel still reads: the room stays taken
		}
		for _, l := range leases {
			l.release(0)
		}
	})
}
