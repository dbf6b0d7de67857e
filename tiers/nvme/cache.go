package nvme

import (
	"sync"
	"sync/atomic"

	"kvtier/tiers"
	"kvtier/tiers/memory"
)

// cache keeps verified blocks in memory. A query reads a few values here and there of a plane, and the next query
// nearly the same ones: whole pieces, the RAM tier's unit, would take room for all that lies between.
//
// Blocks are copied out, so that none is in use for longer than that, and none is ever changed in place: a key names one put
// of a part, so that what was dropped and written over is not found again.
//
// A new block takes the place of one that was not read since the hand of a clock last came by. Only reads of
// ranges bring blocks in: reading all of a context, as an exact answer does, leaves the cache as it is.
type cache struct {
	shards [cacheShards]cacheShard
	mapped atomic.Int64
}

const (
	cacheShards = 16
	// slabFrames is how many frames are mapped at a time: 2 MiB.
	slabFrames = 512
)

// blockKey names a block of a part that was put: the part's number, and the block in it.
type blockKey struct {
	part  uint64
	block uint32
}

// cacheShard holds a sixteenth of the frames. Its lock is held for a look-up and a copy.
type cacheShard struct {
	sync.Mutex
	frames int // that it may have
	slabs  [][]byte
	index  map[blockKey]int32
	keys   []blockKey // by frame
	used   []bool     // since the hand came by, by frame
	hand   int
}

// newCache returns a cache of at most so many bytes; nil if that is too little to be of use.
func newCache(bytes int64) *cache {
	frames := int(bytes / tiers.BlockSize / cacheShards / slabFrames * slabFrames)
	if frames == 0 {
		return nil
	}
	c := &cache{}
	for i := range c.shards {
		c.shards[i].frames, c.shards[i].index = frames, map[blockKey]int32{}
	}
	return c
}

func (c *cache) shard(k blockKey) *cacheShard {
	return &c.shards[(k.part*0x9e3779b97f4a7c15>>32+uint64(k.block))%cacheShards]
}

// get copies len(dst) bytes of a block, from off on; ok is false if the block is not here.
func (c *cache) get(dst []byte, k blockKey, off int) (ok bool) {
	s := c.shard(k)
	s.Lock()
	defer s.Unlock()
	i, ok := s.index[k]
	if ok {
		copy(dst, s.frame(int(i))[off:])
		s.used[i] = true
	}
	return ok
}

func (s *cacheShard) frame(i int) []byte {
	return s.slabs[i/slabFrames][i%slabFrames*tiers.BlockSize:][:tiers.BlockSize]
}

// put takes in a verified block.
func (c *cache) put(k blockKey, b []byte) {
	s := c.shard(k)
	s.Lock()
	defer s.Unlock()
	if _, here := s.index[k]; here {
		return
	}
	i, ok := s.free(c)
	if !ok {
		return
	}
	copy(s.frame(i), b)
	s.keys[i], s.used[i], s.index[k] = k, false, int32(i)
}

// free returns a frame to fill: a new one as long as there are any.
func (s *cacheShard) free(c *cache) (frame int, ok bool) {
	if n := len(s.keys); n < s.frames {
		if n == len(s.slabs)*slabFrames {
			b, err := memory.Map(slabFrames * tiers.BlockSize)
			if err != nil {
				s.frames = n // the system has less than the limit allows
				return s.free(c)
			}
			s.slabs = append(s.slabs, b)
			c.mapped.Add(int64(len(b)))
		}
		s.keys, s.used = append(s.keys, blockKey{}), append(s.used, false)
		return n, true
	}
	if len(s.keys) == 0 {
		return 0, false
	}
	for s.used[s.hand] {
		s.used[s.hand] = false
		s.hand = (s.hand + 1) % len(s.keys)
	}
	frame = s.hand
	s.hand = (s.hand + 1) % len(s.keys)
	delete(s.index, s.keys[frame])
	return frame, true
}

// bytes is what the cache has mapped.
func (c *cache) bytes() int64 {
	if c == nil {
		return 0
	}
	return c.mapped.Load()
}

// close gives the memory back. Nothing may use the cache any more.
func (c *cache) close() {
	if c == nil {
		return
	}
	for i := range c.shards {
		s := &c.shards[i]
		s.Lock()
		for _, b := range s.slabs {
			_ = memory.Unmap(b) // it ends with the process at the latest
		}
		s.slabs, s.keys, s.used, s.frames = nil, nil, nil, 0
		clear(s.index)
		s.Unlock()
	}
	c.mapped.Store(0)
}

// key names a block of the part that is wanted of.
func (w *want) key(block int) blockKey { return blockKey{w.st.number, uint32(block)} }

// cached takes out of wants those whose blocks are all in the cache, and returns copies of their bytes, by request. A request
// for a whole piece is not looked up.
func (t *Tier) cached(wants []want) (rest []want, found []copied) {
	if t.cache == nil {
		return wants, nil
	}
	size := 0
	for i := range wants {
		if wants[i].ranged {
			size += wants[i].length
		}
	}
	if size == 0 {
		return wants, nil
	}
	buf := newBuffer((size + tiers.BlockSize - 1) / tiers.BlockSize * tiers.BlockSize)
	room := buf.bytes
	rest = wants[:0]
	for _, w := range wants {
		if !w.ranged || !t.fromCache(room[:w.length], &w) {
			rest = append(rest, w)
			continue
		}
		found, room = append(found, copied{w.req, w.at, room[:w.length:w.length], buf}), room[w.length:]
	}
	buf.refs.Add(int32(len(found)))
	buf.free() // this one's own reference
	return rest, found
}

// copied is a range that the cache had. It has a reference to the buffer.
type copied struct {
	req, at int
	bytes   []byte
	buf     *buffer
}

// freeCopies gives the references of copies back.
func freeCopies(found []copied) {
	for i := range found {
		found[i].buf.free()
	}
}

func (t *Tier) fromCache(dst []byte, w *want) bool {
	off := w.off
	for block := w.first; block < w.end; block++ {
		n := min(len(dst), tiers.BlockSize-off)
		if !t.cache.get(dst[:n], w.key(block), off) {
			return false
		}
		dst, off = dst[n:], 0
	}
	return true
}

// keep puts blocks that reads brought, or those of them that came, into the cache, but not what lies in the gaps between wanted ones.
func (t *Tier) keep(reads []read, came []bool) {
	if t.cache == nil {
		return
	}
	for i := range reads {
		r := &reads[i]
		if came != nil && !came[i] || !r.ready.Load() {
			continue
		}
		kept := r.first
		for j := range r.wants {
			w := &r.wants[j]
			if !w.ranged {
				continue
			}
			for block := max(kept, w.first); block < w.end; block++ {
				t.cache.put(w.key(block), r.buf.bytes[(block-r.first)*tiers.BlockSize:][:tiers.BlockSize])
			}
			kept = max(kept, w.end)
		}
	}
}
