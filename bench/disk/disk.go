// Package disk measures the NVMe tier beside fio and beside plain reads of the
// same files. What is compared takes turns on the same files in the same
// minute, because disks differ from one minute to the next, above all those of
// virtual machines: only ratios of what stands beside each other mean much.
package disk

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"kvtier/bench/stats"
	"kvtier/tiers"
	"kvtier/tiers/nvme"
)

// Options of a measurement; zero values are defaults.
type Options struct {
	Dir     string        // where the files are made, and removed again; the working directory
	Bytes   int64         // of the files that are read; 1 GiB, at least 64 MiB
	Written int64         // bytes that each way of writing writes a repeat; 256 MiB, at least 32 MiB
	Blocks  []int         // bytes a read: powers of two, 4 KiB to 256 KiB; 4, 16, 64 and 256 KiB
	Depths  []int         // reads under way at once, 1 to 256; 1, 8 and 32
	Time    time.Duration // that each way of reading takes a repeat; 1 s
	Repeats int           // 5
	Seed    uint64
	Fio     string // the program; empty: measure without it
	Say     func(format string, args ...any)
}

func (o *Options) fill() error {
	o.Dir = cmp.Or(o.Dir, ".")
	o.Bytes = cmp.Or(o.Bytes, 1<<30)
	o.Written = cmp.Or(o.Written, 256<<20)
	o.Time = cmp.Or(o.Time, time.Second)
	o.Repeats = cmp.Or(o.Repeats, 5)
	if o.Blocks == nil {
		o.Blocks = []int{4 << 10, 16 << 10, 64 << 10, 256 << 10}
	}
	if o.Depths == nil {
		o.Depths = []int{1, 8, 32}
	}
	if o.Say == nil {
		o.Say = func(string, ...any) {}
	}
	for _, b := range o.Blocks {
		if b < tiers.BlockSize || b > pieceBytes || b&(b-1) != 0 {
			return fmt.Errorf("a read of %d bytes: powers of two from %d to %d can be measured", b, tiers.BlockSize, pieceBytes)
		}
	}
	for _, d := range o.Depths {
		if d < 1 || d > 256 {
			return fmt.Errorf("depth %d: 1 to 256 can be measured", d)
		}
	}
	switch {
	case o.Bytes < 64<<20:
		return fmt.Errorf("%d bytes to read are too few: 64 MiB or more", o.Bytes)
	case o.Written < syncEvery*segmentBytes:
		return fmt.Errorf("%d bytes to write are too few: %d MiB or more", o.Written, syncEvery*segmentBytes>>20)
	case o.Time < 10*time.Millisecond:
		return fmt.Errorf("%v of reading are too short: 10 ms or more", o.Time)
	case o.Repeats < 1:
		return errors.New("there has to be a repeat")
	}
	return nil
}

// Row is how fast one way of reading or writing is.
type Row struct {
	What  string       // "random read" or "write"
	Way   string       // fio's engine, "raw", or how the tier is called
	Block int          // bytes a read or write
	Depth int          // of them under way at once
	Rate  stats.Spread // of them a second
	MBs   stats.Spread // 10^6 bytes a second
	// Beside is the rate over that of what it is compared with, in the same repeat.
	Beside stats.Spread
	With   string  // what it is compared with: the first way of its block size and depth
	CPU    float64 // microseconds of processor time one takes, median
}

// Report is what was measured, and with what.
type Report struct {
	Fio    string // version; empty if there was none
	Direct bool   // the tier's files are read past the page cache
	Bytes  int64  // that were read from
	Rows   []Row
}

// A segment has one head and pieces of 256 KiB: 2 MiB.
const (
	pieceBytes   = 256 << 10
	piecesEach   = 8
	segmentBytes = pieceBytes * piecesEach
	// syncEvery is how many segments are written between two syncs: about what
	// sealing the layers of a model does.
	syncEvery = 16
)

