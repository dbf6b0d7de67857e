package nvme

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"sync"
	"syscall"
	"testing"
	"time"

	"kvtier/tiers"
	"kvtier/tiers/tiertest"
)

var ctx = context.Background()

func openAt(t testing.TB, dir string, o Options) *Tier {
	t.Helper()
	tier, err := Open(dir, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ok(t, tier.Close()) })
	return tier
}

func ok(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func is(t testing.TB, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Fatalf("error %v, want %v", err, want)
	}
}

func requests(h *tiers.Header, pieces []tiers.Piece) (reqs []tiers.Request) {
	for _, p := range pieces {
		reqs = append(reqs, tiers.Request{Header: h, Head: p.Head, Plane: p.Plane})
	}
	return reqs
}

// wantHeld pins all pieces, compares them, and releases them.
func wantHeld(t testing.TB, tier *Tier, h *tiers.Header, pieces []tiers.Piece, held bool) {
	t.Helper()
	pins, err := tier.Pin(ctx, requests(h, pieces))
	ok(t, err)
	for i := range pins {
		if pins[i].Held() != held {
			t.Fatalf("piece %d: held %v, want %v", i, pins[i].Held(), held)
		}
		if held && !bytes.Equal(pins[i].Ranges[0], pieces[i].Bytes) {
			t.Fatalf("piece %d: other bytes", i)
		}
		pins[i].Release(0)
	}
}

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

// TestFull: a full disk is ErrFull, by Allocate or by WriteAt, and changes nothing.
func TestFull(t *testing.T) {
	fs := &faults{}
	tier := openAt(t, t.TempDir(), Options{Bytes: 16 << 20, ExtentBytes: 4 << 20, FS: fs})
	h, pieces := tiertest.Segment(1, 3, 20000)
	fs.full.Store(8192)
	is(t, tier.Put(ctx, h, pieces), tiers.ErrFull)
	if len(tier.mu.order) != 0 {
		t.Fatal("an extent was left")
	}
	fs.full.Store(1 << 20) // less than an extent, enough for the segment
	ok(t, tier.Put(ctx, h, pieces))
	wantHeld(t, tier, h, pieces, true)
	used := tier.Usage()
	other, otherPieces := tiertest.Segment(2, 3, 20000)
	fs.writeFull.Store(true)
	is(t, tier.Put(ctx, other, otherPieces), tiers.ErrFull)
	fs.writeFull.Store(false)
	fs.failWrite.Store(true)
	is(t, tier.Put(ctx, other, otherPieces), syscall.EIO)
	fs.failWrite.Store(false)
	fs.short.Store(true)
	is(t, tier.Put(ctx, other, otherPieces), io.ErrShortWrite)
	fs.short.Store(false)
	wantHeld(t, tier, other, otherPieces, false)
	if got := tier.Usage(); got.BytesUsed != used.BytesUsed || got.Pieces != used.Pieces {
		t.Fatalf("before %+v, after %+v", used, got)
	}
	ok(t, tier.Put(ctx, other, otherPieces))
	wantHeld(t, tier, other, otherPieces, true)
}

func TestReadFaults(t *testing.T) {
	fs := &faults{}
	tier := openAt(t, t.TempDir(), Options{Bytes: 16 << 20, ExtentBytes: 4 << 20, FS: fs})
	h, pieces := tiertest.Segment(1, 3, 20000)
	ok(t, tier.Put(ctx, h, pieces))
	for _, c := range []struct {
		set  func(bool)
		want error
	}{
		{set: func(on bool) { fs.failRead.Store(on) }, want: syscall.EIO},
		{set: func(on bool) { fs.short.Store(on) }, want: io.ErrUnexpectedEOF},
		{set: func(on bool) { fs.flip.Store(on) }, want: tiers.ErrCorrupt},
	} {
		c.set(true)
		_, err := tier.Pin(ctx, requests(h, pieces))
		is(t, err, c.want)
		if c.want != tiers.ErrCorrupt && errors.Is(err, tiers.ErrCorrupt) {
			t.Fatalf("%v: the data does not say that it is corrupt", err)
		}
		c.set(false)
		wantHeld(t, tier, h, pieces, true)
	}
	if n := tier.Usage().Corruptions; n != 1 {
		t.Fatalf("%d corruptions, want 1", n)
	}
}

