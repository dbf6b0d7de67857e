package gpu

import (
	"container/heap"

	"kvtier/tiers"
)

// ranking is a heap of segments, the coldest on top. It is lazy: a use changes
// a segment's heat but not its rank, so that reading costs nothing here. Heat
// only grows, so a rank is never too high, and who is on top has his set right.
type ranking []*segment

func (r ranking) Len() int           { return len(r) }
func (r ranking) Less(i, j int) bool { return r[i].rank < r[j].rank }

func (r ranking) Swap(i, j int) {
	r[i], r[j] = r[j], r[i]
	r[i].place, r[j].place = i, j
}

// Push and Pop are for package heap.
func (r *ranking) Push(x any) {
	s := x.(*segment)
	s.rank, s.place = s.heat, len(*r)
	*r = append(*r, s)
}

func (r *ranking) Pop() any {
	last := len(*r) - 1
	s := (*r)[last]
	(*r)[last] = nil
	*r = (*r)[:last]
	return s
}

// coldest takes the coldest segment out; nil if there is none.
func (r *ranking) coldest() *segment {
	for len(*r) > 0 {
		s := (*r)[0]
		if s.rank == s.heat {
			return heap.Pop(r).(*segment)
		}
		s.rank = s.heat
		heap.Fix(r, 0)
	}
	return nil
}

// evictLocked gives pieces the room of the coldest segments that nobody leases,
// the segment id excepted, or changes nothing.
func (t *Tier) evictLocked(id tiers.ID, sizes []int) (rooms []room, ok bool) {
	var gone, stay []*segment
	for !ok {
		s := t.mu.ranking.coldest()
		if s == nil {
			break
		}
		if s.id == id || s.leases > 0 {
			stay = append(stay, s)
			continue
		}
		gone = append(gone, s)
		t.mu.arena.release(s.table.rooms(tiers.AllPlanes))
		rooms, ok = t.mu.arena.allocAll(sizes)
	}
	for _, s := range gone {
		if !ok {
			for _, r := range s.table.rooms(tiers.AllPlanes) {
				t.mu.arena.take(r)
			}
			stay = append(stay, s)
			continue
		}
		delete(t.mu.segments, s.id)
		t.rememberLocked(s.id, s.heat)
		t.mu.pieces -= int64(s.table.pieces)
		t.evictions.Add(int64(s.table.pieces))
	}
	for _, s := range stay {
		heap.Push(&t.mu.ranking, s)
	}
	return rooms, ok
}
