package gpu

import (
	"errors"
	"os"
	"testing"
	"time"

	"kvtier/tiers"
	"kvtier/tiers/gpu/cuda"
	"kvtier/tiers/gpu/cuda/cudatest"
	"kvtier/tiers/memory"
	"kvtier/tiers/tiertest"
)

// slabsOf copies pieces to mapped memory, to so many slabs in turn, and returns what Options.Slab is then.
func slabsOf(t *testing.T, pieces []tiers.Piece, slabs int) (mapped []tiers.Piece, all [][]byte, slab func(b []byte) []byte) {
	t.Helper()
	size := 4096
	for _, p := range pieces {
		size += (len(p.Bytes) + 511) / 512 * 512
	}
	at := make([]int, slabs)
	for range slabs {
		mem, err := memory.Map((size + 4095) / 4096 * 4096)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, mem)
	}
	for i, p := range pieces {
		s := i % slabs
		to := all[s][at[s]:][:len(p.Bytes)]
		at[s] += (len(p.Bytes) + 511) / 512 * 512
		copy(to, p.Bytes)
		mapped = append(mapped, tiers.Piece{Head: p.Head, Plane: p.Plane, Bytes: to})
	}
	return mapped, all, func(b []byte) []byte {
		for i, p := range mapped {
			if len(b) > 0 && &b[0] == &p.Bytes[0] {
				return all[i%slabs]
			}
		}
		return nil
	}
}

// unmap does as the RAM tier does.
func unmap(t *testing.T, tier *Tier, mem []byte) {
	t.Helper()
	if err := errors.Join(tier.Unmapping(mem), memory.Unmap(mem)); err != nil {
		t.Fatal(err)
	}
}

// TestPinned: slabs are pinned as their pieces come, within the limit, each once, and let go before they are unmapped or the tier ends.
func TestPinned(t *testing.T) {
	h, pieces := tiertest.Segment(1, 2, 9000)
	mapped, slabs, slab := slabsOf(t, pieces, 3)
	size := int64(len(slabs[0]))
	for _, c := range []struct {
		name         string
		most, pinned int64
		fail         error
	}{
		{"all", 3 * size, 3 * size, nil}, {"none", 0, 0, nil}, {"some", 3*size - 1, 2 * size, nil},
		{"refused", 3 * size, 2 * size, errors.New("as a test wants it")},
	} {
		t.Run(c.name, func(t *testing.T) {
			tier, b := openFake(t, 1<<20, 1<<20)
			tier.pinned.slab, tier.pinned.most = slab, c.most
			calls := 0
			b.fail = func(op string) error {
				if op != "pin" {
					return nil
				}
				if calls++; calls == 2 {
					return c.fail
				}
				return nil
			}
			for range 2 { // also when they are known
				put(t, tier, h, mapped)
				holds(t, tier, h, pieces, true)
				if got := tier.PinnedBytes(); got != c.pinned || got > c.most {
					t.Errorf("%d bytes are pinned", got)
				}
				if err := tier.Drop(h.ID, tiers.AllPlanes); err != nil {
					t.Fatal(err)
				}
			}
			if calls > 3 {
				t.Errorf("asked %d times", calls)
			}
			other, others := tiertest.Segment(2, 2, 9000) // lies in no slab
			put(t, tier, other, others)
			holds(t, tier, other, others, true)
			before := tier.PinnedBytes()
			if err := tier.Unmapping(slabs[0]); err != nil {
				t.Fatal(err)
			}
			if after := tier.PinnedBytes(); after != max(0, before-size) {
				t.Errorf("%d bytes were pinned, %d are", before, after)
			}
			put(t, tier, h, mapped) // another slab that lies at the same address
			if after := tier.PinnedBytes(); after != before {
				t.Errorf("%d bytes were pinned, %d are", before, after)
			}
			b.fail = once("unpin", 1, errors.New("broken"))
			if err := tier.Unmapping(slabs[0]); (err != nil) != (before > 0) {
				t.Errorf("a slab that stays pinned: %v", err)
			}
			if before > 0 { // as the device sees it
				delete(b.pinned, &slabs[0][0])
			}
			tier.closeIn(t)
			if err := tier.Unmapping(slabs[1]); err != nil || tier.PinnedBytes() != 0 {
				t.Error(err)
			}
		})
	}
	for _, mem := range slabs {
		if err := memory.Unmap(mem); err != nil {
			t.Fatal(err)
		}
	}
}

