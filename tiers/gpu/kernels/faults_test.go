package kernels

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"kvtier/attention"
	"kvtier/tiers"
	"kvtier/tiers/gpu/cuda"
	"kvtier/tiers/gpu/cuda/cudatest"
)

// asked is something to ask whose answer is known.
type asked struct {
	segments []Segment
	q        []float32
	outs     [][]float64
	lses     []float64
}

// ask makes one of a few tokens, which are in one allocation.
func ask(t *testing.T, d *cuda.Device, headDim, rows, tokens int) *asked {
	t.Helper()
	rng := rand.New(rand.NewPCG(9, uint64(rows)))
	m := shape{d: headDim, heads: 1, tokens: []int{tokens}, profile: tiers.ProfileBalanced}
	all := m.make(rng)
	x := &asked{q: m.query(rng, rows, 3)}
	x.outs, x.lses = dense(t, all, x.q, 0)
	var at [tiers.NumPlanes]Address
	var b []byte
	for p, plane := range all[0].planes[0] {
		at[p] = uint64(len(b))
		b = append(b, plane...)
		b = append(b, make([]byte, -len(b)&255)...)
	}
	var base cuda.Ptr
	do(t, d, func(c *cuda.Context) (err error) { base, err = upload(c, b); return err })
	t.Cleanup(func() { _ = d.Do(ctx, func(c *cuda.Context) error { return c.Free(base) }) })
	x.segments = []Segment{{Header: all[0].header, At: func(_ int, p tiers.Plane) Address { return uint64(base) + at[p] }}}
	return x
}

// right checks an answer.
func (x *asked) right(t *testing.T, got []attention.Partial) {
	t.Helper()
	if output, lse := differs(got, x.outs, x.lses); output > mostError || lse > mostError {
		t.Fatalf("output errs by %g, log-sum-exp by %g", output, lse)
	}
}

func (x *asked) answer(a *Attention) ([]attention.Partial, error) {
	return answer(a, x.segments, Warps{4, 4}, x.q, 0)
}

func TestWrongQuery(t *testing.T) {
	d := cudatest.Open(t)
	a := newAttention(t, d)
	x := ask(t, d, 64, 1, 150)
	tables, err := a.Upload(ctx, NewPlan(x.segments, Warps{4, 4}))
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range []int{0, 1, 63, 65} {
		if _, err := a.Start(ctx, tables, make([]float32, n), 0); err == nil {
			t.Errorf("a query of %d numbers", n)
		}
	}
	if _, err := a.StartChoosing(ctx, tables, make([]float32, 64*(MostRows+1)), 0, 1); err == nil {
		t.Error("more rows choose together than can")
	}
	if err := a.FreeTables(ctx, tables); err != nil {
		t.Fatal(err)
	}
	if _, err := a.Warps(ctx, 96); err == nil {
		t.Error("kernels for head dimension 96")
	}
}

