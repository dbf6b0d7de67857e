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

// Heads whose presence is overestimated, as that of large queries is, take no
// places from the others.
func TestEveryHeadChoosesPages(t *testing.T) {
	const pages, rows, best = 64, 3, 37
	v := seal.View{D: 64, Info: tiers.HeadInfo{Body: pages * tiers.PageTokens, Outliers: tiers.PageTokens}}
	u := &run{scratch: &scratch{segs: []segmentRun{{view: v, endPage: pages + 1}}}, rows: rows, all: pages + 1, pages: pages + 1, slots: pages + 2, total: make([]float32, rows)}
	u.weights, u.scratch.rank = make([]float32, u.slots), make([]float32, rows*u.slots)
	for i := range pages + 1 {
		u.pageOf = append(u.pageOf, int32(i))
		for r, presence := range []float32{float32(8 + i%16), float32(8 - i%16), -20} {
			u.rank[r*u.slots+i] = presence
		}
	}
	u.rank[2*u.slots+best] = -4
	chosen := attention.Top(u.rankPages(), 1+rows+1)
	found := map[int]bool{}
	for _, i := range chosen {
		found[i] = true
	}
	if !found[pages] {
		t.Error("outliers are not looked at")
	}
	if !found[best] {
		t.Errorf("pages %v are looked at, but not page %d, the best one of the third head", chosen, best)
	}
}

// Where the first look finds nothing that is worth more, further pages are
// looked at; no byte is read twice for it, and none more than the budget.
func TestSecondLook(t *testing.T) {
	rng := rand.New(rand.NewPCG(21, 22))
	s := newSample(rng, 6000, 1, 64)
	f := sealed(rng, s, seal.Options{Profile: tiers.ProfileBalanced}, compress.BF16, 2048, 4096, 6000)
	further := 0
	for range 20 {
		q := Query{Q: randn(rng, 2*s.d, .15), Partials: attention.NewPartials(2, s.d)}
		for _, share := range []float32{.1, .2, .4} {
			var b body
			for _, x := range f.segs {
				b.add(view(x, 0))
			}
			b.withMap(share)
			first, most := b.scannedPages(share)
			_, acc := f.ask(t, Query{Q: q.Q, Partials: attention.NewPartials(2, s.d)}, Budget{Share: share})
			leaves := int64(tiers.PageTokens / tiers.LeafTokens)
			if acc.Leaves < leaves*int64(first-2) || acc.Leaves > leaves*int64(most) {
				t.Errorf("share %v: %d leaves scanned, not %d to %d pages", share, acc.Leaves, first, most)
			}
			if acc.Leaves > leaves*int64(first) {
				further++
			}
			if moved := float64(acc.Moved.RAM); moved > 1.02*float64(share)*float64(acc.Full) {
				t.Errorf("share %v: %v of %d bytes moved", share, moved, acc.Full)
			}
			if acc.Scanned+acc.Estimated < int64(s.n) || acc.Scanned > acc.Leaves*tiers.LeafTokens {
				t.Errorf("%d tokens scanned and %d estimated of %d", acc.Scanned, acc.Estimated, s.n)
			}
		}
	}
	if further < 10 {
		t.Errorf("a second look was taken %d times of 60", further)
	}
}

// Of a group of tokens those bins are read that the planes of its leaves need; something stands for the others.
func TestBinsOfKnownChannels(t *testing.T) {
	rng := rand.New(rand.NewPCG(83, 84))
	for _, d := range []int{64, 128, 256} {
		s := newSample(rng, 4096, 1, d)
		f := sealed(rng, s, seal.Options{Profile: tiers.ProfileBalanced}, compress.BF16, 2048, 4096)
		u := newRun(t.Context(), f.reader, f.segs, []int{0, 1}, f.query(rng, 0, 2), Budget{Share: .15}, &Trace{})
		for _, stage := range []func() error{u.scorePages, u.scan, func() error { return u.refine(1) }} {
			if err := stage(); err != nil {
				t.Fatal(err)
			}
		}
		needs, seg := make([]int, len(u.groups)), make([]int, len(u.groups))
		for i := range u.leaves {
			x := &u.leaves[i]
			seg[x.group] = int(x.seg)
			needs[x.group] = max(needs[x.group], u.segs[x.seg].codes.known[x.planes-1])
		}
		few, steps, standIn := 0, compress.NewKeySteps(d), compress.NewKeySteps(d)
		for i, need := range needs {
			g, of := &u.groups[i], &u.segs[seg[i]]
			if g.read*16 != need {
				t.Fatalf("dimension %d: bins of %d channels are read, %d are needed", d, g.read*16, need)
			}
			if need == 0 {
				continue
			}
			if need < d {
				few++
			}
			r := of.view.Steps(i - of.firstGroup)
			if err := steps.Parse(f.plane(seg[i], tiers.PlaneSteps)[r.Off:r.Off+r.Len], of.view.Info.KeyExp); err != nil {
				t.Fatal(err)
			}
			of.codes.order.StandIn(standIn, of.view.Info.KeyExp)
			for j := range d {
				want := steps.Of(j, j+1)
				if j >= need {
					want = standIn.Of(j, j+1)
				}
				if g.steps.Lo[j] != want.Lo[0] || g.steps.Step[j] != want.Step[0] {
					t.Fatalf("dimension %d, channel %d of %d: bins from %v, size %v, not %v", d, j, need, g.steps.Lo[j], g.steps.Step[j], want)
				}
			}
		}
		if few == 0 {
			t.Errorf("dimension %d: all bins are read", d)
		}
		u.release()
	}
}

// Masses of made-up pages, whose scores scatter normally around their mean's, vary as they are said to.
func TestMassNoise(t *testing.T) {
	rng := rand.New(rand.NewPCG(85, 86))
	const n, pages = 64, 4000
	for _, spread := range []float64{.1, .5, 1, 2} {
		var sum, squares float64
		for range pages {
			var mass float64
			for range n {
				mass += math.Exp(math.Sqrt(spread)*rng.NormFloat64() - spread/2)
			}
			sum, squares = sum+mass/n, squares+mass*mass/n/n
		}
		mean := sum / pages
		want := squares/pages/mean/mean - 1
		got := float64(massNoise(exp(float32(spread)), n) - leastNoise)
		if got < .8*want || got > 1.25*want {
			t.Errorf("spread %v: masses vary by %v, not %v", spread, got, want)
		}
	}
}
