// Package gpu measures attention in device memory: a self-test against the Go
// loop, what the device's memory and its link give, and what the kernels reach of it. And
// sealing on the device, which has to give the host's bytes.
package gpu

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"time"

	"kvtier/bench/stats"
	"kvtier/server/sparse"
	"kvtier/tiers"
	"kvtier/tiers/gpu/cuda"
	"kvtier/tiers/gpu/kernels"
)

// Options of a measurement; zero values are defaults.
type Options struct {
	Device  int
	Tokens  []int // lengths, in whole segments of 2,048; 8Ki to 1Mi
	Repeats int   // of each; 50
	Seed    uint64
	Sealing bool // sealing alone, after the self-test
	Short   bool // small shapes alone: for an emulated device
	Say     func(format string, args ...any)
}

func (o *Options) fill() {
	if len(o.Tokens) == 0 {
		o.Tokens = []int{8 << 10, 32 << 10, 128 << 10, 512 << 10, 1 << 20}
	}
	if o.Repeats == 0 {
		o.Repeats = 50
	}
	if o.Say == nil {
		o.Say = func(string, ...any) {}
	}
}

func (o *Options) check() error {
	for i, n := range o.Tokens {
		if n < tiers.SegmentTokens || n%tiers.SegmentTokens != 0 || i > 0 && n <= o.Tokens[i-1] {
			return fmt.Errorf("lengths %v: they have to be multiples of %d, ascending", o.Tokens, tiers.SegmentTokens)
		}
	}
	if o.Repeats < 1 {
		return fmt.Errorf("%d repeats: at least one", o.Repeats)
	}
	if o.Device < 0 {
		return fmt.Errorf("device %d: they are numbered from 0", o.Device)
	}
	return nil
}

// Report is what was measured.
type Report struct {
	Info     cuda.Info
	SelfTest []Checked
	Copies   []Copy
	Rows     []Row
	Sealed   []Sealed
}

// Copy is how fast bytes are copied: by the device's clock, or, of segments, by the host's.
type Copy struct {
	What  string
	Bytes int
	GBs   stats.Spread // 10^9 bytes a second; on the device, those read and those written
}

// Row is attention of one layer.
type Row struct {
	HeadDim, Heads, Group, Tokens int
	Profile                       string
	Read                          float64 // share of the pages that is read; 1: everything, else pages are chosen
	Bytes                         int64
	Kernel                        stats.Spread // µs on the device
	Answer                        stats.Spread // µs from the query in host memory to the partials there
	GBs                           float64      // bytes over the median kernel time
	OfMemory                      float64      // that over what a copy on the device reads and writes
}

// Failed lists the self-tests that did.
func (r *Report) Failed() (out []Checked) {
	for _, c := range r.SelfTest {
		if c.Fail != "" {
			out = append(out, c)
		}
	}
	return out
}

// Measure tests and measures a device.
func Measure(ctx context.Context, o Options) (rep *Report, err error) {
	o.fill()
	if err := o.check(); err != nil {
		return nil, err
	}
	d, err := cuda.Open(o.Device)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	rep = &Report{Info: d.Info()}
	o.Say("%+v", rep.Info)
	if rep.SelfTest, err = SelfTest(ctx, d, o.Short, o.Say); err != nil {
		return rep, err
	}
	if o.Sealing {
		return rep, rep.seal(ctx, d, &o)
	}
	if rep.Copies, err = bringUp(ctx, &o); err != nil {
		return rep, fmt.Errorf("bring up: %w", err)
	}
	plain, err := copies(ctx, d, &o)
	if rep.Copies = append(rep.Copies, plain...); err != nil {
		return rep, err
	}
	for _, s := range []struct {
		d, heads, group int
		profile         string
	}{{128, 8, 4, "balanced"}, {128, 8, 8, "balanced"}, {64, 3, 3, "balanced"}, {256, 1, 4, "balanced"}, {128, 8, 4, "neutral"}} {
		rows, err := attend(ctx, d, &o, s.d, s.heads, s.group, s.profile, rep.memory())
		rep.Rows = append(rep.Rows, rows...)
		if err != nil {
			return rep, err
		}
	}
	return rep, rep.seal(ctx, d, &o)
}

// seal measures sealing.
func (r *Report) seal(ctx context.Context, d *cuda.Device, o *Options) error {
	for _, s := range []struct {
		d, heads int
		profile  string
	}{{128, 8, "balanced"}, {128, 8, "neutral"}, {64, 3, "balanced"}, {256, 1, "balanced"}} {
		sealed, err := sealing(ctx, d, o, s.d, s.heads, s.profile)
		r.Sealed = append(r.Sealed, sealed...)
		if err != nil {
			return fmt.Errorf("seal: %w", err)
		}
	}
	return nil
}

// memory is what a copy on the device reads and writes, GB/s.
func (r *Report) memory() float64 { return r.Copies[len(r.Copies)-1].GBs.Median }