// Measure fills a tier in a folder of its own and reads and writes in turns.
// The folder is removed again. It needs Bytes and twice Written of room.
func Measure(ctx context.Context, o Options) (rep *Report, err error) {
	if err := o.fill(); err != nil {
		return nil, err
	}
	if err := room(o.Dir, o.Bytes+2*o.Written); err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp(o.Dir, "kvbench-disk-")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	rep = &Report{}
	f := fio{path: o.Fio}
	if rep.Fio, err = f.version(ctx); err != nil {
		return nil, err
	}
	o.Say("writing %d MiB", o.Bytes>>20)
	files, err := fill(ctx, filepath.Join(dir, "read"), o.Bytes, o.Seed)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, files.close()) }()
	rep.Direct, rep.Bytes = files.tier.Direct(), int64(len(files.headers))*segmentBytes
	if rep.Rows, err = measureReads(ctx, o, f, files); err != nil {
		return nil, err
	}
	written, err := measureWrites(ctx, o, f, dir)
	if err != nil {
		return nil, err
	}
	rep.Rows = append(rep.Rows, written...)
	return rep, nil
}

// room says whether the disk has n bytes, and as many again as a margin up to 1 GiB.
func room(dir string, n int64) error {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return fmt.Errorf("%s: %w", dir, err)
	}
	if free, need := int64(st.Bavail)*st.Bsize, n+min(n, 1<<30); free < need {
		return fmt.Errorf("%s has %d MiB free: the measurement needs %d MiB, and leaves as much as a margin", dir, free>>20, n>>20)
	}
	return nil
}

// way is one way of doing the same: run returns how many a second, and the
// processor time of one.
type way struct {
	name string
	run  func(ctx context.Context) (rate, cpu float64, err error)
}

// inTurns lets ways take turns, and compares each with the first.
func inTurns(ctx context.Context, repeats int, like Row, ways []way) ([]Row, error) {
	rates, beside, cpus := make([][]float64, len(ways)), make([][]float64, len(ways)), make([][]float64, len(ways))
	for range repeats {
		for i, w := range ways {
			rate, cpu, err := w.run(ctx)
			if err != nil {
				return nil, fmt.Errorf("%s of %d bytes, depth %d, %s: %w", like.What, like.Block, like.Depth, w.name, err)
			}
			rates[i], cpus[i] = append(rates[i], rate), append(cpus[i], cpu)
			beside[i] = append(beside[i], rate/rates[0][len(rates[0])-1])
		}
	}
	rows := make([]Row, len(ways))
	for i, w := range ways {
		r := like
		r.Way, r.With = w.name, ways[0].name
		r.Rate, r.Beside, r.CPU = stats.SpreadOf(rates[i]), stats.SpreadOf(beside[i]), stats.SpreadOf(cpus[i]).Median
		mb := float64(like.Block) / 1e6
		r.MBs = stats.Spread{Median: r.Rate.Median * mb, Least: r.Rate.Least * mb, Most: r.Rate.Most * mb}
		rows[i] = r
	}
	return rows, nil
}

// clock measures what this process does.
type clock struct {
	begin time.Time
	cpu   time.Duration
}

func start() clock { return clock{time.Now(), processorTime()} }

// per returns how many a second n are, and the microseconds of processor time of one.
func (c clock) per(n int64) (rate, cpu float64) {
	took, used := time.Since(c.begin), processorTime()-c.cpu
	return float64(n) / took.Seconds(), used.Seconds() * 1e6 / float64(max(n, 1))
}

func processorTime() time.Duration {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// newSegment makes a segment of random bytes.
func newSegment(rng *rand.ChaCha8, number uint64) (*tiers.Header, []tiers.Piece) {
	pieces := make([][tiers.NumPlanes][]byte, 1)
	for p := range tiers.Plane(piecesEach) {
		pieces[0][p] = make([]byte, pieceBytes)
		_, _ = rng.Read(pieces[0][p]) // never fails
	}
	h, parts := tiers.NewHeader(tiers.Header{Start: number * tiers.SegmentTokens, HeadDim: 128, Heads: make([]tiers.HeadInfo, 1)}, pieces)
	return h, h.Pieces(parts)
}

// seedOf makes the seed of a stream of random bytes.
func seedOf(seed, stream uint64) (s [32]byte) {
	rng := rand.New(rand.NewPCG(seed, stream))
	for i := range s {
		s[i] = byte(rng.Uint32())
	}
	return s
}

// openTier opens a tier of at most so many bytes, with the daemon's options.
func openTier(dir string, bytes int64) (*nvme.Tier, error) {
	return nvme.Open(dir, nvme.Options{Bytes: bytes, ExtentBytes: min(256<<20, bytes)})
}
