package kernels

import (
	"context"
	"embed"
	"errors"
	"fmt"
	"math"
	"sync"
	"time"
	"unsafe"

	"kvtier/attention"
	"kvtier/compress"
	"kvtier/tiers/gpu/cuda"
)

//go:embed attend_d64.ptx attend_d128.ptx attend_d256.ptx
//go:embed gather_d64.ptx gather_d128.ptx gather_d256.ptx
//go:embed select_d64.ptx select_d128.ptx select_d256.ptx
//go:embed seal_d64.ptx seal_d128.ptx seal_d256.ptx
var ptx embed.FS

// Threads of a block of the kernels, and what a block of attend does.
const (
	attendThreads = 128
	blockSplits   = attendThreads / 32
	mergeThreads  = 256
	mergeChannels = 32 // that a block of merge does
	warpRows      = 8  // query rows that a warp takes
)

// Attention runs the kernels on a device, in one stream. Safe for concurrent use.
type Attention struct {
	device *cuda.Device
	stream cuda.Stream
	text   func(headDim int) ([]byte, error) // the kernels' PTX
	choose func(headDim int) ([]byte, error) // that of those that choose
	gather func(headDim int) ([]byte, error) // that of those that attend to what was chosen
	// abandoned counts answers that nobody waits for but Close.
	abandoned sync.WaitGroup

	mu struct {
		sync.Mutex
		modules map[int]*module
		idle    []*call
		closed  bool
	}
}

// module holds the kernels of one head dimension.
type module struct {
	m, chooses, gathers           cuda.Module
	attend, low, merge            cuda.Function
	scan, choose, rest            cuda.Function
	chosen, chosenLow             cuda.Function // attend to what was chosen
	shared, lowShared             int           // bytes of a block of attend and of low
	chosenShared, chosenLowShared int
	warps                         Warps
}

// call is the room that one answer needs, used again by the next.
type call struct {
	event  cuda.Event
	host   []byte // pinned: the query, then the answer
	device cuda.Ptr
	size   int // of device
}

