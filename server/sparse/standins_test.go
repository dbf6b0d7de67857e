package sparse

import (
	"math"
	"math/rand/v2"
	"testing"

	"kvtier/attention"
	"kvtier/compress"
	"kvtier/tiers"
	"kvtier/tiers/seal"
)

// A small budget reads the mean values of the heaviest pages, and no others; these stand for all, by their shares.
func TestStandIns(t *testing.T) {
	rng := rand.New(rand.NewPCG(61, 62))
	s := newSample(rng, 6000, 1, 64)
	f := sealed(rng, s, seal.Options{Profile: tiers.ProfileBalanced}, compress.BF16, 2048, 4096, 6000)
	q := f.query(rng, 0, 3)
	u := newRun(t.Context(), f.reader, f.segs, []int{0, 1, 2}, q, Budget{Share: .1}, &Trace{})
	defer u.release()
	if err := u.scorePages(); err != nil {
		t.Fatal(err)
	}
	var means []float32 // [pages][d]
	for i := range u.segs {
		values := f.meanValues(t, i, u.segs[i].view)
		row := make([]float32, s.d)
		for p := range values.Units() {
			values.Row(row, p)
			means = append(means, row...)
		}
	}
	known, row := 0, make([]float32, s.d)
	for p, is := range u.known {
		if !is {
			continue
		}
		known++
		if u.values.Row(row, p); attention.RelativeError(row, means[p*s.d:(p+1)*s.d]) > 0 {
			t.Errorf("page %d: another mean value", p)
		}
	}
	if want := heaviest * float64(u.pages); math.Abs(float64(known)-want) > 1 {
		t.Errorf("%d mean values are known, not %v", known, want)
	}
	outs, weights := attention.NewPartials(u.rows, s.d), u.table()
	for i := range weights {
		weights[i] = rng.Float32()
	}
	given := append([]float32(nil), weights...)
	u.addMeans(outs, weights)
	for r := range u.rows {
		w, mass, top := given[r*u.slots:], u.ofRow(u.mass, r), 0
		want, typical, sum, unknown := make([]float64, s.d), make([]float64, s.d), 0., 0.
		for p, is := range u.known {
			if mass[p] > mass[top] {
				top = p
			}
			if !is {
				unknown += float64(w[p])
				continue
			}
			share := math.Exp(float64(mass[p] - u.total[r]))
			sum += share
			for j, x := range means[p*s.d : (p+1)*s.d] {
				want[j] += float64(w[p]) * float64(x)
				typical[j] += share * float64(x)
			}
		}
		if !u.known[top] {
			t.Errorf("row %d: the mean value of its heaviest page is not known", r)
		}
		for j := range want {
			row[j] = float32(want[j] + unknown*typical[j]/sum)
		}
		if e := attention.RelativeError(outs[r].Out, row); e > 1e-4 {
			t.Errorf("row %d: sum of means is off by %v", r, e)
		}
	}
}

// Larger budgets, and contexts of which not all pages are told apart, read all mean values.
func TestAllMeans(t *testing.T) {
	rng := rand.New(rand.NewPCG(63, 64))
	f := sealed(rng, newSample(rng, 8192, 1, 64), seal.Options{Profile: tiers.ProfileBalanced}, compress.BF16, 2048, 4096, 6144, 8192)
	for _, c := range []struct {
		share float32
		apart int
		all   bool
	}{{.1, 1 << 20, false}, {.5, 1 << 20, true}, {.1, 80, true}} {
		tellApart(t, c.apart)
		u := newRun(t.Context(), f.reader, f.segs, []int{0, 1, 2, 3}, f.query(rng, 0, 2), Budget{Share: c.share}, &Trace{})
		if err := u.scorePages(); err != nil {
			t.Fatal(err)
		}
		all := true
		for _, is := range u.known {
			all = all && is
		}
		if all != c.all || u.sparing == c.all {
			t.Errorf("share %v, %d pages of %d told apart: all mean values are read: %v", c.share, u.pages, u.all, all)
		}
		u.release()
	}
}
