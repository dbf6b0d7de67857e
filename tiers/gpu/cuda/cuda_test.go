package cuda_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"kvtier/tiers/gpu/cuda"
	"kvtier/tiers/gpu/cuda/cudatest"
)

var ctx = context.Background()

// do runs f on the device.
func do(t *testing.T, d *cuda.Device, f func(*cuda.Context) error) {
	t.Helper()
	if err := d.Do(ctx, f); err != nil {
		t.Fatal(err)
	}
}

func is(t *testing.T, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Fatalf("error %v, want %v", err, want)
	}
}

// scale is y[i] = a * x[i] for i < n; poke writes to an address.
const ptx = `.version 7.0
.target sm_80
.address_size 64

.visible .entry scale(
	.param .u64 scale_param_0,
	.param .u64 scale_param_1,
	.param .f32 scale_param_2,
	.param .u32 scale_param_3
)
{
	.reg .pred %p<2>;
	.reg .f32 %f<4>;
	.reg .b32 %r<6>;
	.reg .b64 %rd<8>;

	ld.param.u64 %rd1, [scale_param_0];
	ld.param.u64 %rd2, [scale_param_1];
	ld.param.f32 %f1, [scale_param_2];
	ld.param.u32 %r1, [scale_param_3];
	mov.u32 %r2, %ctaid.x;
	mov.u32 %r3, %ntid.x;
	mov.u32 %r4, %tid.x;
	mad.lo.s32 %r5, %r2, %r3, %r4;
	setp.ge.u32 %p1, %r5, %r1;
	@%p1 bra $L__END;
	cvta.to.global.u64 %rd3, %rd1;
	cvta.to.global.u64 %rd4, %rd2;
	mul.wide.u32 %rd5, %r5, 4;
	add.s64 %rd6, %rd3, %rd5;
	add.s64 %rd7, %rd4, %rd5;
	ld.global.f32 %f2, [%rd6];
	mul.rn.f32 %f3, %f1, %f2;
	st.global.f32 [%rd7], %f3;
$L__END:
	ret;
}

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

func TestInfo(t *testing.T) {
	d := cudatest.Open(t)
	info := d.Info()
	t.Logf("%+v", info)
	if info.Name == "" || info.Memory <= 0 || info.SMs <= 0 || info.Major < 7 || info.Driver < 11000 {
		t.Fatalf("%+v", info)
	}
	if n, err := cuda.Devices(); n < 1 || err != nil {
		t.Fatal(n, err)
	}
	_, err := cuda.Open(1000)
	is(t, err, cuda.ErrNoDevice)
	do(t, d, func(c *cuda.Context) error {
		free, total, err := c.MemInfo()
		if err == nil && (free <= 0 || free > total) {
			t.Errorf("%d bytes free of %d", free, total)
		}
		return err
	})
}

// lane is memory at both ends and a stream to copy in.
type lane struct {
	host   []byte
	a, b   cuda.Ptr
	stream cuda.Stream
	done   cuda.Event
}

func newLane(t *testing.T, d *cuda.Device, size int) *lane {
	t.Helper()
	l := &lane{}
	do(t, d, func(c *cuda.Context) (err error) {
		if l.host, err = c.HostAlloc(size); err != nil {
			return err
		}
		if l.a, err = c.Alloc(size); err != nil {
			return err
		}
		if l.b, err = c.Alloc(size); err != nil {
			return err
		}
		if l.stream, err = c.NewStream(); err != nil {
			return err
		}
		l.done, err = c.NewEvent(false)
		return err
	})
	t.Cleanup(func() {
		do(t, d, func(c *cuda.Context) error {
			return errors.Join(l.done.Destroy(), l.stream.Destroy(), c.Free(l.a), c.Free(l.b), c.HostFree(l.host))
		})
	})
	return l
}

// issue runs f and waits for what it put into the stream.
func (l *lane) issue(t *testing.T, d *cuda.Device, f func(c *cuda.Context) error) {
	t.Helper()
	do(t, d, func(c *cuda.Context) error {
		if err := f(c); err != nil {
			return err
		}
		return l.done.Record(l.stream)
	})
	if err := d.Wait(ctx, l.done); err != nil {
		t.Fatal(err)
	}
}

func TestCopies(t *testing.T) {
	d := cudatest.Open(t)
	const size = 1 << 20
	l := newLane(t, d, size)
	want := make([]byte, size)
	for i := range want {
		want[i] = byte(i * i >> 3)
	}
	copy(l.host, want)
	l.issue(t, d, func(c *cuda.Context) error {
		return errors.Join(c.CopyToDevice(l.a, l.host, l.stream),
			c.CopyToDevice(l.a, nil, l.stream),
			c.CopyOnDevice(l.b, l.a+256, size-256, l.stream),
			c.Set(l.b+size-256, 0xee, 256, l.stream))
	})
	clear(l.host)
	l.issue(t, d, func(c *cuda.Context) error { return c.CopyToHost(l.host, l.b, l.stream) })
	want = append(want[256:size:size], bytes.Repeat([]byte{0xee}, 256)...)
	if !bytes.Equal(l.host, want) {
		t.Fatal("other bytes came back")
	}
}

func TestKernel(t *testing.T) {
	d := cudatest.Open(t)
	const n = 1000
	l := newLane(t, d, 4*n)
	for i := range n {
		binary.LittleEndian.PutUint32(l.host[4*i:], math.Float32bits(float32(i)))
	}
	var module cuda.Module
	var scale cuda.Function
	do(t, d, func(c *cuda.Context) (err error) {
		if module, err = c.Load([]byte(ptx)); err != nil {
			return err
		}
		if scale, err = module.Function("scale"); err != nil {
			return err
		}
		if _, err := module.Function("none"); err == nil || !strings.Contains(err.Error(), "none") {
			t.Errorf("a kernel that is not there: %v", err)
		}
		registers, err1 := scale.Registers()
		shared, err2 := scale.SharedBytes()
		local, err3 := scale.LocalBytes()
		blocks, err4 := scale.BlocksPerSM(128, 0)
		if registers < 0 || shared != 0 || local != 0 || blocks < 1 {
			t.Errorf("%d registers, %d bytes shared, %d local, %d blocks", registers, shared, local, blocks)
		}
		return errors.Join(err1, err2, err3, err4)
	})
	launch := func(c *cuda.Context, shared int) error {
		return c.Launch(scale, [3]int{(n + 127) / 128, 1, 1}, [3]int{128, 1, 1}, shared, l.stream,
			uint64(l.a), uint64(l.b), uint64(math.Float32bits(1.5)), n)
	}
	var from, to cuda.Event
	do(t, d, func(c *cuda.Context) (err error) {
		if from, err = c.NewEvent(true); err != nil {
			return err
		}
		to, err = c.NewEvent(true)
		return err
	})
	l.issue(t, d, func(c *cuda.Context) error {
		if err := launch(c, 64<<10); err == nil {
			t.Error("64 KiB of shared memory without asking")
		}
		return errors.Join(scale.SetMaxShared(64<<10), c.CopyToDevice(l.a, l.host, l.stream),
			from.Record(l.stream), launch(c, 64<<10), to.Record(l.stream), c.CopyToHost(l.host, l.b, l.stream))
	})
	for i := range n {
		if got := math.Float32frombits(binary.LittleEndian.Uint32(l.host[4*i:])); got != 1.5*float32(i) {
			t.Fatalf("element %d is %g", i, got)
		}
	}
	do(t, d, func(c *cuda.Context) error {
		took, err := cuda.Elapsed(from, to)
		if took < 0 || took > time.Minute {
			t.Errorf("the kernel took %v", took)
		}
		return errors.Join(err, from.Destroy(), to.Destroy(), module.Unload())
	})
}

func TestBadPTX(t *testing.T) {
	d := cudatest.Open(t)
	err := d.Do(ctx, func(c *cuda.Context) error {
		_, err := c.Load([]byte(strings.Replace(ptx, "mad.lo.s32", "mad.nonsense", 1)))
		return err
	})
	if err == nil || !strings.Contains(err.Error(), "CUDA_ERROR_INVALID_PTX") && !strings.Contains(err.Error(), "InvalidPtx") {
		t.Fatalf("error %v", err)
	}
	t.Log(err)
	if errors.Is(err, cuda.ErrLost) {
		t.Fatal("bad code loses no device")
	}
}

// TestOrder copies in one stream what a kernel reads in another.
func TestOrder(t *testing.T) {
	d := cudatest.Open(t)
	const n = 1 << 16
	l := newLane(t, d, 4*n)
	for i := range n {
		binary.LittleEndian.PutUint32(l.host[4*i:], math.Float32bits(2))
	}
	var compute cuda.Stream
	do(t, d, func(c *cuda.Context) (err error) {
		compute, err = c.NewStream()
		return err
	})
	l.issue(t, d, func(c *cuda.Context) error {
		m, err := c.Load([]byte(ptx))
		if err != nil {
			return err
		}
		scale, err := m.Function("scale")
		if err != nil {
			return err
		}
		return errors.Join(c.CopyToDevice(l.a, l.host, l.stream), l.done.Record(l.stream), compute.Wait(l.done),
			c.Launch(scale, [3]int{n / 256, 1, 1}, [3]int{256, 1, 1}, 0, compute,
				uint64(l.a), uint64(l.b), uint64(math.Float32bits(3)), n),
			l.done.Record(compute), l.stream.Wait(l.done), c.CopyToHost(l.host, l.b, l.stream))
	})
	do(t, d, func(*cuda.Context) error {
		idle, err := compute.Query()
		if !idle {
			t.Error("what the other stream waited for is not done")
		}
		return errors.Join(err, compute.Synchronize(), compute.Destroy())
	})
	for i := range n {
		if got := math.Float32frombits(binary.LittleEndian.Uint32(l.host[4*i:])); got != 6 {
			t.Fatalf("element %d is %g", i, got)
		}
	}
}

func TestRegister(t *testing.T) {
	d := cudatest.Open(t)
	l := newLane(t, d, 1<<16)
	b := mapped(t, 1<<16)
	for i := range b {
		b[i] = byte(i)
	}
	do(t, d, func(c *cuda.Context) error { return c.HostRegister(b) })
	l.issue(t, d, func(c *cuda.Context) error {
		return errors.Join(c.CopyToDevice(l.a, b, l.stream), c.CopyToHost(l.host, l.a, l.stream))
	})
	do(t, d, func(c *cuda.Context) error { return c.HostUnregister(b) })
	if !bytes.Equal(l.host, b) {
		t.Fatal("other bytes came back")
	}
}

func TestOutOfMemory(t *testing.T) {
	d := cudatest.Open(t)
	err := d.Do(ctx, func(c *cuda.Context) error {
		_, total, err := c.MemInfo()
		if err != nil {
			return err
		}
		_, err = c.Alloc(int(total) + 1<<20)
		return err
	})
	is(t, err, cuda.ErrOutOfMemory)
	do(t, d, func(c *cuda.Context) error {
		p, err := c.Alloc(1 << 20)
		if err != nil {
			return err
		}
		return c.Free(p)
	})
}

func TestDo(t *testing.T) {
	d := cudatest.Open(t)
	mine := errors.New("mine")
	is(t, d.Do(ctx, func(*cuda.Context) error { return mine }), mine)

	// Somebody else's function runs: who waits for his turn can stop waiting.
	busy, release := make(chan bool), make(chan bool)
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := d.Do(ctx, func(*cuda.Context) error { close(busy); <-release; return nil }); err != nil {
			t.Error(err)
		}
	})
	<-busy
	short, cancel := context.WithTimeout(ctx, 10*time.Millisecond)
	defer cancel()
	is(t, d.Do(short, func(*cuda.Context) error { t.Error("ran"); return nil }), context.DeadlineExceeded)
	close(release)
	wg.Wait()

	for range 8 {
		wg.Go(func() {
			for range 50 {
				if err := d.Do(ctx, func(*cuda.Context) error { runtime.Gosched(); return nil }); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	is(t, d.Do(ctx, func(*cuda.Context) error { t.Error("ran"); return nil }), cuda.ErrClosed)
}

// TestDoThatExits ends a goroutine in the middle of its function: others get their turn.
func TestDoThatExits(t *testing.T) {
	d := cudatest.Open(t)
	var wg sync.WaitGroup
	wg.Go(func() { _ = d.Do(ctx, func(*cuda.Context) error { runtime.Goexit(); return nil }) })
	wg.Wait()
	do(t, d, func(*cuda.Context) error { return nil })
}

// again runs one test of this binary in a process of its own, with a variable set.
func again(t *testing.T, variable, value string) {
	t.Helper()
	cmd := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v")
	cmd.Env = append(os.Environ(), variable+"="+value)
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "--- PASS: "+t.Name()) {
		t.Fatalf("%v\n%s", err, out)
	}
}

// TestLost loses the device, which is why it has a process of its own.
func TestLost(t *testing.T) {
	d := cudatest.Open(t)
	const child = "CUDA_TEST_LOST"
	if os.Getenv(child) == "" {
		again(t, child, "1")
		return
	}
	l := newLane(t, d, 4096)
	do(t, d, func(c *cuda.Context) error {
		m, err := c.Load([]byte(ptx))
		if err != nil {
			return err
		}
		poke, err := m.Function("poke")
		if err != nil {
			return err
		}
		return errors.Join(c.Launch(poke, [3]int{1, 1, 1}, [3]int{1, 1, 1}, 0, l.stream, 64), l.done.Record(l.stream))
	})
	err := d.Wait(ctx, l.done)
	is(t, err, cuda.ErrLost)
	t.Log(err)
	is(t, d.Do(ctx, func(*cuda.Context) error { t.Error("ran"); return nil }), cuda.ErrLost)
	is(t, d.Err(), cuda.ErrLost)
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	os.Stdout.WriteString("--- PASS: " + t.Name() + "\n") // what lies in the context cannot be freed
	os.Exit(0)
}

// TestHandle reads this process's device memory from another one.
func TestHandle(t *testing.T) {
	d := cudatest.Open(t)
	const child, size = "CUDA_TEST_HANDLE", 2 << 20
	l := newLane(t, d, size)
	if given := os.Getenv(child); given != "" {
		var p cuda.Ptr
		l.issue(t, d, func(c *cuda.Context) (err error) {
			if p, err = c.OpenMemHandle(cuda.Handle([]byte(unhex(t, given)))); err != nil {
				return err
			}
			return c.CopyToHost(l.host, p, l.stream)
		})
		do(t, d, func(c *cuda.Context) error { return c.CloseMemHandle(p) })
		if !bytes.Equal(l.host, bytes.Repeat([]byte{0x5a}, size)) {
			t.Fatal("other bytes than the other process wrote")
		}
		return
	}
	var h cuda.Handle
	if err := d.Do(ctx, func(c *cuda.Context) (err error) { h, err = c.MemHandle(l.a); return err }); err != nil {
		if emulated(d) {
			t.Skip(err)
		}
		t.Fatal(err)
	}
	l.issue(t, d, func(c *cuda.Context) error { return c.Set(l.a, 0x5a, size, l.stream) })
	again(t, child, hex(h))
}

// emulated says whether the device is the one of mock: it has no other processes.
func emulated(d *cuda.Device) bool { return strings.Contains(strings.ToLower(d.Info().Name), "mock") }

func hex(h cuda.Handle) string { return fmt.Sprintf("%x", h[:]) }

func unhex(t *testing.T, s string) (b []byte) {
	t.Helper()
	if _, err := fmt.Sscanf(s, "%x", &b); err != nil {
		t.Fatal(err)
	}
	return b
}

// TestTimed: what is timed has been done, and took some time; what fails is told.
func TestTimed(t *testing.T) {
	d := cudatest.Open(t)
	do(t, d, func(c *cuda.Context) error {
		s, err := c.NewStream()
		if err != nil {
			return err
		}
		p, err := c.Alloc(1 << 20)
		if err != nil {
			return errors.Join(err, s.Destroy())
		}
		for range 3 {
			took, err := c.Timed(s, func() error { return c.Set(p, 7, 1<<20, s) })
			if err != nil || took <= 0 || took > time.Minute {
				t.Errorf("%v, %v", took, err)
			}
			if done, err := s.Query(); err != nil || !done {
				t.Errorf("it is not done: %v", err)
			}
		}
		failed := errors.New("nothing was issued")
		if _, err := c.Timed(s, func() error { return failed }); !errors.Is(err, failed) {
			t.Errorf("error %v", err)
		}
		return errors.Join(c.Free(p), s.Destroy())
	})
}