// New makes the stream. Kernels are loaded when they are first needed.
func New(ctx context.Context, d *cuda.Device) (*Attention, error) {
	a := &Attention{device: d, text: embedded, choose: embeddedChoosing, gather: embeddedGathering}
	a.mu.modules = map[int]*module{}
	err := d.Do(ctx, func(c *cuda.Context) (err error) {
		a.stream, err = c.NewStream()
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("gpu: %w", err)
	}
	return a, nil
}

// embedded is the PTX that the program came with.
func embedded(headDim int) ([]byte, error) { return text("attend", headDim) }

func embeddedChoosing(headDim int) ([]byte, error) { return text("select", headDim) }

func embeddedGathering(headDim int) ([]byte, error) { return text("gather", headDim) }

func embeddedSealing(headDim int) ([]byte, error) { return text("seal", headDim) }

func text(of string, headDim int) ([]byte, error) {
	b, err := ptx.ReadFile(fmt.Sprintf("%s_d%d.ptx", of, headDim))
	if err != nil {
		return nil, fmt.Errorf("no kernels for head dimension %d", headDim)
	}
	return b, nil
}

// Stream is where the kernels run.
func (a *Attention) Stream() cuda.Stream { return a.stream }

// stageBytes is the shared memory of a step, as attend.cu divides it: lines of keys, so many bytes of values, scales, bins.
func stageBytes(d, values int, low bool) int {
	groups := d / 16
	lines := 2*groups + 2*((groups+3)/4)
	if low {
		lines = 4 * groups
	}
	align := 128
	if d == 256 {
		align = 16
	}
	round := func(n int) int { return (n + align - 1) / align * align }
	return round(lines*2*64+values+96) + round(5*d)
}

// valueBytes is that of a step's values.
func valueBytes(d int, low bool) int {
	if low {
		return 32 * d
	}
	return 32 * d / 2
}

// sharedBytes is the shared memory of a block of attend: query rows, and for each warp the folded words, tables of lines, and some stages.
func sharedBytes(d, depth int, low bool) int {
	return blockBytes(d, low, depth*stageBytes(d, valueBytes(d, low), low))
}

// gatherBytes is that of a block of attend_chosen: two stages without values, the queue's scores, scales and addresses, a batch's values.
func gatherBytes(d int, low bool) int {
	const ring = 3 * 32
	address := 8
	if low {
		address = 16
	}
	return blockBytes(d, low, 2*stageBytes(d, 0, low)+warpRows*(ring+4)*4+ring*(4+address)+valueBytes(d, low))
}

// blockBytes is that of a block whose warps have so many bytes each beside words and tables.
func blockBytes(d int, low bool, warp int) int {
	groups := d / 16
	tables := (20*groups + 127) / 128 * 128
	if low {
		tables = 0
	}
	return warpRows*(d+4)*4 + blockSplits*(groups*256+tables+warp)
}

// Fit says whether the kernels of a head dimension fit a device: a block's shared memory.
func Fit(headDim int, d cuda.Info) bool {
	return max(sharedBytes(headDim, 2, false), sharedBytes(headDim, 2, true), gatherBytes(headDim, false), gatherBytes(headDim, true)) <= d.SharedOptin
}

// load loads the kernels of a head dimension.
func (a *Attention) load(c *cuda.Context, d int) (*module, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.mu.closed {
		return nil, cuda.ErrClosed
	}
	if m := a.mu.modules[d]; m != nil {
		return m, nil
	}
	m := &module{shared: max(sharedBytes(d, 2, false), sharedBytes(d, 1, true)), lowShared: sharedBytes(d, 2, true),
		chosenShared: gatherBytes(d, false), chosenLowShared: gatherBytes(d, true)}
	for _, of := range []struct {
		to   *cuda.Module
		text func(int) ([]byte, error)
	}{{&m.m, a.text}, {&m.chooses, a.choose}, {&m.gathers, a.gather}} {
		text, err := of.text(d)
		if err == nil {
			*of.to, err = c.Load(text)
		}
		if err != nil {
			return nil, errors.Join(err, m.unload())
		}
	}
	for _, f := range []struct {
		to     *cuda.Function
		of     cuda.Module
		name   string
		shared int
	}{{&m.attend, m.m, "attend", m.shared}, {&m.low, m.m, "attend_low", m.lowShared}, {&m.merge, m.m, "merge", 0},
		{&m.scan, m.chooses, "scan", 0}, {&m.choose, m.chooses, "choose", 0}, {&m.rest, m.chooses, "rest", 0},
		{&m.chosen, m.gathers, "attend_chosen", m.chosenShared}, {&m.chosenLow, m.gathers, "attend_chosen_low", m.chosenLowShared}} {
		var err error
		if *f.to, err = f.of.Function(f.name); err == nil && f.shared > 0 {
			err = f.to.SetMaxShared(f.shared)
		}
		if err != nil {
			return nil, errors.Join(err, m.unload())
		}
	}
	for _, f := range []struct {
		to     *int
		f      cuda.Function
		shared int
	}{{&m.warps.Most, m.attend, m.shared}, {&m.warps.Full, m.low, m.lowShared}} {
		blocks, err := f.f.BlocksPerSM(attendThreads, f.shared)
		if err != nil {
			return nil, errors.Join(err, m.unload())
		}
		*f.to = max(1, blocks) * blockSplits * a.device.Info().SMs
	}
	a.mu.modules[d] = m
	return m, nil
}

// unload gives back what was loaded.
func (m *module) unload() (err error) {
	for _, x := range []cuda.Module{m.m, m.chooses, m.gathers} {
		if x != (cuda.Module{}) {
			err = errors.Join(err, x.Unload())
		}
	}
	return err
}

// Warps returns how many warps of attend the device holds at a time, which plans divide work among.
func (a *Attention) Warps(ctx context.Context, headDim int) (warps Warps, err error) {
	err = a.device.Do(ctx, func(c *cuda.Context) error {
		m, err := a.load(c, headDim)
		if err == nil {
			warps = m.warps
		}
		return err
	})
	return warps, err
}

// Upload brings a plan's tables to the device. Free them with FreeTables.
func (a *Attention) Upload(ctx context.Context, p *Plan) (Tables, error) {
	var at cuda.Ptr
	err := a.device.Do(ctx, func(c *cuda.Context) (err error) {
		pinned, err := c.HostAlloc(p.tableBytes())
		if err != nil {
			return err
		}
		clear(pinned[copy(pinned, p.tables):])
		if p.choice != nil {
			copy(pinned[p.choiceAt():], p.choice.tables)
		}
		if at, err = c.Alloc(len(pinned)); err == nil {
			if err = c.CopyToDevice(at, pinned, a.stream); err != nil {
				err = errors.Join(err, c.Free(at))
			} else if err = a.stream.Synchronize(); err != nil {
				return err // nobody knows what is under way: all stays taken
			}
		}
		return errors.Join(err, c.HostFree(pinned))
	})
	return Tables{p, at}, err
}

// Tables are a plan's tables in device memory.
type Tables struct {
	plan *Plan
	at   cuda.Ptr
}

// Plan returns whose tables they are.
func (t Tables) Plan() *Plan { return t.plan }

// Bytes is the room that they take.
func (t Tables) Bytes() int { return t.plan.tableBytes() }

// FreeTables gives the room back, when what was started has been done.
func (a *Attention) FreeTables(ctx context.Context, t Tables) error {
	return a.device.Do(ctx, func(c *cuda.Context) error {
		if err := a.stream.Synchronize(); err != nil {
			return err
		}
		return c.Free(t.at)
	})
}

// layout of a call's room in device memory, in bytes, each part aligned.
type layout struct {
	q, ml, out, mergedML, merged, mergedErrors, end int
	choosing
}

// layout is that of a call that chooses, or does not.
func (t Tables) layout(rows int, chooses bool) (l layout) {
	p, at := t.plan, 0
	next := func(n int) int { from := at; at += (n + 255) &^ 255; return from }
	d, splits := p.HeadDim, p.ends[full]
	l.q = next(4 * p.Heads * rows * d)
	if chooses {
		splits = p.choice.end
		l.choosing = p.choice.layout(rows, next)
	}
	l.ml = next(8 * splits * rows)
	l.out = next(4 * splits * rows * d)
	l.mergedML = at // one copy brings all that follows to the host
	l.merged = l.mergedML + 8*p.Heads*rows
	l.mergedErrors = l.merged + 4*p.Heads*rows*d
	l.end = l.mergedErrors
	if chooses {
		l.end += unreadBytes * p.Heads * rows
	}
	return l
}

// Answer is one that is under way.
type Answer struct {
	a    *Attention
	call *call
	t    Tables
	rows int
	l    layout
	done chan struct{} // closed when the device has done with it

	chooses bool
	share   uint32
	unread  []Unread
}

// Start begins to attend to everything: q is [heads][rows][HeadDim], scaled. The segments of the plan have to stay where they are until Done, and there
// has to be a Wait.
func (a *Attention) Start(ctx context.Context, t Tables, q []float32, softcap float32) (*Answer, error) {
	return a.StartChoosing(ctx, t, q, softcap, Everything)
}

// StartChoosing begins to attend to that share, in 2^-16, of each head's pages that weighs most in any row by the first plane of keys, and of these to
// tokens that weigh as much as those of the least page that was chosen; means stand for the others (Unread). What is not whole pages of a body is attended in any case. Where Plan.Chooses says no, everything is. There are up to MostRows rows.
func (a *Attention) StartChoosing(ctx context.Context, t Tables, q []float32, softcap float32, share uint32) (*Answer, error) {
	p := t.plan
	row := p.Heads * p.HeadDim
	if len(q) == 0 || len(q)%row != 0 {
		return nil, fmt.Errorf("gpu: a query of %d numbers for %d heads of %d", len(q), p.Heads, p.HeadDim)
	}
	n := &Answer{a: a, t: t, rows: len(q) / row, done: make(chan struct{}), chooses: p.Chooses(share), share: share}
	if n.chooses && n.rows > MostRows {
		return nil, fmt.Errorf("gpu: %d rows choose together, more than %d", n.rows, MostRows)
	}
	n.l = t.layout(n.rows, n.chooses)
	err := a.device.Do(ctx, func(c *cuda.Context) (err error) {
		m, err := a.load(c, p.HeadDim)
		if err != nil {
			return err
		}
		if n.call, err = a.room(c, n.l.end, n.l.end-n.l.mergedML+n.l.ml); err != nil {
			return err
		}
		err = n.issue(c, m, q, softcap)
		if err == nil {
			return nil
		}
		if e := a.stream.Synchronize(); e != nil { // what was issued before uses the room
			return errors.Join(err, e)
		}
		return errors.Join(err, n.call.drop(c))
	})
	if err != nil {
		return nil, fmt.Errorf("gpu: attend: %w", err)
	}
	return n, nil
}

// room returns a call's room, of at least so many bytes on the device and pinned on the host.
func (a *Attention) room(c *cuda.Context, device, host int) (x *call, err error) {
	a.mu.Lock()
	if n := len(a.mu.idle); n > 0 {
		x = a.mu.idle[n-1]
		a.mu.idle = a.mu.idle[:n-1]
	}
	a.mu.Unlock()
	if x != nil && x.size >= device && len(x.host) >= host {
		return x, nil
	}
	if x != nil {
		if err := x.drop(c); err != nil {
			return nil, err
		}
	}
	x = &call{}
	if x.event, err = c.NewEvent(false); err != nil {
		return nil, err
	}
	if x.host, err = c.HostAlloc(host); err == nil {
		x.size = device
		if x.device, err = c.Alloc(device); err != nil {
			err = errors.Join(err, c.HostFree(x.host))
		}
	}
	if err != nil {
		return nil, errors.Join(err, x.event.Destroy())
	}
	return x, nil
}

func (x *call) drop(c *cuda.Context) error {
	return errors.Join(c.Free(x.device), c.HostFree(x.host), x.event.Destroy())
}

func (n *Answer) issue(c *cuda.Context, m *module, q []float32, softcap float32) error {
	l, x, s := n.l, n.call, n.a.stream
	copy(floats(x.host), q)
	if err := c.CopyToDevice(x.device+cuda.Ptr(l.q), x.host[:4*len(q)], s); err != nil {
		return err
	}
	if err := n.launch(c, m, softcap); err != nil {
		return err
	}
	if err := c.CopyToHost(x.host[l.ml:][:l.end-l.mergedML], x.device+cuda.Ptr(l.mergedML), s); err != nil {
		return err
	}
	return x.event.Record(s)
}

// launch starts the kernels.
func (n *Answer) launch(c *cuda.Context, m *module, softcap float32) error {
	if n.chooses {
		return n.launchChosen(c, m, softcap)
	}
	p, tables := n.t.plan, uint64(n.t.at)
	units, splits := tables+uint64(p.units), tables+uint64(p.splits)
	if err := n.attend(c, m.attend, m.shared, units, splits, 0, p.ends[most], softcap, uint64(p.ends[drains]/blockSplits)); err != nil {
		return err
	}
	if err := n.attend(c, m.low, m.lowShared, units, splits, p.ends[most], p.ends[full], softcap); err != nil {
		return err
	}
	return n.merge(c, m, tables+uint64(p.ranges), 0, 0)
}

// attend starts a kernel of attend.cu for splits [first, end).
func (n *Answer) attend(c *cuda.Context, f cuda.Function, shared int, units, splits uint64, first, end int, softcap float32, more ...uint64) error {
	if first == end {
		return nil
	}
	l, room := n.l, uint64(n.call.device)
	grid := [3]int{(end - first) / blockSplits, (n.rows + warpRows - 1) / warpRows, 1}
	args := []uint64{uint64(n.t.at), units, splits, room + uint64(l.q), room + uint64(l.ml), room + uint64(l.out),
		uint64(first), uint64(n.rows), uint64(math.Float32bits(softcap))}
	return c.Launch(f, grid, [3]int{attendThreads, 1, 1}, shared, n.a.stream, append(args, more...)...)
}

// merge starts the kernel that makes one partial of a head's splits: those of ranges. errors, if there are any, are of the splits from first on.
func (n *Answer) merge(c *cuda.Context, m *module, ranges, errors uint64, first int) error {
	p, l, room := n.t.plan, n.l, uint64(n.call.device)
	return c.Launch(m.merge, [3]int{p.Heads * n.rows * p.HeadDim / mergeChannels, 1, 1}, [3]int{mergeThreads, 1, 1}, 0, n.a.stream,
		ranges, room+uint64(l.ml), room+uint64(l.out), room+uint64(l.mergedML), room+uint64(l.merged), uint64(n.rows),
		errors, room+uint64(l.mergedErrors), uint64(first))
}

// Time returns how many µs the kernels take on the device to attend as StartChoosing says, n times one after the other.
func (a *Attention) Time(ctx context.Context, t Tables, q []float32, softcap float32, share uint32, n int) (us []float64, err error) {
	x, err := a.StartChoosing(ctx, t, q, softcap, share)
	if err != nil {
		return nil, err
	}
	err = a.device.Do(ctx, func(c *cuda.Context) error {
		m, err := a.load(c, t.plan.HeadDim)
		for i := 0; i < n && err == nil; i++ {
			var d time.Duration
			d, err = c.Timed(a.stream, func() error { return x.launch(c, m, softcap) })
			us = append(us, float64(d)/1e3)
		}
		return err
	})
	_, e := x.Wait(ctx) // until then the room is this answer's
	return us, errors.Join(err, e)
}

// Done is closed when the device has done with the answer, or is lost: nothing of the segments is read for it any more. This is so when Wait
// returns, unless its ctx ended first.
func (n *Answer) Done() <-chan struct{} { return n.done }

// Wait returns the partials, [heads][rows]. It is called once. If ctx ends before, the answer is given up: it goes on until Done.
func (n *Answer) Wait(ctx context.Context) ([]attention.Partial, error) {
	if err := n.a.device.Wait(ctx, n.call.event); err != nil {
		n.abandon()
		return nil, fmt.Errorf("gpu: attend: %w", err)
	}
	ps := n.partials()
	n.free()
	for i := range ps {
		if err := finite(&ps[i]); err != nil {
			return nil, fmt.Errorf("gpu: attend: %w", err)
		}
	}
	return ps, nil
}

// abandon waits for an answer in the place of who asked for it, so that its room can be used again.
func (n *Answer) abandon() {
	n.a.abandoned.Go(func() {
		switch err := n.a.device.Wait(context.Background(), n.call.event); {
		case err == nil:
			n.free()
		case errors.Is(err, cuda.ErrLost): // nothing is under way any more
			close(n.done)
		} // else nobody knows: the room stays taken
	})
}

// free lets the next answer have the room.
func (n *Answer) free() {
	n.a.mu.Lock()
	n.a.mu.idle = append(n.a.mu.idle, n.call)
	n.a.mu.Unlock()
	close(n.done)
}

// partials reads what the device wrote.
func (n *Answer) partials() []attention.Partial {
	p, l := n.t.plan, n.l
	b := n.call.host[l.ml:]
	ml, out := floats(b), floats(b[l.merged-l.mergedML:])
	ps := attention.NewPartials(p.Heads*n.rows, p.HeadDim)
	for i := range ps {
		x := &ps[i]
		x.Max, x.Sum = float32(float64(ml[2*i])*math.Ln2), float64(ml[2*i+1])
		copy(x.Out, out[i*p.HeadDim:])
		compress.Unrotate(x.Out, p.HeadDim)
	}
	if n.chooses {
		n.unread = unreadOf(floats(b[l.mergedErrors-l.mergedML : l.end-l.mergedML]))
	}
	return ps
}

// finite is an error for an answer that is no number.
func finite(p *attention.Partial) error {
	sum := p.Max + float32(p.Sum)
	for _, x := range p.Out {
		sum += x * 0
	}
	if sum-sum != 0 {
		return errors.New("the answer is not finite")
	}
	return nil
}

// Close gives everything back, when all answers are done: those that were given up too. Of a device that is lost nothing can be given back.
func (a *Attention) Close(ctx context.Context) error {
	a.abandoned.Wait()
	err := a.device.Do(ctx, func(c *cuda.Context) error {
		a.mu.Lock()
		defer a.mu.Unlock()
		if a.mu.closed {
			return nil
		}
		a.mu.closed = true
		var err error
		for _, x := range a.mu.idle {
			err = errors.Join(err, x.drop(c))
		}
		for _, m := range a.mu.modules {
			err = errors.Join(err, m.unload())
		}
		a.mu.idle, a.mu.modules = nil, nil
		return errors.Join(err, a.stream.Destroy())
	})
	if errors.Is(err, cuda.ErrLost) {
		return nil
	}
	return err
}

// floats sees bytes, which are aligned, as float32.
func floats(b []byte) []float32 {
	return unsafe.Slice((*float32)(unsafe.Pointer(unsafe.SliceData(b))), len(b)/4)
}
