package million

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"kvtier/bench/daemon"
	"kvtier/bench/synth"
	kvtierv1 "kvtier/proto/kvtier/v1"
	"kvtier/tiers"
)

// Options of a run.
type Options struct {
	Geometry synth.Geometry
	Seed     uint64
	Budgets  []int  // tokens that a head's answer may read; one after the other
	Warm     int    // steps that are not measured, to fill caches as a decode that goes on has them
	Steps    int    // steps that are measured, with each budget
	Audits   int    // calls that are compared with dense attention, of each budget
	Dense    int    // layers that are also answered from everything stored, once
	RAM      string // limits of the daemon, as its flags take them
	Disk     string
	GPU      string        // as kvtierd has it
	GPUAbove int           // as kvtierd has --gpu-choose-above
	InRAM    float32       // as kvtierd has --read-all-in-ram
	ByPage   bool          // as kvtierd has --by-page
	ReadWait time.Duration // that a step's calls wait for reads of keys and values; 0: as long as it takes
	Dir      string        // parent of the run's folder; "": the system's
	Keep     bool          // keep the folder
	Folder   string        // that an earlier run of the same geometry and seed kept: its context is asked, and kept
	Kvtierd  string        // the daemon to run; "": the one beside this program
	Say      func(format string, args ...any)
}

func (o *Options) check() error {
	switch {
	case o.Geometry.Tokens < 2*tiers.SegmentTokens:
		return fmt.Errorf("%d tokens: at least %d are needed for a sealed segment", o.Geometry.Tokens, 2*tiers.SegmentTokens)
	case o.Geometry.Tokens > 1<<24:
		return fmt.Errorf("%d tokens: more than %d take too long", o.Geometry.Tokens, 1<<24)
	case len(o.Budgets) == 0 || slices.Min(o.Budgets) < 1:
		return errors.New("a budget is a number of tokens, at least 1, and one is needed")
	case o.ReadWait != 0 && (o.ReadWait < time.Microsecond || o.ReadWait >= time.Hour):
		return fmt.Errorf("a wait of %v for reads: 1us to 1h, or 0 for as long as it takes", o.ReadWait)
	case o.Steps < 1 || o.Warm < 0 || o.Audits < 0 || o.Dense < 0 || o.steps() > synth.BlockTokens:
		return fmt.Errorf("%d steps, %d before them, with %d budgets: 1 to %d are possible together", o.Steps, o.Warm, len(o.Budgets), synth.BlockTokens)
	}
	return nil
}

// steps is how many positions are asked.
func (o *Options) steps() int { return len(o.Budgets) * (o.Warm + o.Steps) }

// Report is what a run found.
type Report struct {
	Geometry synth.Geometry
	Seed     uint64
	Build    BuildReport
	Decode   []DecodeReport // by budget
	Dense    DenseReport
	Reopen   ReopenReport
	Memory   []MemorySample
}

// MemorySample is what the daemon had at a time.
type MemorySample struct {
	Seconds float64 // since the start
	Phase   string
	RSS     int64 // bytes
	Tail    int64 // unquantised rows
	RAM     int64 // the RAM tier's
	Disk    int64 // the NVMe tier's
}

// run is a run under way.
type run struct {
	o     Options
	m     *synth.Model
	bin   string
	dir   string
	d     *daemon.Daemon
	id    string
	first int // position of the first step
	begin time.Time
	phase string
	rep   *Report
	asked []asked
}

// Run makes the context, asks it, and reports. On an error or a cancelled context the folder is removed, too, unless it is to be kept.
func Run(ctx context.Context, o Options) (*Report, error) {
	if err := o.check(); err != nil {
		return nil, err
	}
	m, err := synth.New(o.Geometry, o.Seed)
	if err != nil {
		return nil, err
	}
	bin, err := daemon.Find(o.Kvtierd)
	if err != nil {
		return nil, err
	}
	dir, make := o.Folder, (*run).build
	if dir != "" {
		if _, err := os.Stat(filepath.Join(dir, "data")); err != nil { // a daemon would make one
			return nil, fmt.Errorf("--folder is none that a run kept: %w", err)
		}
		make, o.Keep = (*run).take, true
	} else if dir, err = os.MkdirTemp(o.Dir, "kvm"); err != nil {
		return nil, err
	}
	r := &run{o: o, m: m, bin: bin, dir: dir, begin: time.Now(), rep: &Report{Geometry: o.Geometry, Seed: o.Seed}}
	defer r.close()
	if err := r.start(ctx); err != nil {
		return nil, err
	}
	for _, phase := range []struct {
		name string
		do   func(*run, context.Context) error
	}{{"build", make}, {"decode", (*run).decode}, {"dense", (*run).dense}, {"audit", (*run).audit}, {"reopen", (*run).reopen}} {
		r.phase = phase.name
		if err := phase.do(r, ctx); err != nil {
			return r.rep, fmt.Errorf("%s: %w", phase.name, err)
		}
	}
	return r.rep, nil
}

// start runs the daemon. Contexts of every length are answered in part, and nothing is audited in the background.
func (r *run) start(ctx context.Context) (err error) {
	r.d, err = daemon.Start(ctx, r.bin, r.dir, "--ram", r.o.RAM, "--disk", r.o.Disk, "--gpu", cmp.Or(r.o.GPU, "off"), "--audit", "0", "--gpu-audit", "0", "--read-all", "0",
		"--read-all-in-ram", fmt.Sprint(r.o.InRAM), fmt.Sprintf("--by-page=%t", r.o.ByPage), "--gpu-choose-above", fmt.Sprint(r.o.GPUAbove))
	return err
}

func (r *run) close() {
	if r.d != nil {
		r.d.Kill()
	}
	if r.o.Keep {
		r.o.Say("kept %s", r.dir)
		return
	}
	if err := os.RemoveAll(r.dir); err != nil {
		r.o.Say("remove %s: %v", r.dir, err)
	}
}

// sample notes what the daemon has now.
func (r *run) sample(ctx context.Context) {
	s := MemorySample{Seconds: time.Since(r.begin).Seconds(), Phase: r.phase}
	st, err := r.d.Look.GetStatus(ctx, &kvtierv1.GetStatusRequest{})
	if err != nil {
		return // whatever is wrong shows elsewhere
	}
	s.RSS, s.Tail = int64(st.RssBytes), int64(st.TailBytes)
	for _, t := range st.Tiers {
		switch t.Name {
		case "ram":
			s.RAM = int64(t.BytesUsed)
		case "nvme":
			s.Disk = int64(t.BytesUsed)
		}
	}
	r.rep.Memory = append(r.rep.Memory, s)
}

// diskBytes is what the run's folder takes on the disk.
func (r *run) diskBytes() (n int64) {
	_ = filepath.WalkDir(r.dir, func(_ string, e os.DirEntry, err error) error {
		if err == nil && e.Type().IsRegular() {
			if i, err := e.Info(); err == nil {
				n += allocated(i)
			}
		}
		return nil
	})
	return n
}

func budget(tokens int) *kvtierv1.Budget {
	return &kvtierv1.Budget{Mode: kvtierv1.AttendMode_ATTEND_MODE_BUDGET, Tokens: uint64(tokens)}
}
