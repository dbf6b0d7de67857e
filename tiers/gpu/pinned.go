package gpu

import (
	"errors"
	"fmt"
	"sync"

	"kvtier/tiers/gpu/cuda"
)

// pinned is host memory that the device copies from by itself: slabs of the RAM tier. Where one cannot be pinned, Put copies through buffers.
type pinned struct {
	slab func(b []byte) []byte // Options.Slab
	most int64                 // bytes

	mu    sync.Mutex // not held in the driver
	slabs map[*byte]pinnedSlab
	bytes int64
}

type pinnedSlab struct {
	mem []byte
	is  bool // or it was refused, and is not asked for again
}

// holds says whether bytes lie in pinned memory. It pins the slab that they lie in if it may. They must stay where they are meanwhile. The caller
// holds Tier.writes.
func (p *pinned) holds(b bank, bytes []byte) bool {
	if p.slab == nil || len(bytes) == 0 {
		return false
	}
	mem := p.slab(bytes)
	if mem == nil {
		return false
	}
	p.mu.Lock()
	s, known := p.slabs[&mem[0]]
	room := p.bytes+int64(len(mem)) <= p.most
	p.mu.Unlock()
	if known || !room {
		return s.is
	}
	s = pinnedSlab{mem, b.pin(mem) == nil}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.slabs == nil {
		p.slabs = map[*byte]pinnedSlab{}
	}
	p.slabs[&mem[0]] = s
	if s.is {
		p.bytes += int64(len(mem))
	}
	return s.is
}

// forget takes a slab out, and says whether it was pinned.
func (p *pinned) forget(mem []byte) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := p.slabs[&mem[0]]
	delete(p.slabs, &mem[0])
	if s.is {
		p.bytes -= int64(len(mem))
	}
	return s.is
}

// end unpins all. Nothing is pinned any more.
func (p *pinned) end(b bank) error {
	p.mu.Lock()
	all := p.slabs
	p.slabs, p.bytes, p.most = nil, 0, 0
	p.mu.Unlock()
	var errs []error
	for _, s := range all {
		if s.is {
			errs = append(errs, unpin(b, s.mem))
		}
	}
	return errors.Join(errs...)
}

// unpin unpins memory. A device that is lost uses none.
func unpin(b bank, mem []byte) error {
	if err := b.unpin(mem); err != nil && !errors.Is(err, cuda.ErrLost) {
		return err
	}
	return nil
}

// Unmapping lets go of a slab that is about to be unmapped and that nobody reads any more. An error says that it must stay mapped: the device may still
// know it.
func (t *Tier) Unmapping(slab []byte) error {
	if !t.pinned.forget(slab) {
		return nil
	}
	t.mu.Lock()
	gone := t.mu.gone
	t.mu.Unlock()
	if gone != nil {
		return nil // nothing is copied from it any more, and nothing else will lie there for the device
	}
	d := t.patience
	if t.stuck() != nil {
		d = 0
	}
	if err := t.patiently(background, d, func() error { return unpin(t.bank, slab) }, nil); err != nil {
		return fmt.Errorf("gpu: unpin a slab: %w", err)
	}
	return nil
}

// PinnedBytes is how much host memory the device copies from by itself.
func (t *Tier) PinnedBytes() int64 {
	t.pinned.mu.Lock()
	defer t.pinned.mu.Unlock()
	return t.pinned.bytes
}
