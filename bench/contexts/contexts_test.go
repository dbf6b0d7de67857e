package contexts

import (
	"context"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

func build(t *testing.T) string {
	t.Helper()
	bin := filepath.Join(t.TempDir(), "kvtierd")
	if out, err := exec.Command("go", "build", "-o", bin, "kvtier/cmd/kvtierd").CombinedOutput(); err != nil {
		t.Fatalf("build kvtierd: %v\n%s", err, out)
	}
	return bin
}

// TestMeasure runs a small measurement, with less memory for tails than they need.
func TestMeasure(t *testing.T) {
	dir := t.TempDir()
	rep, err := Measure(context.Background(), Options{Daemon: build(t), Dir: dir, Contexts: 12, Least: 512, Most: 3000, Layers: 2, Group: 3,
		Tail: 4 << 20, Disk: 64 << 20, RAM: 16 << 20, Rate: 20, Steps: 4, Workers: 3, Time: 2 * time.Second, Reopen: .3, Audit: 1, Huge: 3000, Seed: 1})
	if err != nil {
		t.Fatal(err)
	}
	for name, p := range map[string]Phase{"one": rep.One, "all": rep.All} {
		if p.Turns == 0 || p.Calls != p.Turns*4*2 || p.Audit.Answers != p.Turns || p.Audit.Wrong > 0 || len(p.Samples) == 0 ||
			!(p.Attend.P50 > 0 && p.Attend.P50 <= p.Attend.P99 && p.Attend.P99 <= p.Attend.Max) || !(p.Unfair >= 1) {
			t.Errorf("%s: %+v", name, p)
		}
		for _, s := range p.Samples {
			if s.Tails > 4<<20 || s.RSS == 0 || s.Files == 0 {
				t.Errorf("%s: %+v", name, s)
			}
		}
	}
	if len(rep.Beside) != 4 {
		t.Errorf("beside: %+v", rep.Beside)
	}
	for _, b := range rep.Beside {
		if p := b.Phase; b.Calls == 0 || !(b.P50 > 0) || p.Turns == 0 || p.Calls != p.Turns*4*2 || p.Audit.Answers != p.Turns || p.Audit.Wrong > 0 {
			t.Errorf("beside %s: %+v", b.What, b)
		}
	}
	if rep.One.Visited != 1 || rep.All.Visited < 2 || rep.Recovered < 14 || rep.Recovered > 15 || rep.AfterRecovery.Answers != 12 || rep.AfterRecovery.Wrong > 0 ||
		rep.DiskUsed == 0 || rep.LogsUsed == 0 || rep.RecoverySeconds <= 0 || rep.BuildTokens >= rep.Tokens {
		t.Errorf("%+v", rep)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

func TestRefuses(t *testing.T) {
	for name, change := range map[string]func(*Options){
		"daemon":   func(o *Options) { o.Daemon = "" },
		"program":  func(o *Options) { o.Daemon = filepath.Join(o.Dir, "none") },
		"contexts": func(o *Options) { o.Contexts = 1 },
		"tokens":   func(o *Options) { o.Least = 10 },
		"order":    func(o *Options) { o.Most = o.Least - 1 },
		"layers":   func(o *Options) { o.Layers = -1 },
		"rate":     func(o *Options) { o.Rate = math.Inf(1) },
		"share":    func(o *Options) { o.Audit = 2 },
		"limit":    func(o *Options) { o.Tail = 5 },
		"folder":   func(o *Options) { o.Dir += "/none" },
		"huge":     func(o *Options) { o.Huge = chunk },
		"room":     func(o *Options) { o.Contexts, o.Disk = 1e6, 1<<50 },
		"path":     func(o *Options) { o.Dir = long(t, o.Dir) },
	} {
		o := Options{Daemon: "/bin/true", Dir: t.TempDir(), Contexts: 2, Least: 256, Most: 256, Layers: 1}
		change(&o)
		if _, err := Measure(context.Background(), o); err == nil {
			t.Errorf("%s was taken", name)
		}
	}
}

func long(t *testing.T, dir string) string {
	dir = filepath.Join(dir, strings.Repeat("x", 100))
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	return dir
}

// TestDaemonEnds: a daemon that ends at once is an error that says what it said.
func TestDaemonEnds(t *testing.T) {
	_, err := Measure(context.Background(), Options{Daemon: "/bin/true", Dir: t.TempDir(), Contexts: 2, Least: 256, Most: 256, Layers: 1})
	if err == nil || !strings.Contains(err.Error(), "ended") {
		t.Error(err)
	}
}

// TestLengths: between the ends, the median about twice the least.
func TestLengths(t *testing.T) {
	o := Options{Contexts: 10000, Least: 1000, Most: 16000}
	x := slices.Sorted(slices.Values(o.lengths()))
	if x[0] < 1000 || x[len(x)-1] > 16000 || math.Abs(float64(x[len(x)/2])/1882-1) > .05 {
		t.Error(x[0], x[len(x)/2], x[len(x)-1])
	}
}

// TestRows: rows are the same whenever they are made, those of a prefix are
// shared, others are not, and other rows would not pass an audit.
func TestRows(t *testing.T) {
	a := rows{seed: 1, prefix: 9, shared: 100}
	b := rows{seed: 2, prefix: 9, shared: 100}
	same := func(lo, hi int) bool {
		ak, av := a.bytes(1, lo, hi)
		bk, bv := b.bytes(1, lo, hi)
		return slices.Equal(ak, bk) && slices.Equal(av, bv)
	}
	if !same(0, 100) || same(100, 101) {
		t.Error("what is shared, and what is not")
	}
	const n = 1500
	q := a.query(1, n-1)
	out, lse := a.dense(1, n, q)
	for name, other := range map[string]rows{"another context": {seed: 3}, "a prefix missed": {seed: 1, prefix: 8, shared: 100}} {
		wrong, mass := other.dense(1, n, q)
		worst, off := difference(wrong, out, mass, lse)
		if worst < tolerableError && off < tolerableMass {
			t.Errorf("%s: error %.3f, mass off by %.3f", name, worst, off)
		}
	}
	less, mass := a.dense(1, n-2*runTokens*topics/4, q)
	if worst, off := difference(less, out, mass, lse); worst < tolerableError && off < tolerableMass {
		t.Errorf("tokens missing: error %.3f, mass off by %.3f", worst, off)
	}
}
