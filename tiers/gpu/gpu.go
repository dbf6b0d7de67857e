package gpu

import (
	"cmp"
	"container/heap"
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"kvtier/tiers"
	"kvtier/tiers/gpu/cuda"
	"kvtier/tiers/gpu/kernels"
)

// Options configures a tier.
type Options struct {
	// Device is the number of the GPU, from 0.
	Device int
	// Bytes is the hard limit of device memory allocated for slabs: at least
	// 256, or Auto. Kernels and the driver need some besides: where less is free, less is the limit.
	Bytes int64
	// Patience is how long an answer or a copy is waited for, which takes milliseconds, and how long Close waits; 0: 10 seconds.
	Patience time.Duration
	// Slab returns the mapping that bytes of a piece lie in, whole pages that stay mapped until Unmapping; nil if they lie elsewhere. The device
	// copies from slabs by itself; the first piece of one has it pinned. PinBytes is the hard limit of what is pinned. Without Slab nothing is.
	Slab     func(b []byte) []byte
	PinBytes int64
}

const defaultPatience = 10 * time.Second

// Auto as a limit is what the device has free at Open, less a tenth and autoSpare for kernels and others.
const (
	Auto      = -1
	autoSpare = 1 << 30
)

// limit returns the limit in force, of so many free bytes: a sixteenth of them stays free in any case.
func (o *Options) limit(free int64) int64 {
	if o.Bytes == Auto {
		return max(free/10*9-autoSpare, grain)
	}
	return min(o.Bytes, max(free/16*15, grain))
}

// Info describes the device.
func (t *Tier) Info() cuda.Info { return t.dev.Info() }

// Tier holds pieces in a GPU's memory. It implements tiers.Tier.
type Tier struct {
	dev   *cuda.Device // nil in tests that put another bank in its place
	bank  bank
	began time.Time
	// patience is how long the device is waited for; late counts what goes on that was left (patience.go).
	patience time.Duration
	late     atomic.Int32
	// attender and sealing are nil where there is no device.
	attender *attender
	sealing  *kernels.Sealing
	pinned   pinned

	// writes serialises Put and Close. It is held while the device
	// copies, and taken before mu.
	writes sync.Mutex
	// reads is held, for reading, by Pin: Close waits for it.
	reads sync.RWMutex
	// abandoned counts leases whose kernels nobody waits for but the tier.
	abandoned sync.WaitGroup

	mu struct {
		sync.Mutex
		segments map[tiers.ID]*segment
		ranking  ranking           // all of segments
		absent   map[tiers.ID]heat // of segments that were used, or wanted, and are not held
		arena    arena
		pieces   int64
		coming   struct { // what Put brings
			id      tiers.ID
			dropped tiers.PlaneSet // meanwhile
		}
		gone error // why nothing can be asked for any more: tiers.ErrClosed, or given up
	}

	hits, misses, read, written, evictions atomic.Int64
	ahead, aheadUsed                       atomic.Int64
}

// segment is what the tier holds of one segment. Tier.mu guards it.
type segment struct {
	id      tiers.ID
	attends bool // there are kernels for it, which fit the device
	table   *table
	leases  int
	limbo   []room // dropped under a lease: free when the last one ends
	heat    heat
	ahead   bool // it was brought up before it was asked for, and was not yet
	rank    heat // and place: see ranking
	place   int
}

// table says where pieces lie. It is immutable: Put and Drop make another one.
type table struct {
	heads    [][tiers.NumPlanes]room
	pieces   int
	complete tiers.PlaneSet // planes of which every piece that the segment has is here
}

// at returns the room of a piece, the zero room if it is absent.
func (t *table) at(head int, p tiers.Plane) room {
	if head < 0 || head >= len(t.heads) || p >= tiers.NumPlanes {
		return room{}
	}
	return t.heads[head][p]
}

// rooms lists the rooms of planes.
func (t *table) rooms(planes tiers.PlaneSet) (out []room) {
	for head := range t.heads {
		for p, r := range t.heads[head] {
			if r.slab != nil && planes.Has(tiers.Plane(p)) {
				out = append(out, r)
			}
		}
	}
	return out
}

// without is the table less some planes.
func (t *table) without(planes tiers.PlaneSet) *table {
	n := &table{heads: append([][tiers.NumPlanes]room(nil), t.heads...), pieces: t.pieces, complete: t.complete}
	for head := range n.heads {
		for p := range n.heads[head] {
			if r := &n.heads[head][p]; r.slab != nil && planes.Has(tiers.Plane(p)) {
				*r = room{}
				n.pieces--
				n.complete &^= 1 << p
			}
		}
	}
	return n
}

