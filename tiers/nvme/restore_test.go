package nvme

import (
	"os"
	"path/filepath"
	"testing"

	"kvtier/tiers"
	"kvtier/tiers/files"
	"kvtier/tiers/tiertest"
)

func TestRestore(t *testing.T) {
	dir := t.TempDir()
	o := Options{Bytes: 8 << 20, ExtentBytes: 1 << 20}
	a := openAt(t, dir, o)
	locations := map[int]Location{}
	for i := range 6 {
		h, pieces := tiertest.Segment(uint64(i), 3, 20000)
		ok(t, a.Put(ctx, h, pieces))
		l, found := a.Locate(h.ID)
		if !found {
			t.Fatal("not located")
		}
		b, _ := l.MarshalBinary()
		var back Location
		ok(t, back.UnmarshalBinary(b))
		if back != l || len(b) != LocationSize {
			t.Fatalf("%+v became %+v", l, back)
		}
		locations[i] = l
	}
	ok(t, a.Sync(ctx))
	ok(t, a.Close())

	b := openAt(t, dir, o)
	for i := range 6 {
		h, pieces := tiertest.Segment(uint64(i), 3, 20000)
		wantHeld(t, b, h, pieces, false)
		if i%2 == 0 { // the others were not committed
			ok(t, b.Restore(h.ID, locations[i]))
			wantHeld(t, b, h, pieces, true)
			is(t, b.Restore(h.ID, locations[i]), tiers.ErrCorrupt)
		}
	}
	// What is not restored is free: new segments do not touch what is.
	for i := range 6 {
		h, pieces := tiertest.Segment(50+uint64(i), 3, 20000)
		if err := b.Put(ctx, h, pieces); err != nil {
			is(t, err, tiers.ErrFull)
		}
	}
	for i := 0; i < 6; i += 2 {
		h, pieces := tiertest.Segment(uint64(i), 3, 20000)
		wantHeld(t, b, h, pieces, true)
	}
}

func TestRestoreWrong(t *testing.T) {
	dir := t.TempDir()
	o := Options{Bytes: 4 << 20, ExtentBytes: 1 << 20}
	a := openAt(t, dir, o)
	h, pieces := tiertest.Segment(1, 3, 20000)
	other, _ := tiertest.Segment(2, 3, 20000)
	ok(t, a.Put(ctx, h, pieces))
	l, _ := a.Locate(h.ID)
	ok(t, a.Close())
	b := openAt(t, dir, o)
	ok(t, b.Restore(h.ID, l))
	used := b.Usage().BytesUsed
	m := l.Parts[tiers.PartMain]
	for _, r := range []Run{
		m,
		{m.Extent, m.First + m.Blocks - 1, 2},
		{m.Extent, 0, 1 << 20},
		{m.Extent, 1<<32 - 1, 2},
		{m.Extent, 255, 1<<32 - 1},
		{m.Extent + 1, 0, 1},
		{0, 0, 1},
	} {
		is(t, b.Restore(other.ID, Location{Parts: [tiers.NumParts]Run{r}}), tiers.ErrCorrupt)
		// The low part fails after the main part was claimed: it is given back.
		is(t, b.Restore(other.ID, Location{Parts: [tiers.NumParts]Run{{m.Extent, 250, 2}, r}}), tiers.ErrCorrupt)
	}
	if got := b.Usage(); got.BytesUsed != used {
		t.Fatalf("%d bytes used, before %d", got.BytesUsed, used)
	}
	var bad Location
	is(t, bad.UnmarshalBinary(make([]byte, LocationSize-1)), tiers.ErrCorrupt)

	// A catalogue that confuses two segments gives corruption, not other bytes.
	ok(t, b.Drop(h.ID, tiers.AllPlanes))
	otherHeader, otherPieces := tiertest.Segment(2, 3, 20000)
	wrong := l
	for p := range wrong.Parts {
		wrong.Parts[p].Blocks = uint32(otherHeader.Blocks(tiers.Part(p)))
	}
	wrong.Parts[tiers.PartLow].Extent = m.Extent
	wrong.Parts[tiers.PartLow].First = 200 - wrong.Parts[tiers.PartLow].Blocks
	ok(t, b.Restore(otherHeader.ID, wrong))
	_, err := b.Pin(ctx, requests(otherHeader, otherPieces[:1]))
	is(t, err, tiers.ErrCorrupt)
}

