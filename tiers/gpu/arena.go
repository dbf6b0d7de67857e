package gpu

import (
	"slices"

	"kvtier/tiers/gpu/cuda"
)

const (
	grain   = 256 // bytes: room is given in multiples, and so kernels may load 16 bytes at a time
	minSlab = 32 << 20
	maxSlab = 256 << 20
)

// roundUp makes a multiple of grain.
func roundUp(n int) int { return (n + grain - 1) / grain * grain }

// arena cuts room for pieces from slabs of device memory. Tier.mu guards it.
type arena struct {
	limit, mapped int64
	slabs         []*slab
}

// slab is one allocation on the device.
type slab struct {
	ptr     cuda.Ptr
	size    int
	free    []span // ascending; no two touch
	maxFree int    // no free span is longer; may be too large
}

// span is a run of bytes of a slab, in multiples of grain.
type span struct{ off, n int }

// room is a span that was given away. The zero room is none.
type room struct {
	slab *slab
	span
}

// ptr is the room's address, 0 if it is none.
func (r room) ptr() cuda.Ptr {
	if r.slab == nil {
		return 0
	}
	return r.slab.ptr + cuda.Ptr(r.off)
}

// cut splits n bytes off the front of a room.
func (r *room) cut(n int) room {
	front := room{r.slab, span{r.off, n}}
	r.off, r.n = r.off+n, r.n-n
	return front
}

// slabSize is the size of the next slab, for pieces of up to largest bytes; 0 if the limit leaves none.
func (a *arena) slabSize(largest int) int {
	size := min(max(a.limit/64, minSlab), maxSlab)
	size = min(max(size, int64(largest)), a.limit-a.mapped) / grain * grain
	if size < int64(largest) {
		return 0
	}
	return int(size)
}

// add makes room of a slab.
func (a *arena) add(p cuda.Ptr, size int) {
	a.slabs = append(a.slabs, &slab{ptr: p, size: size, free: []span{{0, size}}, maxFree: size})
	a.mapped += int64(size)
}

// alloc finds room for n bytes, a multiple of grain: in the first slab that has
// it, the shortest span that is long enough.
func (a *arena) alloc(n int) (room, bool) {
	for _, s := range a.slabs {
		if s.maxFree < n {
			continue
		}
		best, longest := -1, 0
		for i, f := range s.free {
			longest = max(longest, f.n)
			if f.n >= n && (best < 0 || f.n < s.free[best].n) {
				best = i
			}
		}
		if best < 0 {
			s.maxFree = longest
			continue
		}
		r := room{s, span{s.free[best].off, n}}
		a.take(r)
		return r, true
	}
	return room{}, false
}

// allocAll finds room for pieces of so many bytes, side by side if there is a
// hole for that; for all or for none.
func (a *arena) allocAll(sizes []int) ([]room, bool) {
	rooms := make([]room, len(sizes))
	total := 0
	for _, n := range sizes {
		total += n
	}
	if run, ok := a.alloc(total); ok {
		for i, n := range sizes {
			rooms[i] = run.cut(n)
		}
		return rooms, true
	}
	for i, n := range sizes {
		var ok bool
		if rooms[i], ok = a.alloc(n); !ok {
			a.release(rooms[:i])
			return nil, false
		}
	}
	return rooms, true
}

// take takes a span that is free.
func (a *arena) take(r room) {
	s := r.slab
	i, found := s.find(r.off)
	if !found {
		i--
	}
	f := s.free[i]
	var rest []span
	if r.off > f.off {
		rest = append(rest, span{f.off, r.off - f.off})
	}
	if end := f.off + f.n; r.off+r.n < end {
		rest = append(rest, span{r.off + r.n, end - r.off - r.n})
	}
	s.free = slices.Replace(s.free, i, i+1, rest...)
}

// release gives rooms back and joins them with their free neighbours.
func (a *arena) release(rooms []room) {
	for _, r := range rooms {
		s := r.slab
		i, _ := s.find(r.off)
		f := r.span
		from, to := i, i
		if i > 0 && s.free[i-1].off+s.free[i-1].n == f.off {
			from--
			f = span{s.free[from].off, s.free[from].n + f.n}
		}
		if i < len(s.free) && f.off+f.n == s.free[i].off {
			to++
			f.n += s.free[i].n
		}
		s.free = slices.Replace(s.free, from, to, f)
		s.maxFree = max(s.maxFree, f.n)
	}
}

// find returns where in free a span of this offset is, or belongs.
func (s *slab) find(off int) (int, bool) {
	return slices.BinarySearchFunc(s.free, off, func(f span, off int) int { return f.off - off })
}

// free is how many bytes of the slabs are nobody's.
func (a *arena) free() (n int64) {
	for _, s := range a.slabs {
		for _, f := range s.free {
			n += int64(f.n)
		}
	}
	return n
}
