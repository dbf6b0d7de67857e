package nvme

import (
	"errors"
	"flag"
	"math/rand/v2"
	"slices"
	"testing"

	"kvtier/tiers"
	"kvtier/tiers/files"
)

var segmentsPut = flag.Int("fragments", 100_000, "how many segments TestFragments puts")

// noDisk is a file system whose files hold nothing: where runs lie is all that matters.
type noDisk struct{ files.FS }

func (noDisk) MkdirAll(string) error                       { return nil }
func (noDisk) List(string) ([]string, error)               { return nil, nil }
func (noDisk) SyncDir(string) error                        { return nil }
func (noDisk) Remove(string) error                         { return nil }
func (noDisk) Free(string) (int64, error)                  { return 1 << 40, nil }
func (noDisk) Open(string, files.Flag) (files.File, error) { return noFile{}, nil }

type noFile struct{ files.File }

func (noFile) Allocate(int64) error { return nil }
func (noFile) Direct() bool         { return false }
func (noFile) Close() error         { return nil }

// shape is what a layer's segment of a model takes, blocks.
type shape struct {
	name      string
	layers    int
	main, low uint32
}

var shapes = []shape{
	{"3 heads of 64", 30, 123, 97},
	{"1 head of 256", 18, 158, 129},
	{"8 heads of 128", 32, 620, 514},
	{"window of 512, 1 head of 256", 15, 128, 0},
}

// life is a sequence: segments that go together, and low parts that go earlier.
type life struct{ main, low []*stored }

// churn makes and deletes sequences until so many segments were put; where a part does not fit, the oldest or any is deleted. It
// returns the share of the limit that was free whenever a part did not fit, on average and at most, and how often that was.
func churn(t *testing.T, limit, extent int64, shapes []shape, segments int, rng *rand.Rand, oldest bool) (mean, most float64, fulls int) {
	t.Helper()
	tier, err := Open("/", Options{Bytes: limit, ExtentBytes: extent, FS: noDisk{}})
	if err != nil {
		t.Fatal(err)
	}
	defer tier.Close()
	var all []*life
	free := func(parts []*stored) {
		tier.mu.Lock()
		defer tier.mu.Unlock()
		for _, st := range parts {
			tier.freeLocked(st)
		}
	}
	drop := func(i int) {
		free(all[i].main)
		free(all[i].low)
		all = slices.Delete(all, i, i+1)
	}
	put := func(l *life, n uint32) *stored {
		for {
			st, err := tier.alloc(n)
			if err == nil {
				return st
			}
			if !errors.Is(err, tiers.ErrFull) {
				t.Fatal(err)
			}
			share := 1 - float64(tier.Usage().BytesUsed)/float64(limit)
			mean, most, fulls = mean+share, max(most, share), fulls+1
			victims := len(all)
			if slices.Contains(all, l) {
				victims--
			}
			if victims == 0 {
				t.Fatalf("%d blocks do not fit beside one sequence", n)
			}
			i := 0
			if !oldest {
				i = rng.IntN(victims)
			}
			drop(i)
		}
	}
	for segments > 0 {
		s, l := shapes[rng.IntN(len(shapes))], &life{}
		all = append(all, l)         // the last: never its own victim
		for range 1 + rng.IntN(12) { // spans
			for range s.layers {
				l.main = append(l.main, put(l, s.main))
				if s.low > 0 && len(l.low) < 4*s.layers {
					l.low = append(l.low, put(l, s.low))
				}
				segments--
			}
			if len(l.low) >= 4*s.layers { // the sequence outgrew reading everything
				free(l.low)
				l.low = l.low[:0:0]
			}
		}
		if rng.IntN(4) == 0 { // somebody deletes one
			drop(rng.IntN(len(all)))
		}
	}
	for len(all) > 0 {
		drop(rng.IntN(len(all)))
	}
	for _, x := range tier.mu.order {
		if !x.empty() || tier.mu.used != 0 {
			t.Errorf("%d bytes are used, and %s has %d free runs, after everything was deleted", tier.mu.used, ExtentName(x.number), len(x.free))
		}
	}
	return mean / float64(max(1, fulls)), most, fulls
}

// TestFragments: what stays free because no run is long enough is a small share of the limit, however long sequences
// of different models are made and deleted.
func TestFragments(t *testing.T) {
	one := shapes[:1]
	for _, c := range []struct {
		name          string
		limit, extent int64
		shapes        []shape
		oldest        bool
		within        float64
	}{
		{"one model", 4 << 30, 256 << 20, one, true, .1},
		{"one model, at random", 4 << 30, 256 << 20, one, false, .1},
		{"four models", 20 << 30, 256 << 20, shapes, true, .2},
		{"four models, at random", 20 << 30, 256 << 20, shapes, false, .2},
	} {
		t.Run(c.name, func(t *testing.T) {
			rng := rand.New(rand.NewPCG(1, 2))
			mean, most, fulls := churn(t, c.limit, c.extent, c.shapes, *segmentsPut, rng, c.oldest)
			t.Logf("full %d times, free then %.4f of the limit on average, %.4f at most", fulls, mean, most)
			if fulls == 0 || !(most <= c.within) {
				t.Errorf("full %d times, free %.3f of the limit at most", fulls, most)
			}
		})
	}
}