// TestLowerLimit: with a lower limit than before, empty extents go and nothing is put until it fits.
func TestLowerLimit(t *testing.T) {
	dir := t.TempDir()
	a := openAt(t, dir, Options{Bytes: 8 << 20, ExtentBytes: 1 << 20})
	var last Location
	n := uint64(0)
	for ; last.Parts[0].Extent < 5; n++ {
		h, pieces := tiertest.Segment(n, 3, 20000)
		ok(t, a.Put(ctx, h, pieces))
		last, _ = a.Locate(h.ID)
	}
	ok(t, a.Close())
	b := openAt(t, dir, Options{Bytes: 2 << 20, ExtentBytes: 1 << 20})
	kept, keptPieces := tiertest.Segment(n-1, 3, 20000)
	ok(t, b.Restore(kept.ID, last))
	h, pieces := tiertest.Segment(n, 2, 20000)
	ok(t, b.Put(ctx, h, pieces))
	wantHeld(t, b, kept, keptPieces, true)
	wantHeld(t, b, h, pieces, true)
	names, err := os.ReadDir(dir)
	ok(t, err)
	if len(names) != 2 {
		t.Fatalf("%d extents left, want 2", len(names))
	}
}

// TestExtentsStay: of the extents that are too many, one that cannot be removed stays in use, and the others go, also if they
// cannot be closed well or were removed by somebody else.
func TestExtentsStay(t *testing.T) {
	dir := t.TempDir()
	a := openAt(t, dir, Options{Bytes: 4 << 20, ExtentBytes: 1 << 20})
	var last Location
	n := uint64(0)
	for ; last.Parts[0].Extent < 4; n++ {
		h, pieces := tiertest.Segment(n, 3, 20000)
		ok(t, a.Put(ctx, h, pieces))
		last, _ = a.Locate(h.ID)
	}
	ok(t, a.Close())
	fs := &faults{FS: files.OS}
	b := openAt(t, dir, Options{Bytes: 2 << 20, ExtentBytes: 1 << 20, FS: fs})
	h, pieces := tiertest.Segment(n, 2, 20000)
	ok(t, os.Remove(filepath.Join(dir, ExtentName(4))))
	stays := ExtentName(3)
	fs.stays.Store(&stays)
	fs.failClose.Store(true)
	ok(t, b.Put(ctx, h, pieces))
	fs.failClose.Store(false)
	names, err := os.ReadDir(dir)
	ok(t, err)
	if got := b.FileBytes(); got != int64(len(names))<<20 || len(names) != len(b.mu.order) || got > 2<<20 {
		t.Fatalf("%d bytes in %d extents, %d files", got, len(b.mu.order), len(names))
	}
	ok(t, b.Put(ctx, h, pieces))
	wantHeld(t, b, h, pieces, true)
	for range 20 { // what stays is written to
		if last, _ = b.Locate(h.ID); last.Parts[0].Extent == 3 {
			return
		}
		n++
		h, pieces = tiertest.Segment(n, 2, 20000)
		ok(t, b.Put(ctx, h, pieces))
		wantHeld(t, b, h, pieces, true)
	}
	t.Error("nothing was put where an extent could not be removed")
}

// Where a longer part needs the room of an empty extent, another one that cannot be removed is not in the way, and if there is
// no other, the tier is full.
func TestExtentStuck(t *testing.T) {
	for _, stuck := range []int{1, 2} {
		fs := &faults{FS: files.OS}
		a := openAt(t, t.TempDir(), Options{Bytes: 5 << 19, ExtentBytes: 1 << 20, FS: fs})
		var ids []tiers.ID
		for n := uint64(0); len(a.mu.order) < 2; n++ {
			h, pieces := tiertest.Segment(n, 3, 20000)
			ok(t, a.Put(ctx, h, pieces))
			ids = append(ids, h.ID)
		}
		for _, id := range ids {
			ok(t, a.Drop(id, tiers.AllPlanes))
		}
		stays := ExtentName(a.mu.order[1].number)
		if stuck == 2 {
			stays = "extent" // of both
		}
		fs.stays.Store(&stays)
		var h *tiers.Header
		var pieces []tiers.Piece
		for size := 30000; h == nil || h.Bytes(tiers.PartMain) <= 1<<20; size += 10000 {
			h, pieces = tiertest.Segment(1000, 3, size)
		}
		err := a.Put(ctx, h, pieces)
		if stuck == 2 {
			is(t, err, tiers.ErrFull)
			continue
		}
		ok(t, err)
		wantHeld(t, a, h, pieces, true)
	}
}