// pinning are options of a tier that copies from slabs by itself.
func pinning(slab func([]byte) []byte) Options {
	return Options{Bytes: 1 << 20, Slab: slab, PinBytes: 1 << 30}
}

// TestPinnedCUDA: a device copies from pinned slabs by itself, and nothing from memory that is not pinned; they can go as soon as a Put is done.
func TestPinnedCUDA(t *testing.T) {
	h, pieces := tiertest.Segment(1, 2, 9000)
	mapped, slabs, slab := slabsOf(t, pieces, 2)
	tier, _ := openImpatient(t, pinning(slab), 0)
	pageable := cudatest.Pageable(t)
	put(t, tier, h, mapped)
	for _, mem := range slabs {
		clear(mem) // Put is done with it
		unmap(t, tier, mem)
	}
	holds(t, tier, h, pieces, true)
	other, others := tiertest.Segment(2, 2, 9000)
	put(t, tier, other, others)
	holds(t, tier, other, others, true)
	if n := cudatest.Pageable(t); n != pageable {
		t.Errorf("%d bytes were copied from memory that is not pinned", n-pageable)
	}
	if n := tier.PinnedBytes(); n != 0 {
		t.Errorf("%d bytes are pinned", n)
	}
}

// TestPinnedStuck: a slab that a stuck device is to copy from is not released, and one that it may know stays mapped, until it answers.
func TestPinnedStuck(t *testing.T) {
	h, pieces := tiertest.Segment(1, 2, 9000)
	mapped, slabs, slab := slabsOf(t, pieces, 1)
	tier, stall := openImpatient(t, pinning(slab), 50*time.Millisecond)
	stall(true)
	released := make(chan bool, 1)
	is(t, tier.PutFrom(ctx, h, mapped, func() { clear(slabs[0]); released <- true }), ErrStuck)
	if len(released) > 0 {
		t.Error("released under a copy")
	}
	goesOn := func() {
		t.Helper()
		stall(false)
		soon(t, "it never ends", func() bool { return tier.late.Load() == 0 })
	}
	goesOn()
	<-released
	holds(t, tier, h, pieces, true)
	stall(true)
	_, err := tier.Pin(ctx, []tiers.Request{{Header: h}})
	is(t, err, ErrStuck)
	is(t, tier.Unmapping(slabs[0]), ErrStuck)
	goesOn()
	unmap(t, tier, slabs[0])
}

// TestPinnedFaults: a slab that cannot be pinned is copied through buffers; a device that is lost keeps no slab mapped.
func TestPinnedFaults(t *testing.T) {
	const fail = "MOCKCUDA_FAIL"
	if os.Getenv(fail) == "" {
		openImpatient(t, pinning(nil), 0) // or skip it
		cudatest.Pageable(t)
		again(t, fail+"=cuMemHostRegister:1:2,cuMemHostUnregister:1:719")
		return
	}
	h, pieces := tiertest.Segment(1, 2, 9000)
	mapped, slabs, slab := slabsOf(t, pieces, 2)
	tier, _ := openImpatient(t, pinning(slab), 0)
	put(t, tier, h, mapped)
	holds(t, tier, h, pieces, true)
	if n := tier.PinnedBytes(); n != int64(len(slabs[1])) {
		t.Errorf("%d bytes are pinned", n)
	}
	for _, mem := range slabs {
		unmap(t, tier, mem) // the second one finds the device lost
	}
	_, err := tier.Pin(ctx, []tiers.Request{{Header: h}})
	is(t, err, cuda.ErrLost)
}