// copies measures the link in both directions, and the device's memory.
func copies(ctx context.Context, d *cuda.Device, o *Options) (out []Copy, err error) {
	size, large := 64<<20, 2<<30
	if o.Short {
		size, large = 1<<16, 1<<16
	}
	err = d.Do(ctx, func(c *cuda.Context) error {
		pinned, err := c.HostAlloc(size)
		if err != nil {
			return err
		}
		clear(pinned)
		a, err := c.Alloc(2 * large)
		if err != nil {
			return errors.Join(err, c.HostFree(pinned))
		}
		b := a + cuda.Ptr(large)
		s, err := c.NewStream()
		if err != nil {
			return errors.Join(err, c.HostFree(pinned), c.Free(a))
		}
		err = c.Set(a, 1, 2*large, s)
		for _, w := range []struct {
			what  string
			bytes int
			moved int
			do    func() error
		}{
			{"host to device, pinned", size, size, func() error { return c.CopyToDevice(a, pinned, s) }},
			{"device to host, pinned", size, size, func() error { return c.CopyToHost(pinned, a, s) }},
			{"on the device", large, 2 * large, func() error { return c.CopyOnDevice(b, a, large, s) }},
		} {
			if err != nil {
				break
			}
			var us []float64
			us, err = timed(c, s, o.Repeats, w.do)
			var gbs []float64
			for _, t := range us {
				gbs = append(gbs, float64(w.moved)/t/1e3)
			}
			out = append(out, Copy{w.what, w.bytes, stats.SpreadOf(gbs)})
		}
		return errors.Join(err, s.Destroy(), c.Free(a), c.HostFree(pinned))
	})
	return out, err
}

// timed returns how many µs each of n runs takes on the device; two before them are not counted.
func timed(c *cuda.Context, s cuda.Stream, n int, do func() error) (us []float64, err error) {
	for range n + 2 {
		t, err := c.Timed(s, do)
		if err != nil {
			return nil, err
		}
		us = append(us, float64(t)/1e3)
	}
	return us[2:], nil
}

// attend measures one shape at all lengths. A few segments are made and copied to as many places as the length has.
func attend(ctx context.Context, d *cuda.Device, o *Options, headDim, heads, group int, profile string, memory float64) (rows []Row, err error) {
	made := 4
	if o.Short {
		made = 1
	}
	l, err := makeLayer(ctx, slices.Repeat([]int{tiers.SegmentTokens}, made), heads, headDim, profileOf(profile), profile == "neutral", o.Seed)
	if err != nil {
		return nil, err
	}
	a, err := kernels.New(ctx, d)
	if err != nil {
		return nil, err
	}
	res := &resident{device: d}
	defer func() {
		ctx := context.WithoutCancel(ctx)
		err = errors.Join(err, a.Close(ctx), res.free(ctx))
	}()
	warps, err := a.Warps(ctx, headDim)
	if err != nil {
		return nil, err
	}
	var segments []kernels.Segment
	for _, tokens := range o.Tokens {
		for len(segments) < tokens/tiers.SegmentTokens {
			i := len(segments) % made
			s, err := res.upload(ctx, l.segments[i], l.pieces[i])
			if errors.Is(err, cuda.ErrOutOfMemory) {
				return rows, nil
			}
			if err != nil {
				return rows, err
			}
			segments = append(segments, s)
		}
		for _, share := range []uint32{kernels.Everything, kernels.Everything / 5} {
			row, err := length(ctx, a, o, l, segments, warps, group, share)
			if err != nil {
				return rows, fmt.Errorf("%d tokens: %w", tokens, err)
			}
			row.HeadDim, row.Heads, row.Group, row.Tokens, row.Profile = headDim, heads, group, tokens, profile
			row.OfMemory = row.GBs / memory
			o.Say("d %d, %d heads, group %d, %s, %d tokens, %.2f of the pages: kernels %.0f µs, %.0f GB/s, %.2f of memory; answer %.0f µs", headDim, heads, group,
				profile, tokens, row.Read, row.Kernel.Median, row.GBs, row.OfMemory, row.Answer.Median)
			rows = append(rows, row)
		}
	}
	return rows, nil
}

// length measures attention to segments, of a share of whose pages everything is read.
func length(ctx context.Context, a *kernels.Attention, o *Options, l *layer, segments []kernels.Segment, warps kernels.Warps, group int, share uint32) (row Row, err error) {
	t, err := a.Upload(ctx, kernels.NewPlan(segments, warps))
	if err != nil {
		return row, err
	}
	defer func() { err = errors.Join(err, a.FreeTables(context.WithoutCancel(ctx), t)) }()
	rng := rand.New(rand.NewPCG(o.Seed, uint64(len(segments))))
	q := l.queries(group, 2, rng)
	var wall []float64
	var unread []kernels.Unread
	for i := range o.Repeats + 2 {
		begin := time.Now()
		n, err := a.StartChoosing(ctx, t, q, 0, share)
		if err != nil {
			return row, err
		}
		got, err := n.Wait(ctx)
		if err != nil {
			return row, err
		}
		unread = n.Unread()
		if us := float64(time.Since(begin)) / 1e3; i >= 2 {
			wall = append(wall, us)
		}
		if i == 0 && share == kernels.Everything { // the same segments, each several times
			var same []sparse.Segment
			for j := range segments {
				same = append(same, l.segments[j%len(l.segments)])
			}
			if len(same) <= 16 {
				want, err := l.loop(ctx, same, q, 0)
				if err != nil {
					return row, err
				}
				c := Checked{Shape: Shape{HeadDim: l.d, Rows: group}}
				if c.compare(got, want); c.Fail != "" {
					return row, errors.New(c.Fail)
				}
			}
		}
	}
	us, err := a.Time(ctx, t, q, 0, share, o.Repeats+2)
	if err != nil {
		return row, err
	}
	_, _, _, row.Bytes = t.Plan().Cost(group, share, unread)
	row.Read = float64(share) / kernels.Everything
	row.Kernel, row.Answer = stats.SpreadOf(us[2:]), stats.SpreadOf(wall)
	row.GBs = float64(row.Bytes) / row.Kernel.Median / 1e3
	return row, nil
}
