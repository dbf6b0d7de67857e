package kernels

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"runtime"
	"slices"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/cpu"

	"kvtier/attention"
	"kvtier/compress"
	"kvtier/tiers"
	"kvtier/tiers/gpu/cuda"
	"kvtier/tiers/seal"
)

// Sealing makes segments on a device: the same bytes as seal.Segment on an amd64 host. Safe for concurrent use.
type Sealing struct {
	device *cuda.Device
	stream cuda.Stream
	text   func(headDim int) ([]byte, error) // the kernels' PTX
	most   int                               // bytes of device memory that a batch may take, if it is more than one layer
	rooms  chan *sealRoom

	mu struct {
		sync.Mutex
		modules map[int]*sealModule
		closed  bool
	}
}

const (
	// sealBytes is what two batches, one of which computes while the host assembles the other, take of device memory, unless a layer takes
	// more: a gibibyte is 18 layers of 8 heads of dimension 128, a block for each multiprocessor. And no more than one in sealShare bytes.
	sealBytes   = 2 << 30
	sealShare   = 16
	sealBatches = 2
)

// Steps of sealing, each a kernel of seal.cu.
var sealKernels = []string{"widen", "centre", "apply", "apart", "split", "stray", "gather", "arrange", "feed", "code", "quantise", "means", "mean_keys", "deviate", "felt", "spreads", "products", "pack", "unpack", "attend_rows"}

type sealModule struct {
	m cuda.Module
	f map[string]cuda.Function
}

// sealRoom is the memory of a batch, used again by the next.
type sealRoom struct {
	event         cuda.Event
	made          bool
	in, out       []byte // pinned
	device        cuda.Ptr
	size          int
	begin, finish cuda.Event // with timing
}

