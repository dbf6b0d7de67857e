package nvme

import (
	"bytes"
	"context"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"kvtier/tiers"
	"kvtier/tiers/files"
	"kvtier/tiers/tiertest"
)

// lateRig is a tier with a cache, of whose pieces ranges are asked for that are far apart.
type lateRig struct {
	*Tier
	fs     *faults
	h      []*tiers.Header
	reqs   []tiers.Request
	pieces []tiers.Piece
	told   atomic.Int64 // failures that nobody waited for
}

// newLateRig puts segments. If direct is set reads go past the faults, by asynchronous I/O where there is any.
func newLateRig(t *testing.T, o Options, segments int, direct bool) *lateRig {
	t.Helper()
	r := &lateRig{fs: &faults{FS: files.OS}}
	o.Bytes, o.ExtentBytes = 64<<20, 32<<20
	if !direct {
		o.FS = r.fs
	}
	r.Tier = openAt(t, t.TempDir(), o)
	for i := range uint64(segments) {
		h, pieces := tiertest.Segment(i, 2, 40000)
		ok(t, r.Put(ctx, h, pieces))
		r.h = append(r.h, h)
		for _, p := range long(pieces) {
			if len(p.Bytes) < 30000 {
				continue
			}
			r.pieces = append(r.pieces, p)
			r.reqs = append(r.reqs, tiers.Request{Header: h, Head: p.Head, Plane: p.Plane, Ranges: []tiers.Range{{Off: 100, Len: 200}, {Off: 25000, Len: 50}}})
		}
	}
	if len(r.reqs) < 2*segments {
		t.Fatalf("only %d pieces are long enough", len(r.reqs))
	}
	return r
}

func (r *lateRig) pin(t *testing.T, ctx context.Context, reqs []tiers.Request, d time.Duration) ([]tiers.Pin, error) {
	t.Helper()
	return r.PinWithin(ctx, reqs, tiers.NewPatience(d), func(error) { r.told.Add(1) })
}

// check compares what came, releases it, and returns how many ranges did and how many are late.
func (r *lateRig) check(t *testing.T, pins []tiers.Pin, at func(i int) int) (came, missing int) {
	t.Helper()
	for i := range pins {
		j := at(i)
		if !pins[i].Held() {
			t.Fatalf("request %d is not held", i)
		}
		bytesLate := 0
		for k, g := range r.reqs[j].Ranges {
			switch got := pins[i].Ranges[k]; {
			case got == nil:
				bytesLate += g.Len
				missing++
			case !bytes.Equal(got, r.pieces[j].Bytes[g.Off:g.Off+g.Len]):
				t.Errorf("request %d, range %d: other bytes", j, k)
			default:
				came++
			}
		}
		if pins[i].Late != bytesLate {
			t.Errorf("request %d says that %d bytes are late, not %d", j, pins[i].Late, bytesLate)
		}
		pins[i].Release(0)
	}
	return came, missing
}

func same(i int) int { return i }

// rest says that nothing is late any more, that no read holds anything, and that everything can be dropped.
func (r *lateRig) rest(t *testing.T) {
	t.Helper()
	until(t, "late reads end", func() bool {
		r.late.Lock()
		defer r.late.Unlock()
		return r.late.reads == 0 && len(r.late.blocks) == 0
	})
	for _, h := range r.h {
		ok(t, r.Drop(h.ID, tiers.AllPlanes))
	}
	until(t, "runs are free", func() bool { return r.Usage().BytesUsed == 0 })
	free(t, r.Tier)
}

func until(t *testing.T, what string, is func() bool) {
	t.Helper()
	for range 2000 {
		if is() {
			return
		}
		time.Sleep(time.Millisecond)
	}
	t.Fatal("not in time: " + what)
}

