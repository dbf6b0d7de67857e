package disk

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"kvtier/tiers"
	"kvtier/tiers/nvme"
)

// files are a tier filled with segments, and its extents opened once more.
type files struct {
	dir     string
	tier    *nvme.Tier
	headers []*tiers.Header
	runs    []nvme.Run // where each lies
	raw     map[uint32]*os.File
}

// fill makes a tier of n bytes, rounded down to whole segments.
func fill(ctx context.Context, dir string, n int64, seed uint64) (f *files, err error) {
	f = &files{dir: dir, raw: map[uint32]*os.File{}}
	n = n / segmentBytes * segmentBytes
	if f.tier, err = openTier(dir, n); err != nil {
		return nil, err
	}
	defer func(f *files) {
		if err != nil {
			err = errors.Join(err, f.close())
		}
	}(f)
	rng := rand.NewChaCha8(seedOf(seed, 1))
	for i := range uint64(n / segmentBytes) {
		h, pieces := newSegment(rng, i)
		if err := f.tier.Put(ctx, h, pieces); err != nil {
			return nil, err
		}
		l, _ := f.tier.Locate(h.ID)
		r := l.Parts[tiers.PartMain]
		f.headers, f.runs = append(f.headers, h), append(f.runs, r)
		if f.raw[r.Extent] == nil {
			flags := os.O_RDONLY
			if f.tier.Direct() {
				flags |= unix.O_DIRECT
			}
			if f.raw[r.Extent], err = os.OpenFile(filepath.Join(dir, nvme.ExtentName(r.Extent)), flags, 0); err != nil {
				return nil, err
			}
		}
	}
	return f, f.tier.Sync(ctx)
}

// again opens a tier of the same segments that has so many reads under way at
// most. Only the tier is to be closed.
func (f *files) again(depth int) (*files, error) {
	t, err := nvme.Open(f.dir, nvme.Options{Bytes: int64(len(f.headers)) * segmentBytes, Depth: depth})
	if err != nil {
		return nil, err
	}
	for i, h := range f.headers {
		var l nvme.Location
		l.Parts[tiers.PartMain] = f.runs[i]
		if err := t.Restore(h.ID, l); err != nil {
			return nil, errors.Join(err, t.Close())
		}
	}
	out := *f
	out.tier = t
	return &out, nil
}

func (f *files) close() error {
	errs := []error{f.tier.Close()}
	for _, r := range f.raw {
		errs = append(errs, r.Close())
	}
	return errors.Join(errs...)
}

// names returns the extents as fio wants them, relative to the folder.
func (f *files) names() string {
	var names []string
	for number := range f.raw {
		names = append(names, nvme.ExtentName(number))
	}
	slices.Sort(names)
	return strings.Join(names, ":")
}

// pick chooses a place to read block bytes from.
func (f *files) pick(rng *rand.Rand, block int) (segment int, p tiers.Plane, off int) {
	return rng.IntN(len(f.headers)), tiers.Plane(rng.IntN(piecesEach)), rng.IntN(pieceBytes/block) * block
}

func (f *files) request(rng *rand.Rand, block int) tiers.Request {
	i, p, off := f.pick(rng, block)
	return tiers.Request{Header: f.headers[i], Plane: p, Ranges: []tiers.Range{{Off: off, Len: block}}}
}

func measureReads(ctx context.Context, o Options, f fio, fs *files) (rows []Row, err error) {
	uring := f.there() && f.hasUring(ctx, fs)
	if f.there() && !uring {
		o.Say("fio cannot use io_uring here: libaio alone is measured")
	}
	for _, block := range o.Blocks {
		for _, depth := range o.Depths {
			o.Say("reading %d KiB at depth %d", block>>10, depth)
			at, err := fs.again(depth)
			if err != nil {
				return nil, err
			}
			got, err := inTurns(ctx, o.Repeats, Row{What: "random read", Block: block, Depth: depth}, readWays(o, f, at, uring, block, depth))
			if err = errors.Join(err, at.tier.Close()); err != nil {
				return nil, err
			}
			rows = append(rows, got...)
		}
	}
	return rows, nil
}

// longBatch is how many times the depth a long batch holds.
const longBatch = 16

