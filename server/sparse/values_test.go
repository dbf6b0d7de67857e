package sparse

import (
	"math/rand/v2"
	"testing"

	"kvtier/compress"
	"kvtier/tiers"
	"kvtier/tiers/seal"
)

// Values that share a cache line are read together, but for the last one that is paid for.
func TestValuesShareLines(t *testing.T) {
	rng := rand.New(rand.NewPCG(87, 88))
	s := newSample(rng, 4096, 1, 64)
	f := sealed(rng, s, seal.Options{Profile: tiers.ProfileBalanced}, compress.BF16, 2048, 4096)
	for range 5 {
		u := newRun(t.Context(), f.reader, f.segs, []int{0, 1}, f.query(rng, 0, 2), Budget{Share: .2}, &Trace{})
		for _, stage := range []func() error{u.scorePages, u.scan, func() error { return u.refine(1) }, func() error { return u.refine(2) }} {
			if err := stage(); err != nil {
				t.Fatal(err)
			}
		}
		read := map[[2]int]int{} // tokens by segment and line
		chosen := u.affordable()
		for _, token := range chosen {
			_, codes := u.segs[u.segmentOf(token)].view.ValueRanges(u.place(token))
			read[[2]int{u.segmentOf(token), codes.Off / tiers.LineSize}]++
		}
		alone := 0
		for _, n := range read {
			if n == 1 {
				alone++
			}
		}
		if len(chosen) < 20 || alone > 1 {
			t.Errorf("of %d values %d are read without what their lines hold besides", len(chosen), alone)
		}
		u.release()
	}
}
