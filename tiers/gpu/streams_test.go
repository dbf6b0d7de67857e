package gpu

import (
	"bytes"
	"errors"
	"testing"
	"time"

	"kvtier/tiers"
	"kvtier/tiers/gpu/cuda"
	"kvtier/tiers/tiertest"
)

// TestBuffersCUDA copies more than all buffers hold, both ways: each is filled again, as soon as it is empty.
func TestBuffersCUDA(t *testing.T) {
	tier := openCUDA(t, 64<<20)
	h, pieces := tiertest.Segment(3, 4, 700_000)
	n := 0
	for _, p := range pieces {
		n += len(p.Bytes)
	}
	if n < 3*laneBuffers*bufferBytes {
		t.Fatalf("%d bytes are too few", n)
	}
	put(t, tier, h, pieces)
	holds(t, tier, h, pieces, true)
}

// TestAbandonCUDA leaves a lease to the tier while the device reads what it
// names. The room goes to others, who want it at once, when the device has done.
func TestAbandonCUDA(t *testing.T) {
	tier := openCUDA(t, 1<<20)
	h, pieces := tiertest.Segment(1, 1, 80_000)
	other, others := tiertest.Segment(2, 1, 80_000)
	put(t, tier, h, pieces)
	l, ok := tier.lease(h, 0)
	if !ok {
		t.Fatal("not resident")
	}
	want := pieces[0]
	var s cuda.Stream
	var e cuda.Event
	var pinned []byte
	err := tier.dev.Do(ctx, func(c *cuda.Context) (err error) {
		if pinned, err = c.HostAlloc(len(want.Bytes)); err != nil {
			return err
		}
		if s, err = c.NewStream(); err != nil {
			return err
		}
		if e, err = c.NewEvent(false); err != nil {
			return err
		}
		at := tier.mu.segments[h.ID].table.at(want.Head, want.Plane).ptr()
		return errors.Join(c.CopyToHost(pinned, at, s), e.Record(s))
	})
	if err != nil {
		t.Fatal(err)
	}
	tier.abandon(e, l)
	if err := tier.Drop(h.ID, tiers.AllPlanes); err != nil {
		t.Fatal(err)
	}
	deadline := time.Now().Add(10 * time.Second)
	for room := false; !room; {
		tier.mu.Lock()
		spans := tier.mu.arena.slabs[0].free
		room = len(spans) == 1 && spans[0].n == tier.mu.arena.slabs[0].size
		tier.mu.Unlock()
		if time.Now().After(deadline) {
			t.Fatal("the room never becomes free")
		}
		time.Sleep(100 * time.Microsecond)
	}
	put(t, tier, other, others)
	err = tier.dev.Do(ctx, func(c *cuda.Context) error {
		err := s.Synchronize()
		if !bytes.Equal(pinned, want.Bytes) {
			t.Error("the room was filled again under the device's eyes")
		}
		return errors.Join(err, s.Destroy(), c.HostFree(pinned))
	})
	if err != nil {
		t.Fatal(err)
	}
}
