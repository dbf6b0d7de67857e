package gpu

import (
	"math"
	"testing"
	"time"

	"pgregory.net/rapid"

	"kvtier/tiers/gpu/cuda"
)

// TestArena allocates and releases at random. What is given away never
// overlaps, and in the end all is free in one span.
func TestArena(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		a := &arena{limit: 1 << 20}
		a.add(1<<32, 300*grain)
		a.add(1<<33, 200*grain)
		var held []room
		for range rapid.IntRange(1, 60).Draw(t, "steps") {
			if len(held) > 0 && rapid.Bool().Draw(t, "release") {
				i := rapid.IntRange(0, len(held)-1).Draw(t, "which")
				a.release(held[i : i+1])
				if rapid.Bool().Draw(t, "again") {
					a.take(held[i])
					continue
				}
				held = append(held[:i], held[i+1:]...)
				continue
			}
			sizes := rapid.SliceOfN(rapid.IntRange(1, 60), 1, 5).Draw(t, "grains")
			for i := range sizes {
				sizes[i] *= grain
			}
			if rooms, ok := a.allocAll(sizes); ok {
				held = append(held, rooms...)
			}
		}
		used := map[cuda.Ptr]bool{}
		for _, r := range held {
			for off := 0; off < r.n; off += grain {
				at := r.ptr() + cuda.Ptr(off)
				if used[at] {
					t.Fatalf("%#x was given away twice", at)
				}
				used[at] = true
			}
		}
		free := 0
		for _, s := range a.slabs {
			for i, f := range s.free {
				if i > 0 && s.free[i-1].off+s.free[i-1].n >= f.off {
					t.Fatalf("spans touch: %v", s.free)
				}
				free += f.n
			}
		}
		if free+grain*len(used) != 500*grain {
			t.Fatalf("%d bytes free, %d used", free, grain*len(used))
		}
		a.release(held)
		for _, s := range a.slabs {
			if len(s.free) != 1 || s.free[0] != (span{0, s.size}) {
				t.Fatalf("not all is free: %v", s.free)
			}
		}
	})
}

func TestSlabSize(t *testing.T) {
	for _, c := range []struct {
		limit, mapped int64
		largest, want int
	}{
		{1 << 20, 0, 1000, 1 << 20},
		{1<<20 + 100, 0, 1000, 1 << 20},
		{1 << 20, 1 << 20, 256, 0},
		{1 << 20, 0, 2 << 20, 0},
		{64 << 20, 0, 256, 32 << 20},
		{64 << 20, 48 << 20, 256, 16 << 20},
		{64 << 20, 0, 40 << 20, 40 << 20},
		{60 << 30, 0, 256, maxSlab},
		{4 << 30, 0, 256, 64 << 20},
	} {
		a := arena{limit: c.limit, mapped: c.mapped}
		if got := a.slabSize(c.largest); got != c.want {
			t.Errorf("%+v: %d", c, got)
		}
	}
}

func TestHeat(t *testing.T) {
	const minute = time.Minute
	once := cold.used(0.25, 0)
	if !(cold < once && once < once.used(0, 0)) {
		t.Fatal("a use does not warm")
	}
	if nan := cold.used(float32(math.NaN()), 0); nan != cold.used(0, 0) || cold.used(7, 0) != cold.used(1, 0) {
		t.Fatal("attention that is none")
	}
	if cold.used(0, minute) <= cold.used(0, 0) {
		t.Fatal("the newer of two uses is not warmer")
	}
	// Two uses are one use, half a life later.
	if two, later := cold.used(1, 0).used(1, 0), cold.used(1, halfLife); math.Abs(float64(two-later)) > 1e-9 {
		t.Fatal(two, later)
	}
	// Years of use are still numbers.
	h := cold
	for year := range time.Duration(100) {
		before := h
		if h = h.used(1, year*365*24*time.Hour); !(h > before) || math.IsInf(float64(h), 1) {
			t.Fatal(h)
		}
	}
}

func TestSplitAndPack(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		const buffer = 8 * grain
		device, want := map[cuda.Ptr]byte{}, map[cuda.Ptr]byte{}
		var ts []transfer
		at := cuda.Ptr(grain)
		for i, n := range rapid.SliceOfN(rapid.IntRange(0, 20*grain), 0, 10).Draw(t, "sizes") {
			b := make([]byte, n)
			for j := range b {
				b[j] = byte(i + j/3)
				want[at+cuda.Ptr(j)] = b[j]
			}
			ts = append(ts, transfer{at: at, bytes: b})
			at += cuda.Ptr(roundUp(n))
			if rapid.Bool().Draw(t, "gap") {
				at += grain
			}
		}
		for _, batch := range split(ts, buffer) {
			for _, run := range pack(make([]byte, buffer), batch) {
				if len(run.bytes) == 0 {
					t.Fatal("an empty copy")
				}
				for j, b := range run.bytes {
					device[run.at+cuda.Ptr(j)] = b
				}
			}
		}
		for p, b := range want {
			if got, ok := device[p]; !ok || got != b {
				t.Fatalf("byte %#x is %d, %v, want %d", p, got, ok, b)
			}
		}
		for p, b := range device {
			if _, ok := want[p]; !ok && b != 0 {
				t.Fatalf("byte %#x is not of any piece", p)
			}
		}
	})
}