// TestFlips: every changed byte of a part is found when its block is read.
func TestFlips(t *testing.T) {
	tier := breakable{openAt(t, t.TempDir(), Options{Bytes: 4 << 20, ExtentBytes: 1 << 20})}
	h, pieces := tiertest.Segment(1, 1, 3000)
	ok(t, tier.Put(ctx, h, pieces))
	l, _ := tier.Locate(h.ID)
	r := l.Parts[tiers.PartMain]
	main := requests(h, tiertest.InPart(pieces, tiers.PartMain))
	for off := 0; off < int(r.Blocks)*tiers.BlockSize; off += 97 {
		ok(t, tier.flip(r, off))
		_, err := tier.Pin(ctx, main)
		is(t, err, tiers.ErrCorrupt)
		ok(t, tier.flip(r, off))
	}
	wantHeld(t, tier.Tier, h, pieces, true)
}

// TestPutRefuses: pieces that are not what the header says are never stored.
func TestPutRefuses(t *testing.T) {
	tier := openAt(t, t.TempDir(), Options{Bytes: 4 << 20, ExtentBytes: 1 << 20})
	h, pieces := tiertest.Segment(2, 2, 9000)
	low, main := tiertest.InPart(pieces, tiers.PartLow), tiertest.InPart(pieces, tiers.PartMain)
	if len(low) == 0 {
		t.Fatal("segment 2 has no low planes")
	}
	is(t, tier.Put(ctx, h, main[1:]), tiers.ErrCorrupt)
	is(t, tier.Put(ctx, h, low), tiers.ErrNotFound)
	wrong := bytes.Clone(main[0].Bytes)
	wrong[0]++
	is(t, tier.Put(ctx, h, append([]tiers.Piece{{Head: main[0].Head, Plane: main[0].Plane, Bytes: wrong}}, main[1:]...)),
		tiers.ErrCorrupt)
	wantHeld(t, tier, h, pieces, false)
	if u := tier.Usage(); u.BytesUsed != 0 || u.BytesWritten != 0 {
		t.Fatalf("usage %+v", u)
	}
}

// TestDropReading: a run is not reused while it is read.
func TestDropReading(t *testing.T) {
	fs := &faults{}
	tier := openAt(t, t.TempDir(), Options{Bytes: 1 << 20, ExtentBytes: 1 << 20, FS: fs})
	h, pieces := tiertest.Segment(1, 2, 12000)
	ok(t, tier.Put(ctx, h, pieces))
	fs.slow.Store(int64(30 * time.Millisecond))
	var wg sync.WaitGroup
	wg.Go(func() { wantHeld(t, tier, h, pieces, true) })
	for fs.reading.Load() == 0 {
		time.Sleep(time.Millisecond)
	}
	ok(t, tier.Drop(h.ID, tiers.AllPlanes))
	if tier.Usage().BytesUsed == 0 {
		t.Error("freed under a reader")
	}
	other, otherPieces := tiertest.Segment(2, 2, 12000)
	ok(t, tier.Put(ctx, other, otherPieces))
	wg.Wait()
	fs.slow.Store(0)
	ok(t, tier.Drop(other.ID, tiers.AllPlanes))
	if u := tier.Usage(); u.BytesUsed != 0 || len(tier.mu.order[0].free) != 1 {
		t.Fatalf("usage %+v, free %v", u, tier.mu.order[0].free)
	}
}

func TestDepth(t *testing.T) {
	fs := &faults{}
	tier := openAt(t, t.TempDir(), Options{Bytes: 64 << 20, ExtentBytes: 32 << 20, Depth: 3, FS: fs})
	var reqs []tiers.Request
	for i := range uint64(10) {
		h, pieces := tiertest.Segment(i, 1, 9000)
		ok(t, tier.Put(ctx, h, pieces))
		reqs = append(reqs, requests(h, pieces[:1])...)
	}
	fs.slow.Store(int64(2 * time.Millisecond))
	var wg sync.WaitGroup
	for range 3 {
		wg.Go(func() {
			pins, err := tier.Pin(ctx, reqs)
			if err != nil {
				t.Error(err)
			}
			for i := range pins {
				pins[i].Release(0)
			}
		})
	}
	wg.Wait()
	if n := fs.most.Load(); n != 3 {
		t.Fatalf("%d reads at once, want 3", n)
	}
}

func TestSync(t *testing.T) {
	fs := &faults{}
	tier := openAt(t, t.TempDir(), Options{Bytes: 4 << 20, ExtentBytes: 1 << 20, FS: fs})
	h, pieces := tiertest.Segment(1, 2, 9000)
	ok(t, tier.Put(ctx, h, pieces))
	fs.failSync.Store(true)
	if err := tier.Sync(ctx); err == nil {
		t.Fatal("no error")
	}
	fs.failSync.Store(false)
	fs.syncs.Store(0)
	ok(t, tier.Sync(ctx)) // it was not forgotten
	ok(t, tier.Sync(ctx)) // nothing is left
	if n := fs.syncs.Load(); n != 1 {
		t.Fatalf("%d syncs, want 1", n)
	}
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