// readWays lists the ways of one block size and depth. A batch waits for its
// last read; all others keep as many reads under way all the time, a long batch
// but for its end.
func readWays(o Options, f fio, fs *files, uring bool, block, depth int) (ways []way) {
	if f.there() {
		engines := []string{"libaio"}
		if uring {
			engines = append(engines, "io_uring")
		}
		for _, e := range engines {
			ways = append(ways, way{"fio " + e, func(ctx context.Context) (float64, float64, error) {
				return f.read(ctx, o, fs, e, block, depth, 1)
			}})
		}
		if depth > 1 {
			ways = append(ways, way{"fio in batches", func(ctx context.Context) (float64, float64, error) {
				return f.read(ctx, o, fs, "libaio", block, depth, depth)
			}})
		}
	}
	pin := func(name string, callers, batch int) way {
		return way{"tier, " + name, func(ctx context.Context) (float64, float64, error) { return fs.pin(ctx, o, block, callers, batch) }}
	}
	ways = append(ways,
		way{"raw", func(ctx context.Context) (float64, float64, error) { return fs.readRaw(ctx, o, block, depth) }},
		pin("one by one", depth, 1))
	if depth > 1 {
		ways = append(ways, pin("batches", 1, depth), pin("long batches", 1, longBatch*depth))
	}
	return ways
}

// read is a fio job: reads submitted and waited for so many at a time.
func (f fio) read(ctx context.Context, o Options, fs *files, engine string, block, depth, batch int) (rate, cpu float64, err error) {
	args := []string{"--rw=randread", "--readonly", "--filename=" + fs.names(), "--file_service_type=random", "--norandommap", "--randrepeat=0",
		"--ioengine=" + engine, fmt.Sprint("--bs=", block), fmt.Sprint("--iodepth=", depth), "--time_based", fmt.Sprint("--runtime=", o.Time.Milliseconds(), "ms")}
	if batch > 1 {
		args = append(args, fmt.Sprint("--iodepth_batch_submit=", batch), fmt.Sprint("--iodepth_batch_complete_min=", batch))
	}
	return f.run(ctx, fs.dir, args...)
}

// hasUring says whether fio and the kernel have io_uring.
func (f fio) hasUring(ctx context.Context, fs *files) bool {
	_, _, err := f.run(ctx, fs.dir, "--rw=read", "--readonly", "--filename="+fs.names(), "--ioengine=io_uring", "--bs=4096", "--io_size=4096")
	return err == nil
}

// timed calls f on so many goroutines until the time is over. It counts what f returns.
func timed(ctx context.Context, o Options, callers int, f func(ctx context.Context, rng *rand.Rand) (int, error)) (rate, cpu float64, err error) {
	timer, cancel := context.WithTimeout(ctx, o.Time)
	defer cancel()
	var done atomic.Int64
	var wg sync.WaitGroup
	errs := make([]error, callers)
	c := start()
	for i := range callers {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(o.Seed, uint64(i)^rand.Uint64())) // other places in each repeat
			for timer.Err() == nil && errs[i] == nil {
				var n int
				n, errs[i] = f(ctx, rng)
				done.Add(int64(n))
			}
		})
	}
	wg.Wait()
	rate, cpu = c.per(done.Load())
	return rate, cpu, errors.Join(append(errs, ctx.Err())...)
}

// readRaw reads by ReadAt on so many goroutines, unverified.
func (f *files) readRaw(ctx context.Context, o Options, block, depth int) (rate, cpu float64, err error) {
	all, err := unix.Mmap(-1, 0, depth*block, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		return 0, 0, fmt.Errorf("memory: %w", err)
	}
	defer unix.Munmap(all)
	buffers := make(chan []byte, depth)
	for b := range slices.Chunk(all, block) {
		buffers <- b
	}
	return timed(ctx, o, depth, func(_ context.Context, rng *rand.Rand) (int, error) {
		buf := <-buffers
		defer func() { buffers <- buf }()
		i, p, off := f.pick(rng, block)
		at := int64(f.runs[i].First)*tiers.BlockSize + int64(p)*pieceBytes + int64(off)
		if _, err := f.raw[f.runs[i].Extent].ReadAt(buf, at); err != nil {
			return 0, err
		}
		return 1, nil
	})
}

// pin reads by so many callers, each of which pins a batch.
func (f *files) pin(ctx context.Context, o Options, block, callers, batch int) (rate, cpu float64, err error) {
	return timed(ctx, o, callers, func(ctx context.Context, rng *rand.Rand) (int, error) {
		reqs := make([]tiers.Request, batch)
		for i := range reqs {
			reqs[i] = f.request(rng, block)
		}
		pins, err := f.tier.Pin(ctx, reqs)
		for i := range pins {
			if err == nil && !pins[i].Held() {
				err = errors.New("the tier does not hold what was put")
			}
			pins[i].Release(0)
		}
		if err != nil {
			return 0, err
		}
		return batch, nil
	})
}