// Reads that do not come are late, go on, and lie in the cache then.
func TestLate(t *testing.T) {
	r := newLateRig(t, Options{CacheBytes: 32 << 20}, 2, false)
	open := r.fs.close(nil)
	pins, err := r.pin(t, ctx, r.reqs, time.Millisecond)
	ok(t, err)
	if came, _ := r.check(t, pins, same); came > 0 {
		t.Errorf("%d ranges came through a shut gate", came)
	}
	reads := r.fs.reads.Load()
	if n := r.Usage().LateReads; n == 0 || r.Usage().BytesRead != 0 {
		t.Errorf("usage %+v", r.Usage())
	}
	// They are not begun again while they are under way.
	pins, err = r.pin(t, ctx, r.reqs, time.Millisecond)
	ok(t, err)
	r.check(t, pins, same)
	if n := r.fs.reads.Load(); n > max(reads, 32) {
		t.Errorf("%d reads, %d the first time", n, reads)
	}
	// Who waits longer has them from the late ones.
	var all sync.WaitGroup
	all.Go(func() {
		pins, err := r.pin(t, ctx, r.reqs, time.Hour)
		if err != nil {
			t.Error(err)
		}
		if _, missing := r.check(t, pins, same); missing > 0 {
			t.Errorf("%d ranges are late after an hour", missing)
		}
	})
	time.Sleep(5 * time.Millisecond)
	open()
	all.Wait()
	r.fs.failRead.Store(true)
	pins, err = r.pin(t, ctx, r.reqs, 0)
	ok(t, err)
	if _, missing := r.check(t, pins, same); missing > 0 {
		t.Errorf("%d ranges are not in the cache", missing)
	}
	if n := r.told.Load(); n != 0 {
		t.Errorf("%d failures", n)
	}
	r.rest(t)
}

// Of a batch what came in time is there.
func TestLateInPart(t *testing.T) {
	r := newLateRig(t, Options{CacheBytes: 32 << 20}, 4, false)
	open := r.fs.close(func(off int64) bool { return off/tiers.BlockSize%3 == 0 })
	pins, err := r.pin(t, ctx, r.reqs, 100*time.Millisecond)
	ok(t, err)
	came, missing := r.check(t, pins, same)
	if came == 0 || missing == 0 {
		t.Errorf("%d ranges came, %d are late", came, missing)
	}
	// What came is in the cache while the rest is under way.
	now := len(r.reqs)*2 - missing
	pins, err = r.pin(t, ctx, r.reqs, 0)
	ok(t, err)
	if came, _ := r.check(t, pins, same); came < now {
		t.Errorf("%d ranges are there, %d came", came, now)
	}
	open()
	r.rest(t)
}

// However long a disk is stuck, no more than so many reads are left to do.
func TestLateLimit(t *testing.T) {
	const limit = 5
	r := newLateRig(t, Options{CacheBytes: 32 << 20, LateReads: limit, Depth: 4}, 6, false)
	open := r.fs.close(nil)
	for i := range r.reqs {
		pins, err := r.pin(t, ctx, r.reqs[i:], time.Millisecond)
		ok(t, err)
		if came, _ := r.check(t, pins, func(j int) int { return i + j }); came > 0 {
			t.Errorf("%d ranges came", came)
		}
		r.late.Lock()
		n := r.late.reads
		r.late.Unlock()
		if n > limit {
			t.Fatalf("%d reads are late", n)
		}
	}
	if n := r.fs.reads.Load(); n > 4 {
		t.Errorf("%d reads are under way, of a depth of 4", n)
	}
	open()
	until(t, "late reads end", func() bool { r.late.Lock(); defer r.late.Unlock(); return r.late.reads == 0 })
	if n := r.fs.reads.Load(); n > limit+4 {
		t.Errorf("%d reads were done for nobody", n)
	}
	pins, err := r.pin(t, ctx, r.reqs, time.Hour)
	ok(t, err)
	if _, missing := r.check(t, pins, same); missing > 0 {
		t.Errorf("%d ranges are late, though the disk is well", missing)
	}
	r.rest(t)
}

// Failures are told once: to who waits, or else to who asked to be told.
func TestLateFailures(t *testing.T) {
	r := newLateRig(t, Options{CacheBytes: 32 << 20}, 2, false)
	r.fs.failRead.Store(true)
	_, err := r.pin(t, ctx, r.reqs, time.Hour)
	is(t, err, syscall.EIO)
	if n := r.told.Load(); n != 0 {
		t.Errorf("%d failures were told twice", n)
	}
	open := r.fs.close(nil)
	pins, err := r.pin(t, ctx, r.reqs, time.Millisecond)
	ok(t, err)
	r.check(t, pins, same)
	open()
	until(t, "the failure is told", func() bool { return r.told.Load() == 1 })
	r.fs.failRead.Store(false)
	r.fs.flip.Store(true)
	open = r.fs.close(nil)
	pins, err = r.pin(t, ctx, r.reqs, time.Millisecond)
	ok(t, err)
	r.check(t, pins, same)
	open()
	until(t, "damage is told", func() bool { return r.told.Load() == 2 })
	if n := r.Usage().Corruptions; n != 1 {
		t.Errorf("%d corruptions", n)
	}
	r.fs.flip.Store(false)
	// The caller's own end is an error, whatever its patience.
	open = r.fs.close(nil)
	short, cancel := context.WithTimeout(ctx, time.Millisecond)
	defer cancel()
	_, err = r.pin(t, short, r.reqs, time.Hour)
	is(t, err, context.DeadlineExceeded)
	open()
	pins, err = r.pin(t, ctx, r.reqs, time.Hour)
	ok(t, err)
	if _, missing := r.check(t, pins, same); missing > 0 {
		t.Errorf("%d ranges are late", missing)
	}
	r.rest(t)
}