// Open opens a GPU and makes an empty tier in its memory, which is allocated
// as pieces arrive. cuda.ErrNoDriver and cuda.ErrNoDevice say that there is none to use.
func Open(o Options) (*Tier, error) {
	if o.Bytes < grain && o.Bytes != Auto {
		return nil, fmt.Errorf("gpu: a limit of %d bytes holds nothing", o.Bytes)
	}
	dev, err := cuda.Open(o.Device)
	if err != nil {
		return nil, fmt.Errorf("gpu: %w", err)
	}
	b, err := newCUDABank(dev)
	if err != nil {
		return nil, fmt.Errorf("gpu: buffers for copies: %w", err)
	}
	limit := int64(0)
	err = dev.Do(background, func(c *cuda.Context) error {
		free, _, err := c.MemInfo()
		limit = o.limit(free)
		return err
	})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("gpu: %w", err), b.close())
	}
	t := newTier(b, limit)
	t.dev, t.patience = dev, cmp.Or(o.Patience, defaultPatience)
	t.pinned.slab, t.pinned.most = o.Slab, o.PinBytes
	if t.attender, err = newAttender(t); err == nil {
		t.sealing, err = kernels.NewSealing(background, dev)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("gpu: %w", err), t.Close())
	}
	return t, nil
}

func newTier(b bank, limit int64) *Tier {
	t := &Tier{bank: b, began: time.Now(), patience: defaultPatience}
	t.mu.segments, t.mu.absent = map[tiers.ID]*segment{}, map[tiers.ID]heat{}
	t.mu.arena.limit = limit
	return t
}

// usable says why a call must fail: tiers.ErrClosed, tiers.ErrLost or ErrStuck.
func (t *Tier) usable(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	t.mu.Lock()
	gone := t.mu.gone
	t.mu.Unlock()
	if gone != nil {
		return gone
	}
	if err := asTier(t.bank.err()); err != nil {
		return err
	}
	return t.stuck()
}

// asTier marks an error of the device with what the tiers call it.
func asTier(err error) error {
	if errors.Is(err, cuda.ErrLost) && !errors.Is(err, tiers.ErrLost) {
		return fmt.Errorf("%w: %w", tiers.ErrLost, err)
	}
	return err
}

// Resident says whether a piece is held. It does not count as a use.
func (t *Tier) Resident(id tiers.ID, head int, p tiers.Plane) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	s := t.mu.segments[id]
	return s != nil && s.table.at(head, p).slab != nil
}

// Drop forgets planes of a segment, those too that a Put is bringing. It waits for nothing.
func (t *Tier) Drop(id tiers.ID, planes tiers.PlaneSet) error {
	if err := t.usable(background); err != nil && !errors.Is(err, ErrStuck) {
		return fmt.Errorf("gpu: drop %v: %w", id, err)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.mu.absent, id)
	if c := &t.mu.coming; c.id == id {
		c.dropped |= planes
	}
	if s := t.mu.segments[id]; s != nil {
		t.forgetLocked(id, s, planes)
	}
	return nil
}

// forgetLocked takes planes of a segment from the tier. Their room is free now, or with the last lease.
func (t *Tier) forgetLocked(id tiers.ID, s *segment, planes tiers.PlaneSet) {
	rooms := s.table.rooms(planes)
	s.table = s.table.without(planes)
	t.mu.pieces -= int64(len(rooms))
	if s.table.pieces == 0 {
		delete(t.mu.segments, id)
		heap.Remove(&t.mu.ranking, s.place)
	}
	if s.leases > 0 {
		s.limbo = append(s.limbo, rooms...)
		return
	}
	t.mu.arena.release(rooms)
}

// endLocked ends a lease.
func (t *Tier) endLocked(s *segment) {
	if s.leases--; s.leases == 0 {
		t.mu.arena.release(s.limbo)
		s.limbo = nil
	}
}

// useLocked credits a segment with a use.
func (t *Tier) useLocked(s *segment, attention float32) {
	s.heat = s.heat.used(attention, time.Since(t.began))
}

// Usage says what the tier holds now and did so far. BytesUsed counts whole
// slabs; BytesLimit shrinks to what the device had if that was less. Evictions
// are counted in pieces.
func (t *Tier) Usage() tiers.Usage {
	t.mu.Lock()
	defer t.mu.Unlock()
	return tiers.Usage{
		BytesUsed: t.mu.arena.mapped, BytesLimit: t.mu.arena.limit,
		Pieces: t.mu.pieces,
		Hits:   t.hits.Load(), Misses: t.misses.Load(),
		BytesRead: t.read.Load(), BytesWritten: t.written.Load(),
		Evictions: t.evictions.Load(),
	}
}
