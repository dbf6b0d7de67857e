package sparse

import (
	"math"
	"math/rand/v2"
	"slices"
	"testing"

	"kvtier/attention"
	"kvtier/compress"
	"kvtier/tiers"
	"kvtier/tiers/seal"
)

// tellApart sets of how many pages all are told apart, for a test.
func tellApart(t *testing.T, n int) {
	was := allApart
	allApart = n
	t.Cleanup(func() { allApart = was })
}

// A context of which few pages are told apart: tokens are counted once, weights sum to 1, and answers are about as
// good as if all pages were.
func TestRest(t *testing.T) {
	rng := rand.New(rand.NewPCG(51, 52))
	s := newSample(rng, 16384, 1, 64)
	f := sealed(rng, s, seal.Options{Profile: tiers.ProfileBalanced, Sinks: 16}, compress.BF16, 2048, 4096, 6144, 8192, 10240, 12288, 14336, 16384)
	zone := func(q Query) Query {
		q.Partials = attention.NewPartials(len(q.Partials), s.d)
		attention.Attend(q.Partials, q.Q, s.k[:16*s.d], s.v[:16*s.d], s.d, q.Softcap, nil)
		return q
	}
	var errApart, errRest float32
	off := 0.
	for i := range 12 {
		q := f.query(rng, 0, 3)
		if i%3 == 2 {
			q.Softcap = 20
		}
		want, lse := f.dense(q, s.k, s.v)
		tellApart(t, 1<<20)
		apartQ := zone(q)
		apartOut, _ := f.ask(t, apartQ, Budget{Share: .05})
		tellApart(t, 24)
		q = zone(q)
		weights := make([]float64, len(q.Partials))
		seen := map[[3]int]bool{}
		tr := &Trace{Token: func(row, segment, place int, log float32, _ How) {
			if key := [3]int{row, segment, place}; seen[key] {
				t.Fatalf("token %v twice", key)
			} else {
				seen[key] = true
			}
			weights[row] += math.Exp(float64(log))
		}}
		for r := range weights {
			weights[r] = math.Exp(float64(q.Partials[r].LSE()))
		}
		acc, err := Attend(t.Context(), f.reader, f.segs, q, Budget{Share: .05}, tr)
		if err != nil {
			t.Fatal(err)
		}
		if n := int64(s.n - 16); acc.Scanned > n || len(seen) != len(weights)*int(n) || acc.Estimated+acc.Read != n {
			t.Errorf("%d tokens traced, %d estimated, %d read of %d", len(seen)/len(weights), acc.Estimated, acc.Read, n)
		}
		for r, w := range weights {
			if got := float64(q.Partials[r].LSE()); math.Abs(math.Log(w)-got) > 1e-3 {
				t.Errorf("row %d: traced weights sum to %v, not %v", r, math.Log(w), got)
			}
			off += math.Abs(float64(q.Partials[r].LSE()-lse[r])) - math.Abs(float64(apartQ.Partials[r].LSE()-lse[r]))
		}
		var out [][]float32
		for r := range q.Partials {
			o := make([]float32, s.d)
			q.Partials[r].Output(o)
			out = append(out, o)
		}
		errApart, errRest = errApart+meanError(apartOut, want)/12, errRest+meanError(out, want)/12
	}
	if off /= 36; off > .15 {
		t.Errorf("log-sum-exps are off by %v more than if all pages are told apart", off)
	}
	if errRest > 1.3*errApart+.01 {
		t.Errorf("error %v, %v if all pages are told apart", errRest, errApart)
	}
}

// What is not told apart has the sum of its pages' masses, and their mean value.
func TestRestIsSum(t *testing.T) {
	rng := rand.New(rand.NewPCG(53, 54))
	s := newSample(rng, 8192, 1, 64)
	f := sealed(rng, s, seal.Options{Profile: tiers.ProfileBalanced}, compress.BF16, 2048, 4096, 6144, 8192)
	q := f.query(rng, 0, 2)
	make_ := func(apart int) *run {
		tellApart(t, apart)
		u := newRun(t.Context(), f.reader, f.segs, []int{0, 1, 2, 3}, q, Budget{Share: .05}, &Trace{})
		if err := u.scorePages(); err != nil {
			t.Fatal(err)
		}
		return u
	}
	all := make_(1 << 20)
	defer all.release()
	few := make_(80)
	defer few.release()
	if few.pages == 0 || few.pages > all.pages/2 || few.all != all.pages {
		t.Fatalf("%d of %d pages are told apart", few.pages, few.all)
	}
	for r := range few.rows {
		out, found := attention.NewPartials(1, s.d), float32(math.Inf(-1))
		row := make([]float32, s.d)
		for i := range all.segs {
			a, b := &all.segs[i], &few.segs[i]
			values := f.meanValues(t, i, a.view)
			for p := range a.view.Pages() {
				mass := all.mass[r*all.slots+a.firstPage+p]
				if at := slices.Index(few.pageOf[b.firstPage:b.endPage], int32(p)); at >= 0 {
					if got := few.mass[r*few.slots+b.firstPage+at]; math.Abs(float64(got-mass)) > 1e-4 {
						t.Fatalf("page %d of segment %d weighs %v, not %v", p, i, got, mass)
					}
					continue
				}
				values.Row(row, p)
				out[0].Add(mass, row)
				found = logAdd(found, mass)
			}
		}
		least := 1e-3 + 1e-6*math.Exp(float64(few.total[r]-found)) // what it is taken off may be many times as much
		if d := math.Abs(float64(found - few.rest.mass[r])); d > least {
			t.Errorf("row %d: the rest weighs %v, not %v", r, few.rest.mass[r], found)
		}
		out[0].Output(row)
		if e := attention.RelativeError(few.rest.means[r], row); float64(e) > least {
			t.Errorf("row %d: the rest's mean is off by %v", r, e)
		}
	}
}

func TestKthLargest(t *testing.T) {
	rng := rand.New(rand.NewPCG(55, 56))
	x := make([]float32, 3000)
	for i := range x {
		x[i] = float32(rng.NormFloat64() * 10)
	}
	x[7], x[8] = -inf, inf
	for _, k := range []int{1, 20, 700, 2999, 3000} {
		least, n := kthLargest(x, k), 0
		for _, v := range x {
			if v >= least {
				n++
			}
		}
		if n > k || float64(n) < .9*float64(k)-1 {
			t.Errorf("%d reach the bound for %d", n, k)
		}
	}
	for _, v := range []float32{0, 1.5, -1.5, inf, -inf, 3e-30} {
		if got := ascending(uint32(descending(v))); got != v {
			t.Errorf("%v comes back as %v", v, got)
		}
	}
}
