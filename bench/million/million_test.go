package million

import (
	"context"
	"os/exec"
	"path/filepath"
	"testing"

	"kvtier/bench/synth"
	"kvtier/tiers/gpu/cuda/cudatest"
)

// A small run from beginning to end, on the real daemon.
func TestRun(t *testing.T) {
	if testing.Short() {
		t.Skip("it builds and runs a daemon")
	}
	bin := build(t)
	o := Options{Geometry: synth.Geometry{Tokens: 3*synth.BlockTokens + 300, Layers: 2, KVHeads: 2, Group: 2, HeadDim: 64}, Seed: 1, Budgets: []int{1024, 2048},
		Warm: 2, Steps: 4, Audits: 4, Dense: 1, RAM: "4MiB", Disk: "64MiB", Kvtierd: bin, Say: t.Logf}
	o.Dir, o.Keep = t.TempDir(), true
	rep, err := Run(context.Background(), o)
	if err != nil {
		t.Fatal(err)
	}
	check(t, rep)
	// The same context once more, from where the first run ended.
	kept, err := filepath.Glob(filepath.Join(o.Dir, "*"))
	if err != nil || len(kept) != 1 {
		t.Fatal(kept, err)
	}
	o.Folder = kept[0]
	if rep, err = Run(context.Background(), o); err != nil {
		t.Fatal(err)
	}
	check(t, rep)
	if want := uint64(o.Geometry.Tokens + 2*o.steps()); rep.Reopen.Accepted != want {
		t.Errorf("%d tokens, not %d", rep.Reopen.Accepted, want)
	}
	o.Seed = 2
	if _, err = Run(context.Background(), o); err == nil {
		t.Error("another model's context is taken")
	}
}

// build builds the daemon.
func build(t *testing.T, flags ...string) string {
	t.Helper()
	bin := filepath.Join(t.TempDir(), "kvtierd")
	args := append(append([]string{"build"}, flags...), "-o", bin, "kvtier/cmd/kvtierd")
	if out, err := exec.Command("go", args...).CombinedOutput(); err != nil {
		t.Fatalf("build kvtierd: %v\n%s", err, out)
	}
	return bin
}

// TestRunOnGPU: the same with a GPU, which `make test-cuda` emulates: once segments lie there, everything is read, and answers err by the codec alone; or the pages
// that matter most.
func TestRunOnGPU(t *testing.T) {
	cudatest.Open(t)
	bin := build(t, "-tags", "cuda")
	for above, name := range map[int]string{0: "everything", 1: "pages"} {
		t.Run(name, func(t *testing.T) {
			o := Options{Geometry: synth.Geometry{Tokens: 2*synth.BlockTokens + 300, Layers: 2, KVHeads: 1, Group: 4, HeadDim: 64}, Seed: 1, Budgets: []int{1024},
				Warm: 10, Steps: 4, Audits: 4, Dense: 1, RAM: "4MiB", Disk: "64MiB", GPU: "64MiB", GPUAbove: above, Kvtierd: bin, Say: t.Logf}
			o.Dir = t.TempDir()
			rep, err := Run(context.Background(), o)
			if err != nil {
				t.Fatal(err)
			}
			x := rep.Decode[0]
			if x.GPUBytes == 0 || x.RAMBytes+x.NVMeBytes > 0 || (x.EstimatedError > 0) != (above > 0) {
				t.Errorf("decode: %+v", x)
			}
			most := 2 * x.CodecError
			if above > 0 {
				most = .3
			}
			if !(x.Audit.Mean > 0 && x.Audit.Mean < most) {
				t.Errorf("errors %+v, of the codec %v", x.Audit, x.CodecError)
			}
			if r := rep.Reopen; r.Accepted != r.Expected {
				t.Errorf("reopen: %+v", r)
			}
		})
	}
}

func check(t *testing.T, rep *Report) {
	t.Helper()
	if want := uint64(3 * synth.BlockTokens); rep.Build.Sealed != want {
		t.Errorf("%d tokens sealed, want %d", rep.Build.Sealed, want)
	}
	for _, d := range rep.Decode {
		if d.Steps != 4 || d.RAMBytes+d.NVMeBytes == 0 {
			t.Errorf("decode: %+v", d)
		}
		if x := d.Strong; x.Layers != 2 || x.Unread > x.Tokens { // heads so short have few strong ones
			t.Errorf("strong tokens: %+v", x)
		}
		if a := d.Audit; a.Calls != 4 || a.Rows != 16 || !(a.Mean > 0 && a.Mean < .3) || !(a.Oracle > 0 && a.Oracle < 1) {
			t.Errorf("audit: %+v", a)
		}
	}
	if r := rep.Reopen; r.Accepted != r.Expected || r.Difference > 1e-3 {
		t.Errorf("reopen: %+v", r)
	}
}

func TestRefuses(t *testing.T) {
	for _, o := range []Options{{}, {Geometry: synth.Geometry{Tokens: 8192}, Steps: 1}, {Geometry: synth.Geometry{Tokens: 8192}, Budgets: []int{1}}} {
		if _, err := Run(context.Background(), o); err == nil {
			t.Errorf("%+v is taken", o)
		}
	}
}
