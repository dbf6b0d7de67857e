package disk

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"testing"
	"time"
)

func small(t *testing.T) Options {
	return Options{Dir: t.TempDir(), Bytes: 64 << 20, Written: 32 << 20, Blocks: []int{4096, 65536}, Depths: []int{1, 4},
		Time: 20 * time.Millisecond, Repeats: 1, Seed: 1}
}

func empty(t *testing.T, dir string) {
	t.Helper()
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

// TestMeasure: every way of each block size and depth is there and does
// something, and nothing is left behind.
func TestMeasure(t *testing.T) {
	for _, fio := range []string{"", "fio"} {
		o := small(t)
		if fio != "" {
			path, err := exec.LookPath(fio)
			if err != nil {
				t.Skip("no fio")
			}
			o.Fio = path
		}
		rep, err := Measure(context.Background(), o)
		if err != nil {
			t.Fatal(err)
		}
		ways := map[string]int{}
		for _, r := range rep.Rows {
			ways[r.Way]++
			if r.Rate.Least <= 0 || r.MBs.Most < r.MBs.Least || r.With != rep.Rows[0].Way && r.What == "random read" {
				t.Errorf("%+v", r)
			}
		}
		if ways["raw"] != 4 || ways["tier, one by one"] != 4 || ways["tier, batches"] != 2 || ways["tier, long batches"] != 2 || ways["tier"] != 2 ||
			fio != "" && (ways["fio libaio"] != 6 || ways["fio in batches"] != 2) || (rep.Fio != "") != (fio != "") {
			t.Errorf("fio %q: %v", rep.Fio, ways)
		}
		empty(t, o.Dir)
	}
}

func TestRefuses(t *testing.T) {
	for name, change := range map[string]func(*Options){
		"block":   func(o *Options) { o.Blocks = []int{5000} },
		"large":   func(o *Options) { o.Blocks = []int{1 << 20} },
		"depth":   func(o *Options) { o.Depths = []int{0} },
		"bytes":   func(o *Options) { o.Bytes = 1 },
		"written": func(o *Options) { o.Written = 1 },
		"time":    func(o *Options) { o.Time = 1 },
		"repeats": func(o *Options) { o.Repeats = -1 },
		"room":    func(o *Options) { o.Bytes = 1 << 60 },
		"folder":  func(o *Options) { o.Dir += "/none" },
		"fio":     func(o *Options) { o.Fio = o.Dir + "/no-fio" },
	} {
		o := small(t)
		dir := o.Dir
		change(&o)
		if _, err := Measure(context.Background(), o); err == nil {
			t.Errorf("%s was taken", name)
		}
		empty(t, dir)
	}
}

func TestCancelled(t *testing.T) {
	o := small(t)
	o.Time = time.Hour
	ctx, cancel := context.WithTimeout(context.Background(), 500*time.Millisecond)
	defer cancel()
	if _, err := Measure(ctx, o); !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
	empty(t, o.Dir)
}
