package gpu

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"strings"
	"testing"

	"kvtier/tiers"
	"kvtier/tiers/gpu/cuda"
	"kvtier/tiers/gpu/cuda/cudatest"
	"kvtier/tiers/tiertest"
)

var ctx = context.Background()

// openCUDA makes a tier on device 0. Without one the test is skipped.
func openCUDA(t *testing.T, limit int64) *Tier {
	t.Helper()
	tier, err := Open(Options{Bytes: limit})
	cudatest.Missing(t, err)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tier.closeIn(t) }) // also where the test did not come to it
	return tier
}

// openFake makes a tier on memory that is no device's: a bank that has so many bytes.
func openFake(t *testing.T, limit, has int64) (*Tier, *fakeBank) {
	t.Helper()
	b := newFakeBank(has)
	tier := newTier(b, limit)
	t.Cleanup(func() {
		tier.closeIn(t)
		b.check(t)
	})
	return tier, b
}

// TestTier runs the suite over memory that is no device's, everywhere.
func TestTier(t *testing.T) {
	tiertest.Run(t, func(t *testing.T, limit int64) tiers.Tier {
		tier, _ := openFake(t, limit, limit)
		return tier
	})
}

// TestTierCUDA runs it on a device.
func TestTierCUDA(t *testing.T) {
	openCUDA(t, 1<<20) // or skip all of it
	tiertest.Run(t, func(t *testing.T, limit int64) tiers.Tier { return openCUDA(t, limit) })
}

func (t *Tier) closeIn(tt *testing.T) {
	tt.Helper()
	if err := t.Close(); err != nil {
		tt.Fatal(err)
	}
}

func TestOpen(t *testing.T) {
	if _, err := Open(Options{Bytes: 255}); err == nil {
		t.Fatal("a limit of 255 bytes")
	}
	if _, err := Open(Options{Device: 1000, Bytes: 1 << 20}); !errors.Is(err, cuda.ErrNoDevice) && !errors.Is(err, cuda.ErrNoDriver) {
		t.Fatal(err)
	}
}

// TestNoLeak uses a tier and looks at the device's free memory before and after.
func TestNoLeak(t *testing.T) {
	openCUDA(t, 1<<20).closeIn(t)
	d, err := cuda.Open(0) // keeps the context, which has memory of its own
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	free := func() (n int64) {
		if err := d.Do(ctx, func(c *cuda.Context) (err error) { n, _, err = c.MemInfo(); return err }); err != nil {
			t.Fatal(err)
		}
		return n
	}
	use := func() {
		t.Helper()
		tier := openCUDA(t, 64<<20)
		h, pieces := tiertest.Segment(1, 4, 100000)
		before := free()
		put(t, tier, h, pieces)
		if used := tier.Usage().BytesUsed; before-free() < used {
			t.Fatalf("%d bytes used, %d free before, %d now", used, before, free())
		}
		l, ok := tier.lease(h, tiers.AllPlanes)
		if !ok {
			t.Fatal("not resident")
		}
		var e cuda.Event
		if err := tier.dev.Do(ctx, func(c *cuda.Context) (err error) { e, err = c.NewEvent(false); return err }); err != nil {
			t.Fatal(err)
		}
		tier.abandon(e, l)
		tier.closeIn(t)
	}
	use() // a driver keeps some memory for what it may need again
	before := free()
	for range 3 {
		use()
	}
	if after := free(); after != before {
		t.Fatalf("%d bytes free before, %d after", before, after)
	}
}

// again runs one test of this binary in a process of its own, with a variable set.
func again(t *testing.T, env ...string) {
	t.Helper()
	cmd := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v")
	cmd.Env = append(os.Environ(), env...)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
}

