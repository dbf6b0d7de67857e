package nvme

import (
	"bytes"
	"math/rand/v2"
	"testing"

	"kvtier/tiers"
	"kvtier/tiers/files"
	"kvtier/tiers/tiertest"
)

// long returns the pieces of the main part that have 9,000 bytes.
func long(pieces []tiers.Piece) (out []tiers.Piece) {
	for _, p := range tiertest.InPart(pieces, tiers.PartMain) {
		if len(p.Bytes) >= 9000 {
			out = append(out, p)
		}
	}
	return out
}

// ranged asks for a range of each piece.
func ranged(h *tiers.Header, pieces []tiers.Piece, off, n int) (reqs []tiers.Request) {
	for _, p := range pieces {
		reqs = append(reqs, tiers.Request{Header: h, Head: p.Head, Plane: p.Plane, Ranges: []tiers.Range{{Off: off, Len: n}}})
	}
	return reqs
}

// pinned pins, compares and releases, and returns what was transferred and what came from the cache.
func pinned(t *testing.T, tier *Tier, reqs []tiers.Request, pieces []tiers.Piece) (transferred, cached int) {
	t.Helper()
	pins, err := tier.Pin(ctx, reqs)
	ok(t, err)
	for i := range pins {
		for j, g := range reqs[i].Ranges {
			if !bytes.Equal(pins[i].Ranges[j], pieces[i].Bytes[g.Off:g.Off+g.Len]) {
				t.Fatalf("request %d, range %d: other bytes", i, j)
			}
		}
		transferred, cached = transferred+pins[i].Transferred, cached+pins[i].Cached
		pins[i].Release(0)
	}
	return transferred, cached
}

// What was read by ranges is given from memory the next time, and verified bytes alone are.
func TestCache(t *testing.T) {
	fs := &faults{FS: files.OS}
	tier := openAt(t, t.TempDir(), Options{Bytes: 64 << 20, ExtentBytes: 32 << 20, CacheBytes: 32 << 20, FS: fs})
	h, pieces := tiertest.Segment(1, 2, 40000)
	ok(t, tier.Put(ctx, h, pieces))
	pieces = long(pieces)
	reqs := ranged(h, pieces, 4000, 5000) // over the ends of blocks
	fs.flip.Store(true)
	_, err := tier.Pin(ctx, reqs)
	is(t, err, tiers.ErrCorrupt)
	fs.flip.Store(false)
	if moved, cached := pinned(t, tier, reqs, pieces); moved == 0 || cached != 0 {
		t.Fatalf("the first time %d bytes are transferred, %d cached", moved, cached)
	}
	fs.failRead.Store(true) // nothing is read any more
	if moved, cached := pinned(t, tier, reqs, pieces); moved != 0 || cached < 5000*len(pieces) {
		t.Fatalf("the second time %d bytes are transferred, %d cached", moved, cached)
	}
	fs.failRead.Store(false)
	// Another segment in the same place is not taken for this one.
	ok(t, tier.Drop(h.ID, tiers.AllPlanes))
	other, otherPieces := tiertest.Segment(2, 2, 40000)
	ok(t, tier.Put(ctx, other, otherPieces))
	otherPieces = long(otherPieces)
	pinned(t, tier, ranged(other, otherPieces, 4000, 5000), otherPieces)
	// Whole pieces pass by.
	used := tier.CacheBytes()
	big, bigPieces := tiertest.Segment(3, 2, 300000)
	ok(t, tier.Put(ctx, big, bigPieces))
	wantHeld(t, tier, big, bigPieces, true)
	bigPieces = long(bigPieces)
	if moved, cached := pinned(t, tier, ranged(big, bigPieces, 100, 200), bigPieces); moved == 0 || cached != 0 {
		t.Fatalf("%d bytes of whole pieces were cached, %d transferred", cached, moved)
	}
	if now := tier.CacheBytes(); now > 32<<20 || now < used {
		t.Fatalf("%d bytes mapped, %d before", now, used)
	}
}

// The clock keeps what is read again, and never more than its limit.
func TestCacheClock(t *testing.T) {
	c := newCache(cacheShards * slabFrames * tiers.BlockSize)
	defer c.close()
	rng := rand.New(rand.NewPCG(1, 2))
	block := make([]byte, tiers.BlockSize)
	mark := func(k blockKey) byte { return byte(k.part*31 + uint64(k.block)) }
	hits := 0
	const hot = 2000
	for i := range 60000 {
		k := blockKey{1, uint32(rng.IntN(hot))}
		if i%2 == 1 { // a scan
			k = blockKey{2, uint32(i)}
		}
		got := make([]byte, 8)
		if !c.get(got, k, 100) {
			for j := range block {
				block[j] = mark(k)
			}
			c.put(k, block)
			continue
		}
		if got[3] != mark(k) {
			t.Fatalf("block %v holds another's bytes", k)
		}
		hits++
	}
	if c.bytes() > cacheShards*slabFrames*tiers.BlockSize {
		t.Fatalf("%d bytes mapped", c.bytes())
	}
	if hits < 20000 {
		t.Errorf("%d of 30,000 reads of %d hot blocks hit", hits, hot)
	}
	if newCache(1000) != nil {
		t.Error("a cache of no frame")
	}
}
