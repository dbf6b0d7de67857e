package contexts

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// Options of a measurement; zero values are defaults.
type Options struct {
	Daemon   string // kvtierd's program
	Dir      string // where its data are made, and removed again; the working directory
	Contexts int    // 1,000; at least 2
	Least    int    // tokens of the shortest context; 2,048, at least 256
	Most     int    // and of the longest; 32,768, at most 1,048,576
	Layers   int    // 30
	Group    int    // contexts that share a prefix; 4
	RAM      int64  // limits of the daemon, bytes; 1 GiB
	Tail     int64  // 2 GiB
	Disk     int64  // 20 GiB

	Rate    float64       // turns a second; 2
	Steps   int           // tokens a turn; 8
	Workers int           // turns under way at most; 4
	Time    time.Duration // of the load in each phase; 30 s
	Reopen  float64       // share of turns that close and open their context before; .1
	Audit   float64       // share of turns after which an answer is checked; .2
	Huge    int           // tokens of a context whose calls are made beside the load on all; none
	Seed    uint64
	Say     func(format string, args ...any)
}

func (o *Options) fill() error {
	o.Dir = cmp.Or(o.Dir, ".")
	o.Contexts, o.Least, o.Most = cmp.Or(o.Contexts, 1000), cmp.Or(o.Least, 2048), cmp.Or(o.Most, 32768)
	o.Layers, o.Group, o.Steps, o.Workers = cmp.Or(o.Layers, 30), cmp.Or(o.Group, 4), cmp.Or(o.Steps, 8), cmp.Or(o.Workers, 4)
	o.RAM, o.Tail, o.Disk = cmp.Or(o.RAM, 1<<30), cmp.Or(o.Tail, 2<<30), cmp.Or(o.Disk, 20<<30)
	o.Rate, o.Time = cmp.Or(o.Rate, 2), cmp.Or(o.Time, 30*time.Second)
	if o.Say == nil {
		o.Say = func(string, ...any) {}
	}
	share := func(x float64) bool { return x >= 0 && x <= 1 }
	switch {
	case o.Daemon == "":
		return errors.New("kvtierd's program is not named")
	case o.Contexts < 2 || o.Contexts > 1e6:
		return fmt.Errorf("%d contexts: 2 or more can be compared with one", o.Contexts)
	case o.Least < 256 || o.Most < o.Least || o.Most > 1<<20:
		return fmt.Errorf("contexts of %d to %d tokens: 256 to 1048576 can be measured", o.Least, o.Most)
	case o.Huge != 0 && (o.Huge < 2*chunk || o.Huge > 1<<20):
		return fmt.Errorf("a huge context of %d tokens: %d to 1048576 can be measured", o.Huge, 2*chunk)
	case o.Layers < 1 || o.Layers > 1024:
		return fmt.Errorf("%d layers: 1 to 1024", o.Layers)
	case o.Group < 1 || o.Steps < 1 || o.Workers < 1 || o.Workers > 1024:
		return errors.New("a group, a turn and the workers have to be 1 or more, and workers at most 1024")
	case !(o.Rate > 0 && o.Rate < 1e6) || o.Time < 100*time.Millisecond:
		return errors.New("the rate has to be more than 0, and the time 100 ms or more")
	case !share(o.Reopen) || !share(o.Audit):
		return errors.New("shares have to be in [0, 1]")
	case o.RAM < 1<<20 || o.Tail < 1<<20 || o.Disk < 1<<20:
		return errors.New("limits have to be 1 MiB or more")
	}
	return nil
}

// tokenBytes is what a token's rows take unquantised.
func (o *Options) tokenBytes() int64 { return int64(o.Layers) * 2 * rowLen * 2 }

// lengths draws the contexts' lengths: of length x or more there are as many as
// 1/x says (Zipf's law), between the least and the most.
func (o *Options) lengths() []int {
	rng := rand.New(rand.NewPCG(o.Seed, 1))
	out := make([]int, o.Contexts)
	for i := range out {
		u := rng.Float64()
		out[i] = int(float64(o.Least) / (1 - u*(1-float64(o.Least)/float64(o.Most))))
	}
	return out
}

// prefix is how many tokens contexts of a group share.
func (o *Options) prefix() int { return o.Least / 2 }

// need estimates what the daemon writes, bytes: what is sealed at 6 bits a value
// with both widths while a context is short, and a tail's log each, and again
// while it is replaced.
func (o *Options) need(lengths []int) int64 {
	var tokens, logs int64
	for i, n := range lengths {
		if i%o.Group > 0 {
			n -= o.prefix()
		}
		tokens += int64(n)
		logs += int64(min(n, 2048+256))
	}
	return tokens*o.tokenBytes()*10/16 + logs*o.tokenBytes()
}