// A tier closes when what is under way has ended, and begins nothing more.
func TestLateClose(t *testing.T) {
	r := newLateRig(t, Options{CacheBytes: 32 << 20, Depth: 2}, 4, false)
	open := r.fs.close(nil)
	pins, err := r.pin(t, ctx, r.reqs, 200*time.Millisecond) // time to begin, on a busy machine
	ok(t, err)
	r.check(t, pins, same)
	closed := make(chan error)
	go func() { closed <- r.Close() }()
	select {
	case <-closed:
		t.Fatal("closed while the kernel may write to buffers")
	case <-time.After(10 * time.Millisecond):
	}
	_, err = r.pin(t, ctx, r.reqs, time.Millisecond)
	is(t, err, tiers.ErrClosed)
	open()
	ok(t, <-closed)
	if n := r.fs.reads.Load(); n > 2 {
		t.Errorf("%d reads, of a depth of 2", n)
	}
	if n := r.told.Load(); n != 1 {
		t.Errorf("that the rest is not read was told %d times", n)
	}
}

// Many readers of all kinds at once, over both ways to read, and with a cache that has no room.
func TestLateConcurrent(t *testing.T) {
	for _, c := range []struct {
		name   string
		o      Options
		direct bool
	}{{"threads", Options{CacheBytes: 32 << 20}, false}, {"asynchronous", Options{CacheBytes: 32 << 20}, true},
		{"asynchronous, few", Options{CacheBytes: 32 << 20, Depth: 2, LateReads: 20}, true}, {"no cache", Options{}, false}} {
		t.Run(c.name, func(t *testing.T) {
			r := newLateRig(t, c.o, 12, c.direct)
			var all sync.WaitGroup
			var came, missing atomic.Int64
			for w := range uint64(8) {
				all.Go(func() {
					rng := rand.New(rand.NewPCG(w, 5))
					for range 60 {
						var reqs []tiers.Request
						some := rng.Perm(len(r.reqs))[:1+rng.IntN(len(r.reqs)-1)]
						for _, i := range some {
							reqs = append(reqs, r.reqs[i])
						}
						var pins []tiers.Pin
						var err error
						if rng.IntN(4) == 0 {
							pins, err = r.Pin(ctx, reqs)
						} else {
							pins, err = r.pin(t, ctx, reqs, time.Duration(rng.IntN(300))*time.Microsecond)
						}
						if err != nil {
							t.Error(err)
							return
						}
						a, b := r.check(t, pins, func(i int) int { return some[i] })
						came.Add(int64(a))
						missing.Add(int64(b))
					}
				})
			}
			all.Wait()
			t.Logf("%d ranges came, %d were late", came.Load(), missing.Load())
			if came.Load() == 0 {
				t.Error("nothing came")
			}
			r.rest(t)
		})
	}
}

// Where all places are taken, before the kernel is asked, asynchronous reads are late, too.
func TestLateQueue(t *testing.T) {
	tier, reqs, pieces := queued(t, Options{Bytes: 64 << 20, ExtentBytes: 64 << 20, Depth: 4}, 10)
	for range 4 {
		tier.slots <- struct{}{}
	}
	pins, err := tier.PinWithin(ctx, reqs, tiers.NewPatience(time.Millisecond), func(err error) { t.Error(err) })
	ok(t, err)
	for i := range pins {
		if pins[i].Ranges[0] != nil || pins[i].Late != len(pieces[i].Bytes) {
			t.Fatalf("piece %d is there", i)
		}
		pins[i].Release(0)
	}
	for range 4 {
		<-tier.slots
	}
	until(t, "late reads end", func() bool { tier.late.Lock(); defer tier.late.Unlock(); return tier.late.reads == 0 })
	pins, err = tier.PinWithin(ctx, reqs, tiers.NewPatience(time.Hour), func(err error) { t.Error(err) })
	ok(t, err)
	for i := range pins {
		if !bytes.Equal(pins[i].Ranges[0], pieces[i].Bytes) {
			t.Fatal("other bytes")
		}
		pins[i].Release(0)
	}
	until(t, "no slot is held", func() bool { return len(tier.slots) == 0 })
}
