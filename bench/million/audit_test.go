package million

import (
	"cmp"
	"math/rand/v2"
	"slices"
	"testing"

	"kvtier/bench/synth"
)

// An oracle that may read everything does not err, and the more it reads, the less it does.
func TestOracle(t *testing.T) {
	t.Parallel()
	m, err := synth.New(synth.Geometry{Tokens: 3 * synth.BlockTokens, Layers: 1, KVHeads: 2, Group: 4, HeadDim: 64}, 1)
	if err != nil {
		t.Fatal(err)
	}
	r := &run{m: m}
	position := 2*synth.BlockTokens + 100
	block := m.Block(2)
	var calls []asked
	reads := []int{1, 100, 1000, 1 << 30}
	for _, n := range reads {
		calls = append(calls, asked{position: position, read: n, q: rounded(m.Query(block, 100, 0)), out: make([]float32, m.KVHeads*m.Group*m.HeadDim)})
	}
	found, err := r.auditLayer(t.Context(), 0, calls)
	if err != nil {
		t.Fatal(err)
	}
	last := 2.
	for i, rows := range found {
		sum := 0.
		for _, x := range rows {
			if x.err != 1 { // of zeros
				t.Errorf("zeros err by %v", x.err)
			}
			if all := x.sink + x.recent + x.body; all < .999 || all > 1.001 {
				t.Errorf("zones have %v", all)
			}
			sum += x.oracle
		}
		mean := sum / float64(len(rows))
		if !(mean < last) || mean > 1e-3 != (i < len(reads)-1) {
			t.Errorf("who reads %d tokens errs by %v, who reads less by %v", reads[i], mean, last)
		}
		last = mean
	}
}

func TestScoreCounts(t *testing.T) {
	t.Parallel()
	rng := rand.New(rand.NewPCG(1, 1))
	scores := make([]float32, 5000)
	for i := range scores {
		scores[i] = float32(rng.NormFloat64() * 20)
	}
	scores[0], scores[1] = 1e6, -1e6 // beyond what is counted apart
	var c, o scoreCounts
	c.add(scores[:2000])
	o.add(scores[2000:])
	c.merge(&o)
	slices.SortFunc(scores, func(a, b float32) int { return cmp.Compare(b, a) })
	for _, n := range []int{1, 2, 10, 1000, 4999} {
		least := c.least(n)
		if scores[n-1] < least || n < len(scores)-1 && n > 1 && least < scores[n-1]-1./countsPerNat {
			t.Errorf("%d tokens: from %v on, the last is %v", n, least, scores[n-1])
		}
	}
	if least := c.least(len(scores) + 1); !(least < -1e9) {
		t.Errorf("more than all: from %v on", least)
	}
}