// TestFaultsCUDA lets calls of the emulated driver fail, in processes of their
// own: MOCKCUDA_FAIL names a call, which one from the start, and with what.
func TestFaultsCUDA(t *testing.T) {
	const child = "GPU_TEST_FAULT"
	if os.Getenv(child) == "" {
		name := openCUDA(t, 1<<20).dev.Info().Name
		if !strings.Contains(strings.ToLower(name), "mock") {
			t.Skipf("%s does not fail on demand", name)
		}
	}
	h, pieces := tiertest.Segment(1, 2, 9000)
	pin := func(tier *Tier) error {
		_, err := tier.Pin(ctx, []tiers.Request{{Header: h}})
		return err
	}
	for _, c := range []struct {
		name, env string
		test      func(t *testing.T)
	}{
		{"Open", "MOCKCUDA_FAIL=cuMemHostAlloc:3:2", func(t *testing.T) {
			_, err := Open(Options{Bytes: 1 << 20})
			is(t, err, cuda.ErrOutOfMemory)
		}},
		{"Alloc", "MOCKCUDA_FAIL=cuMemAlloc:1:2", func(t *testing.T) {
			tier := openCUDA(t, 1<<20)
			is(t, tier.Put(ctx, h, pieces), tiers.ErrFull)
			if u := tier.Usage(); u.BytesLimit != 0 || u.BytesUsed != 0 {
				t.Fatalf("%d bytes used of %d", u.BytesUsed, u.BytesLimit)
			}
		}},
		{"OutOfMemory", "MOCKCUDA_MEMORY=104857600", func(t *testing.T) {
			tier := openCUDA(t, 1<<40)
			for seed := uint64(0); tier.Usage().Evictions == 0; seed++ {
				h, pieces := tiertest.Segment(seed, 8, 200000)
				put(t, tier, h, pieces)
			}
			if u := tier.Usage(); u.BytesLimit != u.BytesUsed || u.BytesUsed == 0 || u.BytesUsed > 100<<20 {
				t.Fatalf("%d bytes used of %d, the device has 100 MiB", u.BytesUsed, u.BytesLimit)
			}
		}},
		{"Write", "MOCKCUDA_FAIL=cuMemcpyHtoDAsync:1:1", func(t *testing.T) {
			tier := openCUDA(t, 1<<20)
			if err := tier.Put(ctx, h, pieces); err == nil || errors.Is(err, tiers.ErrLost) || errors.Is(err, tiers.ErrFull) {
				t.Fatal(err)
			}
			holds(t, tier, h, pieces, false)
			put(t, tier, h, pieces)
			holds(t, tier, h, pieces, true)
		}},
		{"WriteLost", "MOCKCUDA_FAIL=cuMemcpyHtoDAsync:1:719", func(t *testing.T) {
			tier := openCUDA(t, 1<<20)
			is(t, tier.Put(ctx, h, pieces), tiers.ErrLost)
			is(t, pin(tier), tiers.ErrLost)
		}},
		{"Read", "MOCKCUDA_FAIL=cuMemcpyDtoHAsync:1:1", func(t *testing.T) {
			tier := openCUDA(t, 1<<20)
			put(t, tier, h, pieces)
			if err := pin(tier); err == nil || errors.Is(err, tiers.ErrLost) {
				t.Fatal(err)
			}
			holds(t, tier, h, pieces, true)
		}},
		{"Record", "MOCKCUDA_FAIL=cuEventRecord:1:719", func(t *testing.T) {
			tier := openCUDA(t, 1<<20)
			is(t, tier.Put(ctx, h, pieces), tiers.ErrLost)
		}},
	} {
		switch os.Getenv(child) {
		case "":
			again(t, child+"="+c.name, c.env)
		case c.name:
			c.test(t)
		}
	}
}

// poke writes to an address.
const poke = `.version 7.0
.target sm_80
.address_size 64

.visible .entry poke(
	.param .u64 poke_param_0
)
{
	.reg .b32 %r<2>;
	.reg .b64 %rd<3>;

	ld.param.u64 %rd1, [poke_param_0];
	cvta.to.global.u64 %rd2, %rd1;
	mov.u32 %r1, 7;
	st.global.u32 [%rd2], %r1;
	ret;
}
`

// TestLostCUDA runs a kernel that loses the device, in a process of its own.
func TestLostCUDA(t *testing.T) {
	tier := openCUDA(t, 1<<20)
	const child = "GPU_TEST_LOST"
	if os.Getenv(child) == "" {
		again(t, child+"=1")
		return
	}
	h, pieces := tiertest.Segment(1, 2, 9000)
	put(t, tier, h, pieces)
	holds(t, tier, h, pieces, true)
	var e cuda.Event
	err := tier.dev.Do(ctx, func(c *cuda.Context) error {
		m, err := c.Load([]byte(poke))
		if err != nil {
			return err
		}
		f, err := m.Function("poke")
		if err != nil {
			return err
		}
		s, err := c.NewStream()
		if err != nil {
			return err
		}
		if e, err = c.NewEvent(false); err != nil {
			return err
		}
		return errors.Join(c.Launch(f, [3]int{1, 1, 1}, [3]int{1, 1, 1}, 0, s, 64), e.Record(s))
	})
	if err != nil {
		t.Fatal(err)
	}
	l, ok := tier.lease(h, tiers.AllPlanes)
	if !ok {
		t.Fatal("not resident")
	}
	tier.abandon(e, l)
	tier.abandoned.Wait()
	other, otherPieces := tiertest.Segment(2, 2, 9000)
	err = tier.Put(ctx, other, otherPieces)
	is(t, err, tiers.ErrLost)
	t.Log(err)
	_, err = tier.Pin(ctx, []tiers.Request{{Header: h}})
	is(t, err, tiers.ErrLost)
	is(t, tier.Drop(h.ID, tiers.AllPlanes), tiers.ErrLost)
	if _, ok := tier.lease(h, 0); ok {
		t.Fatal("a lease on a device that is lost")
	}
}