// NewSealing makes the stream. Kernels are loaded, and memory is allocated, when they are first needed.
func NewSealing(ctx context.Context, d *cuda.Device) (*Sealing, error) {
	s := &Sealing{device: d, text: embeddedSealing, most: int(min(sealBytes, d.Info().Memory/sealShare)) / sealBatches, rooms: make(chan *sealRoom, sealBatches)}
	s.mu.modules = map[int]*sealModule{}
	for range sealBatches {
		s.rooms <- &sealRoom{}
	}
	err := d.Do(ctx, func(c *cuda.Context) (err error) {
		s.stream, err = c.NewStream()
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("gpu: %w", err)
	}
	return s, nil
}

// Seals says whether a segment of such rows is made on a device. On other platforms than amd64 the host's sums differ in last bits.
func Seals(r *seal.Rows, o *seal.Options) bool {
	n := r.Tokens()
	return runtime.GOARCH == "amd64" && slices.Contains(HeadDims, r.HeadDim) && r.Type.Size() > 0 && n > o.Sinks && n <= tiers.SegmentTokens && r.Heads > 0
}

func (s *Sealing) load(c *cuda.Context, d int) (*sealModule, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.mu.closed {
		return nil, cuda.ErrClosed
	}
	if m := s.mu.modules[d]; m != nil {
		return m, nil
	}
	text, err := s.text(d)
	if err != nil {
		return nil, err
	}
	m := &sealModule{f: map[string]cuda.Function{}}
	if m.m, err = c.Load(text); err != nil {
		return nil, err
	}
	for _, name := range sealKernels {
		if m.f[name], err = m.m.Function(name); err != nil {
			return nil, errors.Join(err, m.m.Unload())
		}
	}
	s.mu.modules[d] = m
	return m, nil
}

// SealedSegment is a segment that was made.
type SealedSegment struct {
	Header *tiers.Header
	Parts  [tiers.NumParts][]byte
}

// SealTimes is how long the device took, of all batches.
type SealTimes struct{ Kernels time.Duration }

// Keep says where planes of a segment are to stay on the device, [heads], each the address of as many bytes as the header says, or 0; nil: nowhere.
// Only those that the device made stay. It is asked once a segment, by several goroutines.
type Keep func(h *tiers.Header) [][tiers.NumPlanes]cuda.Ptr

// Seal makes the segments of layers of one span, which are alike: of so many heads, tokens and sinks, of one type, profile, and number of queries. An error is
// the device's, and of all of them. When ctx ends, nothing more is begun. Without keep nothing stays on the device.
func (s *Sealing) Seal(ctx context.Context, rows []*seal.Rows, options []seal.Options, keep Keep) ([]SealedSegment, error) {
	out, _, err := s.seal(ctx, rows, options, keep, false)
	return out, err
}

// SealTimed is Seal that also says what the kernels took, by the device's clock.
func (s *Sealing) SealTimed(ctx context.Context, rows []*seal.Rows, options []seal.Options) ([]SealedSegment, SealTimes, error) {
	return s.seal(ctx, rows, options, nil, true)
}

func (s *Sealing) seal(ctx context.Context, rows []*seal.Rows, options []seal.Options, keep Keep, timed bool) ([]SealedSegment, SealTimes, error) {
	var times SealTimes
	if len(rows) == 0 {
		return nil, times, nil
	}
	if err := alike(rows, options); err != nil {
		return nil, times, fmt.Errorf("gpu: seal: %w", err)
	}
	for i := range rows {
		if !Seals(rows[i], &options[i]) {
			return nil, times, errors.New("gpu: seal: rows that there are no kernels for")
		}
	}
	out := make([]SealedSegment, len(rows))
	one := newSealPlan(rows[:1], options[:1])
	layers := min(max(1, s.most/one.device), 65535/rows[0].Heads)
	var mu sync.Mutex
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(sealBatches)
	for lo := 0; lo < len(rows); lo += layers {
		hi := min(lo+layers, len(rows))
		g.Go(func() error {
			if err := gctx.Err(); err != nil {
				return err
			}
			took, err := s.batch(gctx, out[lo:hi], rows[lo:hi], options[lo:hi], keep, timed)
			mu.Lock()
			times.Kernels += took
			mu.Unlock()
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return nil, times, fmt.Errorf("gpu: seal: %w", err)
	}
	return out, times, nil
}

// alike says what keeps layers from being made together.
func alike(rows []*seal.Rows, options []seal.Options) error {
	if len(options) != len(rows) {
		return fmt.Errorf("options of %d layers for %d", len(options), len(rows))
	}
	r, o := rows[0], options[0]
	for i, x := range rows {
		y := options[i]
		if x.Heads != r.Heads || x.HeadDim != r.HeadDim || x.Type != r.Type || len(x.K) != len(r.K) || len(x.V) != len(x.K) ||
			y.Sinks != o.Sinks || y.Profile != o.Profile || y.Low != o.Low || queryRows(&y, x.HeadDim) != queryRows(&o, r.HeadDim) {
			return errors.New("layers that are not alike")
		}
		if len(y.Metrics) != x.Heads || len(y.Queries) != 0 && len(y.Queries) != x.Heads {
			return fmt.Errorf("%d metrics and %d lists of queries for %d heads", len(y.Metrics), len(y.Queries), x.Heads)
		}
		for _, q := range y.Queries {
			if len(q) != len(y.Queries[0]) {
				return errors.New("heads with different numbers of queries")
			}
		}
	}
	return nil
}

func queryRows(o *seal.Options, d int) int {
	if len(o.Queries) == 0 {
		return 0
	}
	return len(o.Queries[0]) / d
}

// sealBatch is struct Batch of seal.cu: addresses, once the room is known, and places inside a job's output.
type sealBatch struct {
	RawK, RawV, Weights, Moments, Weighted, Normals, Queries uint64
	A, B, C, E, F                                            uint64
	Tokens, Proj, Mean, PageMeans, Bins, Places              uint64
	Codes, Feedback, FeedsBack                               uint64
	Out, OutBytes                                            uint64
	Order, Steps                                             uint64
	Keys                                                     [compress.NumKeyPlanes]uint64
	Values, LowValues, Drains, Pages                         uint64
	Exponent, Products, Partials                             uint64
	Rows, Sinks, Heads, Type                                 uint64
	Stored, Body, Splits, QueryRows, Low                     uint64
}

// sealNode is struct Node of seal.cu.
type sealNode struct{ From, Count, Left, Vector uint32 }

// sealLevel is divisions that are made at once.
type sealLevel struct{ first, count int }

// sealPlan is where a batch's data lie, and what is launched.
type sealPlan struct {
	d, jobs, layers int
	tokens, drains  int // stored; set apart first
	view            seal.View
	b               sealBatch // places in the room, until they are made addresses
	nodes           []sealNode
	unlike, stored  []sealLevel
	nodesAt         int
	in, out, device int // bytes: of what comes from the host, of what goes back, of the whole room
}

func newSealPlan(rows []*seal.Rows, options []seal.Options) *sealPlan {
	r, o := rows[0], &options[0]
	d, n := r.HeadDim, r.Tokens()-o.Sinks
	body, drains := attention.Grouping(n)
	p := &sealPlan{d: d, layers: len(rows), jobs: len(rows) * r.Heads, tokens: n, drains: drains}
	p.view = seal.View{D: d, Info: tiers.HeadInfo{Body: body, Outliers: n - body, Sinks: o.Sinks}}
	unlike, stored := attention.Splits(n)
	p.unlike = p.addLevels(unlike, 0)
	p.stored = p.addLevels(stored, len(unlike))
	splits := len(unlike) + len(stored)
	queries := queryRows(o, d)
	b := &p.b
	b.Rows, b.Sinks, b.Heads, b.Type = uint64(r.Tokens()), uint64(o.Sinks), uint64(r.Heads), uint64(r.Type)
	b.Stored, b.Body, b.Splits, b.QueryRows = uint64(n), uint64(body), uint64(splits), uint64(queries)
	if o.KeepsLow() {
		b.Low = 1
	}
	at := 0
	place := func(to *uint64, bytes int) {
		*to = uint64(at)
		at += (bytes + 255) &^ 255
	}
	// Of a job's output.
	place(&b.Order, 2*n)
	place(&b.Steps, compress.KeyOrderBytes(d)+p.view.StepGroups()*compress.KeyStepsBytes(d))
	for i, size := range compress.KeyPlaneBytes(d) {
		if i < 4 || b.Low == 1 {
			place(&b.Keys[i], p.view.Leaves()*size)
		}
	}
	row := compress.ValueRowBytes(d)
	place(&b.Values, n*(row+compress.ValueScaleBytes))
	place(&b.LowValues, int(b.Low)*n*row)
	place(&b.Drains, p.view.DrainKeys().Len+drains*row)
	place(&b.Pages, p.view.PagesBytes())
	place(&b.Exponent, 4)
	place(&b.Products, 2*8*d*d)
	place(&b.Partials, 2*queries*(8+4*d))
	b.OutBytes = uint64(at)
	// From the host.
	at = 0
	var batch, nodes uint64
	place(&batch, int(unsafe.Sizeof(*b)))
	place(&nodes, len(p.nodes)*int(unsafe.Sizeof(sealNode{})))
	p.nodesAt = int(nodes)
	place(&b.RawK, p.layers*len(r.K))
	place(&b.RawV, p.layers*len(r.V))
	place(&b.Weights, p.jobs*4*d*d)
	place(&b.Moments, p.jobs*4*d*d)
	place(&b.Weighted, p.jobs)
	place(&b.Normals, p.jobs*splits*d*4)
	place(&b.Queries, p.jobs*queries*d*4)
	p.in = at
	// On the device alone.
	for _, to := range []*uint64{&b.A, &b.B, &b.C, &b.E, &b.F} {
		place(to, p.jobs*n*d*4)
	}
	place(&b.Tokens, p.jobs*n*2)
	place(&b.Proj, p.jobs*n*4)
	place(&b.Mean, p.jobs*d*4)
	place(&b.PageMeans, p.jobs*p.view.Pages()*d*4)
	place(&b.Bins, p.jobs*p.view.StepGroups()*3*d*4)
	place(&b.Places, p.jobs*(d+d/4))
	place(&b.Codes, p.jobs*n*d)
	place(&b.Feedback, p.jobs*d*d*4)
	place(&b.FeedsBack, p.jobs*4)
	p.out = p.jobs * int(b.OutBytes)
	place(&b.Out, p.out)
	p.device = at
	return p
}

// addLevels sorts divisions by how many others each waits for: those of a level are of different tokens. from is the number of the first one's direction.
func (p *sealPlan) addLevels(splits []attention.Split, from int) (levels []sealLevel) {
	depth := make([]int, p.tokens) // of places: how many divisions they are in so far
	byDepth := [][]sealNode{}
	for i, x := range splits {
		d := depth[x.From]
		if d == len(byDepth) {
			byDepth = append(byDepth, nil)
		}
		byDepth[d] = append(byDepth[d], sealNode{uint32(x.From), uint32(x.Count), uint32(x.Left), uint32(from + i)})
		for t := x.From; t < x.From+x.Count; t++ {
			depth[t] = d + 1
		}
	}
	for _, nodes := range byDepth {
		levels = append(levels, sealLevel{len(p.nodes), len(nodes)})
		p.nodes = append(p.nodes, nodes...)
	}
	return levels
}

// fill writes what comes from the host; base is the room's address.
func (p *sealPlan) fill(to []byte, base cuda.Ptr, rows []*seal.Rows, options []seal.Options) {
	b := p.b
	for _, at := range []*uint64{&b.RawK, &b.RawV, &b.Weights, &b.Moments, &b.Weighted, &b.Normals, &b.Queries, &b.A, &b.B, &b.C, &b.E, &b.F,
		&b.Tokens, &b.Proj, &b.Mean, &b.PageMeans, &b.Bins, &b.Places, &b.Codes, &b.Feedback, &b.FeedsBack, &b.Out} {
		*at += uint64(base)
	}
	clear(to[:p.b.RawK])
	encode(to, &b)
	encode(to[p.nodesAt:], p.nodes)
	var g errgroup.Group
	for l, r := range rows {
		g.Go(func() error {
			copy(to[int(p.b.RawK)+l*len(r.K):], r.K)
			copy(to[int(p.b.RawV)+l*len(r.V):], r.V)
			for h, m := range options[l].Metrics {
				job, square := l*r.Heads+h, p.d*p.d
				matrix := func(at uint64, n int) []float32 { return floats(to[int(at)+job*n*4:][:n*4]) }
				clear(matrix(p.b.Weights, square))
				copy(matrix(p.b.Weights, square), m.W)
				copy(matrix(p.b.Moments, square), m.C)
				to[int(p.b.Weighted)+job] = 0
				if m.W != nil {
					to[int(p.b.Weighted)+job] = 1
				}
				attention.Directions(matrix(p.b.Normals, int(p.b.Splits)*p.d), r.Seed(h))
				if p.b.QueryRows > 0 {
					copy(matrix(p.b.Queries, int(p.b.QueryRows)*p.d), options[l].Queries[h])
				}
			}
			return nil
		})
	}
	_ = g.Wait() // none fails
}

// encode writes integers, little-endian.
func encode(to []byte, x any) {
	if _, err := binary.Encode(to, binary.LittleEndian, x); err != nil {
		panic(err) // the room was made for it
	}
}

// batch makes the segments of some layers.
func (s *Sealing) batch(ctx context.Context, out []SealedSegment, rows []*seal.Rows, options []seal.Options, keep Keep, timed bool) (took time.Duration, err error) {
	p := newSealPlan(rows, options)
	var x *sealRoom
	select {
	case x = <-s.rooms:
	case <-ctx.Done():
		return 0, ctx.Err()
	}
	settled := true // nothing is under way
	run := func(issue func(c *cuda.Context) error) error {
		settled = false
		idle := func(*cuda.Context) error {
			e := s.stream.Synchronize()
			settled = e == nil
			return e
		}
		err := s.device.Do(background, func(c *cuda.Context) error {
			err := issue(c)
			if err == nil {
				err = x.event.Record(s.stream)
			}
			if err != nil {
				return errors.Join(err, idle(c))
			}
			return nil
		})
		if err != nil {
			return err
		}
		if err = s.device.Wait(background, x.event); err != nil {
			_ = s.device.Do(background, idle) // err says more
			return err
		}
		settled = true
		return nil
	}
	defer func() {
		if !settled {
			x = &sealRoom{} // nobody knows what is under way: the room stays taken
		}
		s.rooms <- x
	}()
	var m *sealModule
	err = s.device.Do(background, func(c *cuda.Context) (err error) {
		if m, err = s.load(c, p.d); err != nil {
			return err
		}
		return x.grow(c, p)
	})
	if err != nil {
		return 0, err
	}
	p.fill(x.in, x.device, rows, options)
	if err := run(func(c *cuda.Context) error { return s.issue(c, m, p, x) }); err != nil {
		return 0, err
	}
	if timed {
		err = s.device.Do(background, func(*cuda.Context) (err error) { took, err = cuda.Elapsed(x.begin, x.finish); return err })
		if err != nil {
			return 0, err
		}
	}
	var g errgroup.Group
	stays := make([][][tiers.NumPlanes]cuda.Ptr, len(rows))
	for l, r := range rows {
		g.Go(func() error {
			made := make([]seal.Made, r.Heads)
			for h := range made {
				made[h] = p.made(x.out[(l*r.Heads+h)*int(p.b.OutBytes):][:p.b.OutBytes])
			}
			out[l].Header, out[l].Parts = seal.Assemble(r, options[l], made)
			if keep != nil {
				stays[l] = keep(out[l].Header)
			}
			return nil
		})
	}
	_ = g.Wait() // none fails
	if keep == nil {
		return took, nil
	}
	return took, run(func(c *cuda.Context) error { return s.copyOut(c, p, x, stays) })
}

// copyOut copies what stays of a batch's segments to where it is to lie.
func (s *Sealing) copyOut(c *cuda.Context, p *sealPlan, x *sealRoom, stays [][][tiers.NumPlanes]cuda.Ptr) error {
	heads, planes := p.jobs/p.layers, p.planes()
	for l := range stays {
		for h := range stays[l] {
			job := x.device + cuda.Ptr(p.b.Out) + cuda.Ptr((l*heads+h)*int(p.b.OutBytes))
			for _, made := range planes {
				if to := stays[l][h][made.plane]; to != 0 {
					if err := c.CopyOnDevice(to, job+cuda.Ptr(made.at), made.bytes, s.stream); err != nil {
						return err
					}
				}
			}
		}
	}
	return nil
}

// background is for what has to come to its end.
var background = context.Background()

// grow makes a room as large as a plan needs.
func (x *sealRoom) grow(c *cuda.Context, p *sealPlan) (err error) {
	if x.made && x.size >= p.device && len(x.in) >= p.in && len(x.out) >= p.out {
		return nil
	}
	if err := x.drop(c); err != nil {
		return err
	}
	var made []func() error
	defer func() {
		if err != nil {
			for _, undo := range made {
				err = errors.Join(err, undo())
			}
			*x = sealRoom{}
		}
	}()
	for _, e := range []struct {
		to     *cuda.Event
		timing bool
	}{{&x.event, false}, {&x.begin, true}, {&x.finish, true}} {
		if *e.to, err = c.NewEvent(e.timing); err != nil {
			return err
		}
		made = append(made, e.to.Destroy)
	}
	for _, b := range []struct {
		to    *[]byte
		bytes int
	}{{&x.in, p.in}, {&x.out, p.out}} {
		if *b.to, err = c.HostAlloc(b.bytes); err != nil {
			return err
		}
		made = append(made, func() error { return c.HostFree(*b.to) })
	}
	if x.device, err = c.Alloc(p.device); err != nil {
		return err
	}
	x.size, x.made = p.device, true
	return nil
}

// drop gives a room back.
func (x *sealRoom) drop(c *cuda.Context) error {
	if !x.made {
		return nil
	}
	err := errors.Join(c.Free(x.device), c.HostFree(x.in), c.HostFree(x.out), x.event.Destroy(), x.begin.Destroy(), x.finish.Destroy())
	*x = sealRoom{}
	return err
}

func (s *Sealing) issue(c *cuda.Context, m *sealModule, p *sealPlan, x *sealRoom) error {
	if err := c.CopyToDevice(x.device, x.in[:p.in], s.stream); err != nil {
		return err
	}
	if err := c.Set(x.device+cuda.Ptr(p.b.Out), 0, p.out, s.stream); err != nil { // between places it is copied, too
		return err
	}
	if err := x.begin.Record(s.stream); err != nil {
		return err
	}
	if err := s.launch(c, m, p, uint64(x.device)); err != nil {
		return err
	}
	if err := x.finish.Record(s.stream); err != nil {
		return err
	}
	return c.CopyToHost(x.out[:p.out], x.device+cuda.Ptr(p.b.Out), s.stream)
}

// launch starts the kernels; at is where the batch lies on the device.
func (s *Sealing) launch(c *cuda.Context, m *sealModule, p *sealPlan, at uint64) (err error) {
	const threads = 256
	run := func(name string, x, y, threads int, args ...uint64) {
		if err == nil && x > 0 {
			err = c.Launch(m.f[name], [3]int{x, y, 1}, [3]int{threads, 1, 1}, 0, s.stream, append([]uint64{at}, args...)...)
		}
	}
	split := func(levels []sealLevel) {
		for _, l := range levels {
			run("split", l.count, p.jobs, threads, at+uint64(p.nodesAt+l.first*int(unsafe.Sizeof(sealNode{}))))
		}
	}
	d, n, jobs, pages := p.d, p.tokens, p.jobs, p.view.Pages()
	tiles := pages * (d / tiers.PageTokens) // of 64 rows and columns
	run("widen", pages, jobs, threads)
	run("centre", jobs, 1, d)
	run("apply", tiles, jobs, threads)
	if p.drains > 0 {
		grouped := n - p.drains
		run("apart", jobs, 1, threads, 1, uint64(p.drains))
		split(p.unlike)
		run("stray", (grouped+tiers.LeafTokens-1)/tiers.LeafTokens, jobs, d, uint64(grouped))
		run("apart", jobs, 1, threads, 0, uint64(p.drains))
	}
	split(p.stored)
	run("gather", pages, jobs, threads)
	run("arrange", jobs, 1, d)
	if p.b.Low == 1 {
		run("feed", jobs, 1, threads)
	}
	run("code", (n+7)/8, jobs, threads)
	run("quantise", (n+7)/8, jobs, threads)
	run("means", pages, jobs, d)
	run("mean_keys", jobs, 1, d)
	run("deviate", pages, jobs, d)
	run("felt", tiles, jobs, threads)
	run("spreads", pages, jobs, threads)
	run("products", 2*(d/64)*(d/64), jobs, threads)
	run("pack", p.view.Leaves(), jobs, 128)
	if queries := int(p.b.QueryRows); queries > 0 {
		fma := uint64(0)
		if cpu.X86.HasAVX && cpu.X86.HasFMA { // as Go's math.Exp asks
			fma = 1
		}
		run("unpack", pages, jobs, threads)
		run("attend_rows", 2*queries, jobs, threads, fma)
	}
	return err
}

// madePlane is a plane in a job's output.
type madePlane struct {
	plane     tiers.Plane
	at, bytes int
}

// planes lists those that the device makes.
func (p *sealPlan) planes() (out []madePlane) {
	set := func(plane tiers.Plane, at uint64, n int) { out = append(out, madePlane{plane, int(at), n}) }
	n, row, sizes := p.tokens, compress.ValueRowBytes(p.d), compress.KeyPlaneBytes(p.d)
	set(tiers.PlaneOrder, p.b.Order, 2*n)
	set(tiers.PlaneSteps, p.b.Steps, compress.KeyOrderBytes(p.d)+p.view.StepGroups()*compress.KeyStepsBytes(p.d))
	for i, plane := range tiers.KeyPlanes {
		if plane != tiers.PlaneK8 || p.b.Low == 1 {
			set(plane, p.b.Keys[i], p.view.Leaves()*sizes[i])
		}
	}
	set(tiers.PlaneV4, p.b.Values, n*(row+compress.ValueScaleBytes))
	if p.b.Low == 1 {
		set(tiers.PlaneV8, p.b.LowValues, n*row)
	}
	if p.drains > 0 {
		set(tiers.PlaneDrains, p.b.Drains, p.view.DrainKeys().Len+p.drains*row)
	}
	set(tiers.PlanePages, p.b.Pages, p.view.PagesBytes())
	return out
}

// made reads a job's output, which stays where it is.
func (p *sealPlan) made(b []byte) (m seal.Made) {
	m.Body = p.view.Info.Body
	m.KeyExp = int(int32(binary.LittleEndian.Uint32(b[p.b.Exponent:])))
	for _, x := range p.planes() {
		m.Planes[x.plane] = b[x.at:][:x.bytes:x.bytes]
	}
	doubles := func(at uint64, n int) []float64 {
		return slices.Clone(unsafe.Slice((*float64)(unsafe.Pointer(&b[at])), n))
	}
	square := p.d * p.d
	m.KeysByKeys, m.KeysByValues = doubles(p.b.Products, square), doubles(p.b.Products+uint64(8*square), square)
	partials := attention.NewPartials(2*int(p.b.QueryRows), p.d)
	for i := range partials {
		at := b[int(p.b.Partials)+i*(8+4*p.d):]
		partials[i].Sum = math.Float64frombits(binary.LittleEndian.Uint64(at))
		copy(partials[i].Out, floats(at[8:8+4*p.d]))
		if i%2 == 0 {
			m.Exact = append(m.Exact, partials[i])
		} else {
			m.Coded = append(m.Coded, partials[i])
		}
	}
	return m
}

// Close gives everything back, when all batches are done. Of a device that is lost nothing can be given back.
func (s *Sealing) Close(ctx context.Context) error {
	var rooms []*sealRoom
	for range sealBatches {
		rooms = append(rooms, <-s.rooms)
	}
	err := s.device.Do(ctx, func(c *cuda.Context) (err error) {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.mu.closed {
			return nil
		}
		s.mu.closed = true
		for _, x := range rooms {
			err = errors.Join(err, x.drop(c))
		}
		for _, m := range s.mu.modules {
			err = errors.Join(err, m.m.Unload())
		}
		s.mu.modules = nil
		return errors.Join(err, s.stream.Destroy())
	})
	for _, x := range rooms {
		s.rooms <- x
	}
	if errors.Is(err, cuda.ErrLost) {
		return nil
	}
	return err
}
