package ram

import (
	"slices"

	"kvtier/tiers/memory"
)

const (
	grain     = 512 // room is given in multiples of this
	pageBytes = 4096
	hugePage  = 2 << 20
	maxSlab   = 32 << 20
)

// arena cuts room for pieces from slabs. Tier.mu guards it.
type arena struct {
	limit, mapped int64
	slabs         []*slab
	maxFree       uint32 // no slab has a longer free block; may be too large
	cursor        int    // where the last search for a window ended
}

// slab is a mapping. Its blocks cover it without gaps, in order.
type slab struct {
	mem     []byte
	blocks  []block
	used    uint32 // grains
	maxFree uint32 // no free block is longer; may be too large
}

// block is a run of grains: free, or the room of one piece.
type block struct {
	off, n uint32
	owner  *entry // nil if free
}

// slabSize is the size of ordinary slabs: small enough that a small limit has
// a few, and whole huge pages where the limit has them. A piece has to fit one slab.
func (a *arena) slabSize() int64 {
	n := min(max(a.limit/16, 8<<20), maxSlab)
	if n > a.limit {
		return a.limit / pageBytes * pageBytes
	}
	return n / hugePage * hugePage
}

// alloc gives e room in the first slab that has it, mapping one if need be.
func (a *arena) alloc(e *entry) bool {
	for _, s := range a.slabs {
		if s.maxFree >= e.n && s.alloc(e) {
			return true
		}
	}
	a.maxFree = 0
	for _, s := range a.slabs {
		a.maxFree = max(a.maxFree, s.maxFree)
	}
	size := min(a.slabSize(), (a.limit-a.mapped)/pageBytes*pageBytes)
	if size < int64(e.n)*grain {
		return false
	}
	mem, err := memory.Map(int(size))
	if err != nil {
		return false // the system has less than the limit allows: that is no room
	}
	n := uint32(size / grain)
	s := &slab{mem: mem, blocks: []block{{n: n}}, maxFree: n}
	a.slabs = append(a.slabs, s)
	a.mapped += size
	a.maxFree = max(a.maxFree, n)
	return s.alloc(e)
}

// hasRoom says whether n grains may be had without a window: as far as slabs know, or of one that can be mapped.
func (a *arena) hasRoom(n uint32) bool {
	return a.maxFree >= n || min(a.slabSize(), a.limit-a.mapped) >= int64(n)*grain
}

// alloc takes the shortest free block that is long enough.
func (s *slab) alloc(e *entry) bool {
	best, longest := -1, uint32(0)
	for i := range s.blocks {
		b := &s.blocks[i]
		if b.owner != nil {
			continue
		}
		longest = max(longest, b.n)
		if b.n >= e.n && (best < 0 || b.n < s.blocks[best].n) {
			if best = i; b.n == e.n {
				break
			}
		}
	}
	if best < 0 {
		s.maxFree = longest
		return false
	}
	e.slab, e.off = s, s.blocks[best].off
	s.take(best, e)
	return true
}

// take carves [e.off, e.off+e.n) out of the free block i.
func (s *slab) take(i int, e *entry) {
	b := s.blocks[i]
	parts := make([]block, 0, 3)
	if e.off > b.off {
		parts = append(parts, block{off: b.off, n: e.off - b.off})
	}
	parts = append(parts, block{e.off, e.n, e})
	if end := b.off + b.n; e.off+e.n < end {
		parts = append(parts, block{off: e.off + e.n, n: end - e.off - e.n})
	}
	s.blocks = slices.Replace(s.blocks, i, i+1, parts...)
	s.used += e.n
}

// find returns the index of the block that holds grain off.
func (s *slab) find(off uint32) int {
	i, ok := slices.BinarySearchFunc(s.blocks, off, func(b block, off uint32) int { return int(b.off) - int(off) })
	if !ok {
		i--
	}
	return i
}

// free gives e's room back and joins it with free neighbours.
func (a *arena) free(e *entry) {
	s := e.slab
	i := s.find(e.off)
	s.blocks[i].owner = nil
	s.used -= e.n
	if i+1 < len(s.blocks) && s.blocks[i+1].owner == nil {
		s.blocks[i].n += s.blocks[i+1].n
		s.blocks = slices.Delete(s.blocks, i+1, i+2)
	}
	if i > 0 && s.blocks[i-1].owner == nil {
		s.blocks[i-1].n += s.blocks[i].n
		s.blocks = slices.Delete(s.blocks, i, i+1)
		i--
	}
	s.maxFree = max(s.maxFree, s.blocks[i].n)
	a.maxFree = max(a.maxFree, s.maxFree)
}

// reclaim undoes a free: e gets the very room it had.
func (a *arena) reclaim(e *entry) { e.slab.take(e.slab.find(e.off), e) }

// bytes is the room of e.
func (e *entry) bytes() []byte {
	from, to := int(e.off)*grain, int(e.off+e.n)*grain
	return e.slab.mem[from:to:to]
}

// windowSlabs bounds a search that has already found a window.
const windowSlabs = 8

// window returns the pieces whose going frees n neighbouring grains at the
// least cost in bytes; nil if no pieces may go that do. Free room counts as nothing.
func (a *arena) window(n uint32, mayGo func(*entry) bool) []*entry {
	var best []block
	bestUsed := ^uint32(0)
	for i := range a.slabs {
		if i >= windowSlabs && best != nil {
			break
		}
		a.cursor = (a.cursor + 1) % len(a.slabs)
		if w, used := a.slabs[a.cursor].window(n, mayGo); w != nil && used < bestUsed {
			best, bestUsed = w, used
		}
	}
	var out []*entry
	for _, b := range best {
		if b.owner != nil {
			out = append(out, b.owner)
		}
	}
	return out
}

func (s *slab) window(n uint32, mayGo func(*entry) bool) (best []block, bestUsed uint32) {
	bestUsed = ^uint32(0)
	var from int
	var used, span uint32 // of blocks[from:i+1]
	for i, b := range s.blocks {
		if b.owner != nil && !mayGo(b.owner) {
			from, used, span = i+1, 0, 0
			continue
		}
		span += b.n
		if b.owner != nil {
			used += b.n
		}
		for span-s.blocks[from].n >= n {
			span -= s.blocks[from].n
			if s.blocks[from].owner != nil {
				used -= s.blocks[from].n
			}
			from++
		}
		if span >= n && used < bestUsed {
			best, bestUsed = s.blocks[from:i+1], used
		}
	}
	return best, bestUsed
}

// trim takes all empty slabs but keep of them from the arena. They count as
// mapped until they are unmapped.
func (a *arena) trim(keep int) []*slab {
	var empty []*slab
	a.slabs = slices.DeleteFunc(a.slabs, func(s *slab) bool {
		if s.used > 0 {
			return false
		}
		if keep > 0 {
			keep--
			return false
		}
		empty = append(empty, s)
		return true
	})
	return empty
}
