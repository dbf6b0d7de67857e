package nvme

import (
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"kvtier/tiers"
	"kvtier/tiers/tiertest"
)

// queued opens a tier whose reads go through queues, and puts segments.
func queued(t *testing.T, o Options, segments int) (tier *Tier, reqs []tiers.Request, pieces []tiers.Piece) {
	t.Helper()
	tier = openAt(t, t.TempDir(), o)
	for i := range uint64(segments) {
		h, p := tiertest.Segment(i, 2, 40000)
		ok(t, tier.Put(ctx, h, p))
		for j := 0; j < len(p); j += 3 { // apart, so that they are not read together
			reqs, pieces = append(reqs, requests(h, p[j:j+1])...), append(pieces, p[j])
		}
	}
	q := tier.takeQueue()
	if q == nil || tier.mu.order[0].direct == nil {
		t.Skip("no asynchronous or direct I/O here")
	}
	tier.giveQueue(q)
	return tier, reqs, pieces
}

// free says that no slot is held.
func free(t *testing.T, tier *Tier) {
	t.Helper()
	if n := len(tier.slots); n != 0 {
		t.Fatalf("%d slots are held", n)
	}
}

// TestQueue: many callers with more reads than the depth get the right bytes,
// and there are never more queues than slots.
func TestQueue(t *testing.T) {
	tier, reqs, pieces := queued(t, Options{Bytes: 64 << 20, ExtentBytes: 16 << 20, Depth: 3}, 30)
	var wg sync.WaitGroup
	for w := range uint64(8) {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(w, 1))
			for range 20 {
				some := rng.Perm(len(reqs))[:1+rng.IntN(40)]
				var ask []tiers.Request
				for _, i := range some {
					ask = append(ask, reqs[i])
				}
				pins, err := tier.Pin(ctx, ask)
				if err != nil {
					t.Error(err)
					return
				}
				for j, i := range some {
					if string(pins[j].Ranges[0]) != string(pieces[i].Bytes) {
						t.Error("other bytes")
					}
					pins[j].Release(0)
				}
			}
		})
	}
	wg.Wait()
	free(t, tier)
	if n := len(tier.queues); n == 0 || n > 3 {
		t.Errorf("%d queues", n)
	}
}

// TestQueueFaults: an error of the kernel and a file that is too short fail the
// whole Pin, and nothing stays taken.
func TestQueueFaults(t *testing.T) {
	tier, reqs, _ := queued(t, Options{Bytes: 64 << 20, ExtentBytes: 64 << 20, Depth: 4}, 10)
	x := tier.mu.order[0]
	name := filepath.Join(tier.dir, ExtentName(x.number))
	ok(t, os.Truncate(name, x.bytes()/1024))
	_, err := tier.Pin(ctx, reqs)
	if err == nil || errors.Is(err, tiers.ErrCorrupt) {
		t.Fatalf("a short file: %v", err)
	}
	free(t, tier)
	good := x.direct
	x.direct = badDescriptor{} // not taken by the kernel: read by ReadAt
	ok(t, os.Truncate(name, x.bytes()))
	_, err = tier.Pin(ctx, reqs[len(reqs)-8:]) // what was cut off is zeros
	is(t, err, tiers.ErrCorrupt)
	free(t, tier)
	x.direct = good
	_, err = tier.Pin(ctx, reqs)
	is(t, err, tiers.ErrCorrupt)
	if n := tier.Usage().Corruptions; n != 2 {
		t.Errorf("%d corruptions", n)
	}
	free(t, tier)
	for _, st := range tier.mu.segments {
		for _, p := range st.parts {
			if p != nil && p.refs != 0 {
				t.Fatal("a part is still referred to")
			}
		}
	}
}

// TestQueueCorrupt: wherever in a batch the corrupt block is, and whatever is still under way when it is
// found, the Pin fails.
func TestQueueCorrupt(t *testing.T) {
	for _, depth := range []int{2, 8, 32} {
		tier, reqs, pieces := queued(t, Options{Bytes: 64 << 20, ExtentBytes: 64 << 20, Depth: depth}, 10)
		for i := range reqs {
			damage := func() { ok(t, breakable{tier}.Corrupt(reqs[i].Header, pieces[i].Head, pieces[i].Plane)) }
			damage()
			_, err := tier.Pin(ctx, reqs)
			is(t, err, tiers.ErrCorrupt)
			damage() // flips the bit back
			free(t, tier)
		}
		pins, err := tier.Pin(ctx, reqs)
		ok(t, err)
		for i := range pins {
			pins[i].Release(0)
		}
	}
}

type badDescriptor struct{}

func (badDescriptor) Descriptor() uintptr { return ^uintptr(0) >> 33 }

// TestQueueCancelled: a Pin ends with its context while it waits for a slot,
// and between reads.
func TestQueueCancelled(t *testing.T) {
	tier, reqs, _ := queued(t, Options{Bytes: 64 << 20, ExtentBytes: 64 << 20, Depth: 1}, 10)
	tier.slots <- struct{}{}
	short, cancel := context.WithTimeout(ctx, 20*time.Millisecond)
	defer cancel()
	_, err := tier.Pin(short, reqs)
	is(t, err, context.DeadlineExceeded)
	<-tier.slots
	free(t, tier)
	for range 20 {
		some, cancel := context.WithCancel(ctx)
		time.AfterFunc(time.Duration(rand.IntN(1000))*time.Microsecond, cancel)
		pins, err := tier.Pin(some, reqs)
		if err != nil {
			is(t, err, context.Canceled)
		}
		for i := range pins {
			pins[i].Release(0)
		}
		free(t, tier)
	}
}

// TestNoQueue: where no queue is to be had threads read.
func TestNoQueue(t *testing.T) {
	tier, reqs, pieces := queued(t, Options{Bytes: 64 << 20, ExtentBytes: 64 << 20, Depth: 1}, 3)
	ok(t, (<-tier.queues).close())
	tier.o.Depth = 1 << 30 // more than fs.aio-max-nr
	pins, err := tier.Pin(ctx, reqs)
	ok(t, err)
	for i := range pins {
		if string(pins[i].Ranges[0]) != string(pieces[i].Bytes) {
			t.Fatal("other bytes")
		}
		pins[i].Release(0)
	}
	if len(tier.queues) != 0 {
		t.Error("there was a queue")
	}
}
