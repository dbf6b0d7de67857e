package nvme

import (
	"bytes"
	"context"
	"errors"
	"io"
	"sync"
	"syscall"
	"testing"
	"time"

	"kvtier/tiers"
	"kvtier/tiers/files"
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

// TestFull: a full disk is ErrFull, by Allocate or by WriteAt, and changes nothing.
func TestFull(t *testing.T) {
	fs := &faults{FS: files.OS}
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

// TestLeftover: an extent that could not be allocated, nor removed, is not in the way of others.
func TestLeftover(t *testing.T) {
	fs := &faults{FS: files.OS}
	tier := openAt(t, t.TempDir(), Options{Bytes: 16 << 20, ExtentBytes: 4 << 20, FS: fs})
	h, pieces := tiertest.Segment(1, 3, 20000)
	stays := ExtentName(1)
	fs.stays.Store(&stays)
	fs.full.Store(8192)
	is(t, tier.Put(ctx, h, pieces), tiers.ErrFull)
	fs.full.Store(0)
	ok(t, tier.Put(ctx, h, pieces))
	wantHeld(t, tier, h, pieces, true)
	if l, _ := tier.Locate(h.ID); l.Parts[tiers.PartMain].Extent != 2 {
		t.Errorf("it lies in extent %d", l.Parts[tiers.PartMain].Extent)
	}
}

// TestReserve: extents leave a part of the file system free, and take all of their limit where it does not know what is free.
func TestReserve(t *testing.T) {
	for _, c := range []struct{ free, extent int64 }{
		{1 << 30, 4 << 20},
		{leastReserve + 2<<20 + 5, 2 << 20},
		{mostReserve / 3 * 4, 4 << 20},
		{leastReserve + 8192, 0},
		{1, 0},
		{-1, 4 << 20},
	} {
		fs := &faults{FS: files.OS}
		tier := openAt(t, t.TempDir(), Options{Bytes: 16 << 20, ExtentBytes: 4 << 20, FS: fs})
		h, pieces := tiertest.Segment(1, 3, 20000)
		fs.free.Store(c.free)
		if err := tier.Put(ctx, h, pieces); c.extent == 0 {
			is(t, err, tiers.ErrFull)
		} else {
			ok(t, err)
		}
		if got := tier.FileBytes(); got != c.extent {
			t.Errorf("an extent of %d bytes where %d are free, want %d", got, c.free, c.extent)
		}
	}
}

func TestReadFaults(t *testing.T) {
	fs := &faults{FS: files.OS}
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
		if !errors.Is(c.want, tiers.ErrCorrupt) && errors.Is(err, tiers.ErrCorrupt) {
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

// TestDropPutting: a part that was there when a Put began, and is dropped while the other is written, is put as well. Where it
// was not given, the other is not put without it.
func TestDropPutting(t *testing.T) {
	fs := &faults{FS: files.OS}
	tier := openAt(t, t.TempDir(), Options{Bytes: 8 << 20, ExtentBytes: 1 << 20, FS: fs})
	h, pieces := tiertest.Segment(2, 2, 9000)
	low, main := tiertest.InPart(pieces, tiers.PartLow), tiertest.InPart(pieces, tiers.PartMain)
	if len(low) == 0 {
		t.Fatal("segment 2 has no low planes")
	}
	drop := func() { ok(t, tier.Drop(h.ID, tiers.AllPlanes)) }
	ok(t, tier.Put(ctx, h, main))
	fs.writing.Store(&drop)
	ok(t, tier.Put(ctx, h, pieces))
	wantHeld(t, tier, h, pieces, true)

	ok(t, tier.Drop(h.ID, tiers.LowPlanes))
	fs.writing.Store(&drop)
	is(t, tier.Put(ctx, h, low), tiers.ErrNotFound)
	wantHeld(t, tier, h, pieces, false)
	if u := tier.Usage(); u.BytesUsed != 0 || u.Pieces != 0 {
		t.Fatalf("usage %+v", u)
	}
}

// TestDropReading: a run is not reused while it is read.
func TestDropReading(t *testing.T) {
	fs := &faults{FS: files.OS}
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
	fs := &faults{FS: files.OS}
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
	fs := &faults{FS: files.OS}
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
