// Package speed measures kernels against a raw read of the same bytes and against
// ggml's, and whole answers by their stages. What is compared takes turns, since
// neighbours on a machine change what memory gives from one minute to the next:
// only ratios of what stands beside each other mean much.
package speed

import (
	"fmt"
	"math"
	"math/rand/v2"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"kvtier/attention/kernels"
	"kvtier/bench/stats"
)

// Options of a measurement; zero values are defaults.
type Options struct {
	Bytes   int // read by each kernel; 512 MiB
	Rows    int // query rows of a group; 4
	HeadDim int // 128
	Repeats int // 7
}

func (o *Options) fill() {
	for _, f := range []struct {
		field *int
		zero  int
	}{{&o.Bytes, 512 << 20}, {&o.Rows, 4}, {&o.HeadDim, 128}, {&o.Repeats, 7}} {
		if *f.field == 0 {
			*f.field = f.zero
		}
	}
}

// Spread is a median, and the least and the most of all repeats.
type Spread = stats.Spread

// Result is how fast a kernel is.
type Result struct {
	Kernel  string
	Variant string
	Threads int
	GBs     Spread  // bytes read, 10^9 a second
	Share   Spread  // of what the raw read got in the same repeat
	TokenNs float64 // nanoseconds a token and KV head, median; 0 of the raw read
}

// goPart is how much less the plain Go loops get to do.
const goPart = 32

// Measure runs every kernel in every variant on 1 and on 2 threads, in turns.
func Measure(o Options) ([]Result, error) {
	o.fill()
	if o.HeadDim%16 != 0 || o.HeadDim < 16 || o.HeadDim > 256 {
		return nil, fmt.Errorf("a head dimension of %d is no multiple of 16 up to 256", o.HeadDim)
	}
	buf, err := memory(o.Bytes)
	if err != nil {
		return nil, err
	}
	defer unix.Munmap(buf)
	var out []Result
	for _, threads := range []int{1, 2} {
		out = append(out, measure(o, buf, threads)...)
	}
	return out, nil
}

// measure returns the raw read first.
func measure(o Options, buf []byte, threads int) []Result {
	list := kernelsOf(o.HeadDim)
	type series struct {
		Result
		gbs, share []float64
	}
	raw := &series{Result: Result{Kernel: "raw read", Variant: fastest().String(), Threads: threads}}
	all := []*series{raw}
	for _, k := range list {
		for _, v := range kernels.Variants() {
			all = append(all, &series{Result: Result{Kernel: k.name, Variant: v.String(), Threads: threads}})
		}
	}
	for range o.Repeats {
		sweep := kernel{unit: 4096, run: func(b []byte, _ *scratch) { kernels.Sweep(b) }}
		limit := rate(sweep, buf, threads, fastest(), o)
		raw.gbs, raw.share = append(raw.gbs, limit), append(raw.share, 1)
		at := 1
		for _, k := range list {
			for _, v := range kernels.Variants() {
				part := buf
				if v == kernels.Go {
					part = buf[:len(buf)/goPart]
				}
				r := rate(k, part, threads, v, o)
				all[at].gbs, all[at].share = append(all[at].gbs, r), append(all[at].share, r/limit)
				all[at].TokenNs = float64(k.unit) / float64(k.tokens)
				at++
			}
		}
	}
	out := make([]Result, len(all))
	for i, s := range all {
		s.GBs, s.Share = spread(s.gbs), spread(s.share)
		s.TokenNs /= s.GBs.Median
		out[i] = s.Result
	}
	return out
}

func fastest() kernels.Variant { return kernels.Variants()[len(kernels.Variants())-1] }

// rate returns how many 10^9 bytes a second a kernel goes through.
func rate(k kernel, buf []byte, threads int, v kernels.Variant, o Options) float64 {
	defer kernels.Use(v)()
	each := len(buf) / threads / k.unit * k.unit
	scratches := make([]*scratch, threads)
	for i := range scratches {
		scratches[i] = newScratch(o)
	}
	var wg sync.WaitGroup
	start := time.Now()
	for i, s := range scratches {
		wg.Go(func() { k.through(buf[i*each:(i+1)*each], s) })
	}
	wg.Wait()
	return float64(each*threads) / float64(time.Since(start).Nanoseconds())
}

// through goes through all units of b.
func (k *kernel) through(b []byte, s *scratch) {
	n, at := len(b)/k.unit, 0
	for i := range n {
		next := i + 1
		if k.gathered {
			const step = 1_000_003 // a prime, so that all units come
			next = (i + 1) * step % n
		}
		s.ahead = (next - at) * k.unit
		k.run(b[at*k.unit:][:k.unit], s)
		at = next
	}
}

func spread(x []float64) Spread { return stats.SpreadOf(x) }

// memory returns so many bytes that are numbers in (-1, 1), whether they are
// read as float32 or as bfloat16, of which a float32 is two.
func memory(n int) ([]byte, error) {
	buf, err := mmap(n)
	if err != nil {
		return nil, err
	}
	rng := rand.New(rand.NewPCG(1, 2))
	number := func() uint32 { return math.Float32bits(2*rng.Float32()-1) >> 16 }
	x := floats(buf)
	for i := range x {
		x[i] = math.Float32frombits(number()<<16 | number())
	}
	return buf, nil
}

// mmap returns so many bytes in huge pages, where the system gives them.
func mmap(n int) ([]byte, error) {
	buf, err := unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		return nil, fmt.Errorf("memory for the benchmark: %w", err)
	}
	_ = unix.Madvise(buf, unix.MADV_HUGEPAGE) // without them it is slower
	return buf, nil
}