// TestGivenUp cancels while the device works. Nothing is lost, whoever waits for the rest; the next answers are right.
func TestGivenUp(t *testing.T) {
	d := cudatest.Open(t)
	a, err := New(ctx, d)
	if err != nil {
		t.Fatal(err)
	}
	x := ask(t, d, 64, 2, 300)
	tables, err := a.Upload(ctx, NewPlan(x.segments, Warps{4, 4}))
	if err != nil {
		t.Fatal(err)
	}
	dead, cancel := context.WithCancel(ctx)
	cancel()
	if _, err := a.Start(dead, tables, x.q, 0); !errors.Is(err, context.Canceled) {
		t.Fatalf("error %v", err)
	}
	start := func() *Answer {
		t.Helper()
		n, err := a.Start(ctx, tables, x.q, 0)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	var full int64 // free memory once the room was made
	for i := range 20 {
		n := start()
		select {
		case <-n.Done():
			t.Fatal("done before anybody waited")
		default:
		}
		if _, err := n.Wait(dead); err != nil && !errors.Is(err, context.Canceled) { // or the device was faster
			t.Fatalf("error %v", err)
		}
		select {
		case <-n.Done():
		case <-time.After(10 * time.Second):
			t.Fatal("who gave up never hears that the device has done")
		}
		if i == 0 {
			full = free(t, d)
		} else if got := free(t, d); got != full {
			t.Fatalf("%d bytes free after %d answers, %d after one", got, i+1, full)
		}
	}
	ps, err := start().Wait(ctx)
	if err != nil {
		t.Fatal(err)
	}
	x.right(t, ps)
	if _, err := start().Wait(dead); err != nil && !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	if err := errors.Join(a.FreeTables(ctx, tables), a.Close(ctx), a.Close(ctx)); err != nil { // waits for the last one
		t.Fatal(err)
	}
	if _, err := a.Warps(ctx, 64); !errors.Is(err, cuda.ErrClosed) {
		t.Fatalf("after Close: %v", err)
	}
}

// TestFreeTables frees what an answer that is under way reads.
func TestFreeTables(t *testing.T) {
	a := newAttention(t, cudatest.Open(t))
	x := ask(t, a.device, 64, 2, 60)
	tables, err := a.Upload(ctx, NewPlan(x.segments, Warps{4, 4}))
	if err != nil {
		t.Fatal(err)
	}
	n, err := a.Start(ctx, tables, x.q, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := a.FreeTables(ctx, tables); err != nil {
		t.Fatal(err)
	}
	ps, err := n.Wait(ctx)
	if err != nil {
		t.Fatal(err)
	}
	x.right(t, ps)
}

// TestNoLeak looks at the device's free memory before and after.
func TestNoLeak(t *testing.T) {
	d := cudatest.Open(t)
	xs := []*asked{ask(t, d, 64, 3, 100), ask(t, d, 128, 9, 40), ask(t, d, 64, 1, 300)}
	use := func() {
		t.Helper()
		a, err := New(ctx, d)
		if err != nil {
			t.Fatal(err)
		}
		for _, x := range xs { // rooms grow and shrink
			got, err := x.answer(a)
			if err != nil {
				t.Fatal(err)
			}
			x.right(t, got)
		}
		tables, err := a.Upload(ctx, NewPlan(xs[0].segments, Warps{4, 4}))
		if err != nil {
			t.Fatal(err)
		}
		if us, err := a.Time(ctx, tables, xs[0].q, 0, Everything, 2); err != nil || len(us) != 2 || us[0] < 0 {
			t.Fatal(us, err)
		}
		dead, cancel := context.WithCancel(ctx)
		cancel()
		if n, err := a.Start(ctx, tables, xs[0].q, 0); err != nil {
			t.Fatal(err)
		} else if _, err := n.Wait(dead); err != nil && !errors.Is(err, context.Canceled) {
			t.Fatal(err)
		}
		// Close waits for it. The tables, which it reads, go later.
		if err := errors.Join(a.Close(ctx), d.Do(ctx, func(c *cuda.Context) error { return c.Free(tables.at) })); err != nil {
			t.Fatal(err)
		}
	}
	use() // a driver keeps some memory for what it may need again
	before := free(t, d)
	for range 3 {
		use()
	}
	if after := free(t, d); after != before {
		t.Fatalf("%d bytes free before, %d after", before, after)
	}
}

// TestConcurrent asks from many sides at once, some of which lose patience.
func TestConcurrent(t *testing.T) {
	d := cudatest.Open(t)
	a := newAttention(t, d)
	xs := []*asked{ask(t, d, 64, 3, 100), ask(t, d, 128, 9, 40), ask(t, d, 64, 1, 300)}
	var wg sync.WaitGroup
	for w := range 6 {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(10, uint64(w)))
			for range 4 {
				x := xs[rng.IntN(len(xs))]
				tables, err := a.Upload(ctx, NewPlan(x.segments, Warps{4, 4}))
				if err != nil {
					t.Error(err)
					return
				}
				n, err := a.Start(ctx, tables, x.q, 0)
				if err != nil {
					t.Error(err)
					return
				}
				impatient, cancel := context.WithTimeout(ctx, time.Duration(rng.IntN(20))*time.Millisecond)
				got, err := n.Wait(impatient)
				cancel()
				if err == nil {
					if output, lse := differs(got, x.outs, x.lses); output > mostError || lse > mostError {
						t.Errorf("output errs by %g, log-sum-exp by %g", output, lse)
					}
				} else if !errors.Is(err, context.DeadlineExceeded) {
					t.Error(err)
				}
				if err := a.FreeTables(ctx, tables); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
}

// child runs one test of this binary in a process of its own, with variables set. It returns what the test wrote.
func child(t *testing.T, env ...string) string {
	t.Helper()
	out, err := command(t.Name(), env...)
	if err != nil {
		t.Fatalf("%v: %v\n%s", env, err, out)
	}
	return out
}

func command(test string, env ...string) (string, error) {
	cmd := exec.Command(os.Args[0], "-test.run=^"+test+"$", "-test.v")
	cmd.Env = append(os.Environ(), env...)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// emulated skips tests that need a device which does as it is told.
func emulated(t *testing.T) {
	t.Helper()
	if name := cudatest.Open(t).Info().Name; !strings.Contains(strings.ToLower(name), "mock") {
		t.Skipf("%s does not fail on demand", name)
	}
}

// What a child of TestFaults says.
const (
	faultChild = "KERNELS_TEST_FAULT"
	felt       = "FELT"
)

// TestFaults lets every call of the driver fail once, with an error that passes
// and with one that loses the device: that is an error of the answer that
// needed the call; later ones are right, or the device is lost; nothing leaks.
func TestFaults(t *testing.T) {
	if os.Getenv(faultChild) != "" {
		faulty(t)
		return
	}
	emulated(t)
	if testing.Short() {
		t.Skip("a process for each call")
	}
	for _, call := range []string{"cuMemAlloc", "cuMemHostAlloc", "cuMemcpyHtoDAsync", "cuMemcpyDtoHAsync", "cuLaunchKernel", "cuEventCreate", "cuEventRecord",
		"cuEventQuery", "cuStreamSynchronize", "cuModuleLoadDataEx", "cuModuleGetFunction", "cuFuncSetAttribute",
		"cuOccupancyMaxActiveBlocksPerMultiprocessor", "cuStreamCreate"} {
		for _, code := range []int{1, 2, 719} {
			if call == "cuStreamSynchronize" && code != 719 {
				continue // which gives nothing back, because nobody knows what is under way
			}
			seen, first := 0, 1
			switch call { // what ask itself calls once
			case "cuMemAlloc", "cuMemHostAlloc", "cuMemcpyHtoDAsync", "cuStreamSynchronize", "cuStreamCreate":
				first = 2
			}
			for n := first; ; n++ {
				if !strings.Contains(child(t, fmt.Sprint(faultChild, "=", code), fmt.Sprintf("MOCKCUDA_FAIL=%s:%d:%d", call, n, code)), felt) {
					break
				}
				if seen++; code != 1 && seen > 2 {
					break // what passes is tried everywhere, others at the first calls
				}
			}
			if seen == 0 {
				t.Errorf("%s: nobody felt that it failed with %d", call, code)
			}
		}
	}
}

// faulty asks while a call fails.
func faulty(t *testing.T) {
	d := cudatest.Open(t)
	x := ask(t, d, 64, 2, 150)
	before := free(t, d)
	a, err := New(ctx, d)
	if err != nil {
		t.Log(felt, err)
		if a, err = New(ctx, d); err != nil {
			gone(t, d, err)
			return
		}
	}
	failed := 0
	for i := range 3 {
		ask := answer
		if i > 0 {
			ask = answerAll
		}
		got, err := ask(a, x.segments, Warps{4, 4}, x.q, 0)
		if err == nil {
			x.right(t, got)
			continue
		}
		t.Log(felt, err)
		if errors.Is(err, cuda.ErrLost) {
			_, err = x.answer(a)
			gone(t, d, err)
			if err := a.Close(ctx); err != nil {
				t.Fatalf("Close: %v", err)
			}
			return
		}
		if failed++; failed > 1 {
			t.Fatalf("one fault, and another error: %v", err)
		}
	}
	if err := a.Close(ctx); err != nil {
		t.Log(felt, err) // what could not be given back is the driver's
		return
	}
	if after := free(t, d); after != before {
		t.Fatalf("%d bytes free before, %d after", before, after)
	}
}

// gone checks that the device is lost, is said to be, and was meant to be.
func gone(t *testing.T, d *cuda.Device, err error) {
	t.Helper()
	if !errors.Is(err, cuda.ErrLost) || !errors.Is(d.Err(), cuda.ErrLost) || os.Getenv(faultChild) != "719" {
		t.Fatalf("error %v, the device says %v", err, d.Err())
	}
}

// TestLost has segments at addresses that nothing lies at: the kernel loses the device, in a process of its own.
func TestLost(t *testing.T) {
	if os.Getenv(faultChild) == "" {
		cudatest.Open(t)
		child(t, faultChild+"=lost")
		return
	}
	d := cudatest.Open(t)
	a, err := New(ctx, d)
	if err != nil {
		t.Fatal(err)
	}
	h := &tiers.Header{HeadDim: 64, Profile: tiers.ProfileBalanced, Heads: []tiers.HeadInfo{{Body: 50}}}
	tables, err := a.Upload(ctx, NewPlan([]Segment{{Header: h, At: func(int, tiers.Plane) Address { return 64 }}}, Warps{4, 4}))
	if err != nil {
		t.Fatal(err)
	}
	n, err := a.Start(ctx, tables, make([]float32, 64), 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := n.Wait(ctx); !errors.Is(err, cuda.ErrLost) {
		t.Fatalf("error %v", err)
	}
	<-n.Done()
	if _, err := a.Start(ctx, tables, make([]float32, 64), 0); !errors.Is(err, cuda.ErrLost) {
		t.Fatalf("error %v", err)
	}
	if err := a.Close(ctx); err != nil {
		t.Fatal(err)
	}
}