// Report is what was measured.
type Report struct {
	Contexts, Tokens, Layers int
	Lengths                  [3]int  // shortest, median, longest
	BuildSeconds             float64 // making all contexts
	BuildTokens              int     // that were sent for it; the rest are shared
	Limits                   struct{ RAM, Tail, Disk int64 }
	One, All                 Phase
	Beside                   []Beside                   // the load on all beside huge calls
	Ratio                    struct{ P50, P99 float64 } // of all to one
	DiskUsed, LogsUsed       int64                      // bytes on the disk at the end, and logs' share of them
	RecoverySeconds          float64                    // from the start of the daemon after kill -9 to its first answer
	Recovered                int                        // sequences
	AfterRecovery            Audit
}

// Measure builds one context, loads it, builds the others, loads all, kills the
// daemon and starts it anew. What it made is removed.
func Measure(ctx context.Context, o Options) (rep *Report, err error) {
	if err := o.fill(); err != nil {
		return nil, err
	}
	lengths := o.lengths()
	sorted := slices.Sorted(slices.Values(lengths))
	if err := room(o.Dir, min(o.need(lengths), o.Disk+int64(o.Contexts)*2304*o.tokenBytes())); err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp(o.Dir, "kvbench-contexts-")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	rep = &Report{Contexts: o.Contexts, Layers: o.Layers, Lengths: [3]int{sorted[0], sorted[len(sorted)/2], sorted[len(sorted)-1]}}
	rep.Limits.RAM, rep.Limits.Tail, rep.Limits.Disk = o.RAM, o.Tail, o.Disk
	for _, n := range lengths {
		rep.Tokens += n
	}
	w := &world{o: &o, rep: rep}
	if w.d, _, err = start(ctx, &o, dir); err != nil {
		return nil, err
	}
	defer func() { w.d.Kill() }()
	// The one context is as long as the median of all, and is none of them.
	one, err := w.build(ctx, []*sequence{{rows: rows{seed: mix(o.Seed, 1<<40)}, length: sorted[len(sorted)/2]}})
	if err != nil {
		return nil, err
	}
	if rep.One, err = w.load(ctx, "one context", one); err != nil {
		return nil, err
	}
	begin := time.Now()
	rep.BuildTokens = 0
	all, err := w.build(ctx, w.plan(lengths))
	if err != nil {
		return nil, err
	}
	rep.BuildSeconds = time.Since(begin).Seconds()
	if rep.All, err = w.load(ctx, fmt.Sprint(len(all), " contexts"), all); err != nil {
		return nil, err
	}
	rep.Ratio.P50, rep.Ratio.P99 = rep.All.Attend.P50/rep.One.Attend.P50, rep.All.Attend.P99/rep.One.Attend.P99
	if err := w.besides(ctx, all); err != nil {
		return nil, err
	}
	if rep.DiskUsed, rep.LogsUsed, err = diskUsed(dir); err != nil {
		return nil, err
	}
	return rep, w.recover(ctx, dir, all)
}

// recover kills the daemon, starts it anew and checks some contexts.
func (w *world) recover(ctx context.Context, dir string, all []*sequence) error {
	w.o.Say("killing the daemon")
	w.d.Kill()
	d, took, err := start(ctx, w.o, dir)
	if err != nil {
		return err
	}
	w.d, w.rep.RecoverySeconds = d, took.Seconds()
	s, err := sample(ctx, d, time.Now())
	if err != nil {
		return err
	}
	w.rep.Recovered = s.Sequence
	rng := rand.New(rand.NewPCG(w.o.Seed, 3))
	for range min(len(all), 20) {
		q := all[rng.IntN(len(all))]
		if err := w.reopen(ctx, q); err != nil {
			return err
		}
		if err := w.audit(ctx, q, rng.IntN(w.o.Layers), &w.rep.AfterRecovery); err != nil {
			return err
		}
	}
	return nil
}

// room says whether the disk has n bytes and a margin of 1 GiB.
func room(dir string, n int64) error {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return fmt.Errorf("%s: %w", dir, err)
	}
	if free := int64(st.Bavail) * st.Bsize; free < n+1<<30 {
		return fmt.Errorf("%s has %d MiB free, and this may take %d MiB: take fewer contexts, tokens or layers", dir, free>>20, n>>20)
	}
	return nil
}

// percentile returns the p-th of sorted x; 0 of none.
func percentile(x []float64, p float64) float64 {
	if len(x) == 0 {
		return 0
	}
	return x[min(len(x)-1, int(math.Ceil(p*float64(len(x))))-1)]
}
