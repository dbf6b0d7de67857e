package gpu

import (
	"errors"
	"math/bits"
	"time"

	"kvtier/tiers"
	"kvtier/tiers/gpu/cuda"
	"kvtier/tiers/gpu/kernels"
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
	lost := t.bank.err() != nil
	t.mu.Lock()
	defer t.mu.Unlock()
	l = &lease{}
	return l, !lost && t.leaseLocked(l, h, planes)
}

// leaseAll leases those of segments that are attended on the device, the zero lease for the others. There may be hundreds, so
// it asks and locks once.
func (t *Tier) leaseAll(segments []Segment) []lease {
	all := make([]lease, len(segments))
	lost := t.bank.err() != nil
	use := useOf(0, time.Since(t.began))
	t.mu.Lock()
	defer t.mu.Unlock()
	for i, s := range segments {
		if x := t.mu.segments[s.Header.ID]; !lost && (x == nil || x.attends) {
			t.leaseLocked(&all[i], s.Header, kernels.Planes(s.Low))
		}
		if id := s.Header.ID; t.mu.segments[id] == nil {
			t.rememberLocked(id, t.absentLocked(id).with(use))
		}
	}
	return all
}

func (t *Tier) leaseLocked(l *lease, h *tiers.Header, planes tiers.PlaneSet) bool {
	wanted := int64(bits.OnesCount16(uint16(planes)) * len(h.Heads))
	s := t.mu.segments[h.ID]
	if s == nil || s.table.complete&planes != planes || t.mu.gone != nil {
		t.misses.Add(wanted)
		return false
	}
	t.hits.Add(wanted)
	if s.leases++; s.ahead {
		s.ahead = false
		t.aheadUsed.Add(1)
	}
	*l = lease{t, s, s.table}
	return true
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

// releaseAll releases leases whose segments are read alike.
func (t *Tier) releaseAll(all []lease) {
	t.mu.Lock()
	defer t.mu.Unlock()
	use := useOf(0, time.Since(t.began))
	for i := range all {
		if s := all[i].segment; s != nil {
			s.heat = s.heat.with(use)
			t.endLocked(s)
			all[i].segment = nil
		}
	}
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
