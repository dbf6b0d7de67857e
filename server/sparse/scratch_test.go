package sparse

import (
	"context"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"

	"kvtier/attention"
	"kvtier/compress"
	"kvtier/tiers"
	"kvtier/tiers/seal"
)

// Runs that take over each other's scratch, one after the other and at the same time, answer as the first.
func TestScratchIsReused(t *testing.T) {
	rng := rand.New(rand.NewPCG(71, 72))
	type question struct {
		f    *fixture
		q    Query
		b    Budget
		want []float32
	}
	ask := func(x *question) []float32 {
		q := x.q
		q.Partials = attention.NewPartials(len(q.Partials), x.f.d)
		if _, err := Attend(context.Background(), x.f.reader, x.f.segs, q, x.b, nil); err != nil {
			t.Error(err)
		}
		var out []float32
		for r := range q.Partials {
			out = append(out, q.Partials[r].Out...)
		}
		return out
	}
	var questions []*question
	for _, c := range []struct{ n, d, rows int }{{700, 64, 3}, {3000, 16, 1}, {1200, 128, 4}} {
		o := seal.Options{Profile: tiers.ProfileBalanced, Sinks: tiers.SinkTokens}
		f := sealed(rng, newSample(rng, c.n, 1, c.d), o, compress.F32, c.n/2, c.n)
		for _, b := range []Budget{{Share: .1}, {Share: .3}, {Share: .3, ByPage: true}} {
			x := &question{f: f, q: f.query(rng, 0, c.rows), b: b}
			x.want = ask(x)
			questions = append(questions, x)
		}
	}
	var wg sync.WaitGroup
	for _, x := range questions {
		wg.Go(func() {
			for range 5 {
				if !slices.Equal(ask(x), x.want) {
					t.Errorf("%d tokens of %d, %+v: another answer", x.f.n, x.f.d, x.b)
				}
			}
		})
	}
	wg.Wait()
}

// What a value is said to cost is what pinning all of them counts.
func TestValueLines(t *testing.T) {
	rng := rand.New(rand.NewPCG(73, 74))
	for _, d := range []int{16, 64, 80, 128} {
		f := sealed(rng, newSample(rng, 700, 1, d), seal.Options{Profile: tiers.ProfileBalanced, Sinks: tiers.SinkTokens}, compress.F32, 700)
		v := view(f.segs[0], 0)
		for _, n := range []int{1, 20, v.Stored()} {
			places := rng.Perm(v.Stored())[:n]
			lines, got := newValueLines(v, func(n int) []uint64 { return make([]uint64, n) }), 0.
			for _, t := range places {
				got += lines.take(v, t)
			}
			slices.Sort(places)
			var scales, codes, drains []tiers.Range
			for _, t := range places {
				scale, code := v.ValueRanges(t)
				scales, codes = append(scales, scale), append(codes, code)
				if v.IsDrain(t / tiers.LeafTokens) {
					drains = append(drains, v.DrainValue(t))
				}
			}
			counted := float64(tiers.LineBytes(scales) + tiers.LineBytes(codes) + tiers.LineBytes(drains))
			if got != counted {
				t.Errorf("d %d, %d values: %.0f bytes, counted %.0f", d, n, got, counted)
			}
		}
	}
}
