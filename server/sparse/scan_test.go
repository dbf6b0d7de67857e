package sparse

import (
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
