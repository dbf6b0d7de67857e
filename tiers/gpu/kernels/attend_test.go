package kernels

import (
	"fmt"
	"math"
	"math/rand/v2"
	"testing"

	"kvtier/tiers"
	"kvtier/tiers/gpu/cuda/cudatest"
)

// mostError is how much an output may differ from that of the dense oracle, relative, and a log-sum-exp. Both read the same codes: what
// differs is words of folded queries, of 16 bits, and weights, in binary16.
const mostError = 1e-2

// agree attends to random segments and compares with the oracle, for few warps and for many.
func agree(t *testing.T, a *Attention, m shape, rows int, softcap float32, strength float64, seed uint64) {
	t.Helper()
	rng := rand.New(rand.NewPCG(seed, 3))
	all := m.make(rng)
	q := m.query(rng, rows, strength)
	outs, lses := dense(t, all, q, float64(softcap))
	segments := resident(t, a.device, all)
	warps := []int{1, 8, 64}[rng.IntN(3)]
	got, err := answer(a, segments, Warps{warps, warps}, q, softcap)
	if err != nil {
		t.Fatalf("%+v, %d rows: %v", m, rows, err)
	}
	output, lse := differs(got, outs, lses)
	if output > mostError || lse > mostError {
		t.Fatalf("seed %d, %+v, %d rows, softcap %g, strength %g: output errs by %.2g, log-sum-exp by %.2g", seed, m, rows, softcap, strength, output, lse)
	}
	t.Logf("%+v, %d rows, softcap %g: %.1e, %.1e", m, rows, softcap, output, lse)
}

// TestDense compares random shapes with a dense oracle in float64.
func TestDense(t *testing.T) {
	a := newAttention(t, cudatest.Open(t))
	some := func(rng *rand.Rand, d int, tokens ...int) shape {
		m := shape{d: d, heads: 1 + rng.IntN(2), tokens: tokens, profile: tiers.ProfileBalanced}
		switch rng.IntN(4) {
		case 0:
			m.profile = tiers.ProfileNeutral
		case 1:
			m.low = true
		case 2:
			m.low, m.hide = true, true
		}
		if rng.IntN(3) == 0 {
			m.sinks = tiers.SinkTokens
		}
		return m
	}
	for _, d := range HeadDims {
		t.Run(fmt.Sprint(d), func(t *testing.T) {
			rng := rand.New(rand.NewPCG(uint64(d), 4))
			ask := func(m shape) {
				t.Helper()
				softcap := float32(0)
				if rng.IntN(4) == 0 {
					softcap = float32(5 + rng.IntN(40))
				}
				agree(t, a, m, 1+rng.IntN(17), softcap, 5*rng.Float64(), rng.Uint64())
			}
			// Every length of a last page, behind any number of whole ones, with outliers and without; of the other head dimensions a part of the lengths.
			for last := 1; last <= tiers.PageTokens; last++ {
				if testing.Short() && last%16 != d/64 {
					continue
				}
				if d == 64 || last%4 == d/128 {
					m := some(rng, d, last+tiers.PageTokens*rng.IntN(7))
					m.heads = 1
					ask(m)
				}
			}
			for outliers := 8; outliers <= 18; outliers += 256 / d { // drains are 16 at most
				m := some(rng, d, tiers.StepTokens+outliers)
				m.heads = 1
				ask(m)
			}
			ask(shape{d: d, heads: 1, profile: tiers.ProfileBalanced, tokens: []int{264, 300, 270, 280, 290, 267}}) // more drains than warps
			if testing.Short() {
				return
			}
			for range 6 {
				ask(some(rng, d, 1+rng.IntN(300), 1+rng.IntN(300), 1+rng.IntN(100)))
			}
			ask(some(rng, d, tiers.SegmentTokens, 1+rng.IntN(tiers.SegmentTokens)))
		})
	}
}

// TestExtremes compares where numbers are far from 1.
func TestExtremes(t *testing.T) {
	a := newAttention(t, cudatest.Open(t))
	for i, d := range HeadDims {
		if testing.Short() && i > 0 {
			break
		}
		for j, m := range []shape{
			{keys: 0x1p-90}, {keys: 0x1p-40}, {keys: 0x1p40}, {keys: 0x1p100},
			{values: 0x1p-120}, {values: 0x1p-60}, {values: 0x1p60}, {values: 0x1p100},
			{constant: true}, {flat: true}, {flat: true, values: 0x1p-100}, {keys: 0x1p60, values: 0x1p-80},
		} {
			m.d, m.heads, m.tokens = d, 1, []int{260 + 5*j, 30}
			m.profile, m.low = tiers.ProfileBalanced, j%2 == 1
			agree(t, a, m, 1+(3*j+i)%9, 0, 2, uint64(10*i+j))
		}
	}
}

// TestPeaks asks so that one token, or a few, have all the weight.
func TestPeaks(t *testing.T) {
	a := newAttention(t, cudatest.Open(t))
	for i, d := range HeadDims {
		agree(t, a, shape{d: d, heads: 2, tokens: []int{333, 70}, profile: tiers.ProfileNeutral}, 5, 0, 15, uint64(i))
		agree(t, a, shape{d: d, heads: 1, tokens: []int{200}, profile: tiers.ProfileBalanced}, 3, 0, 0, uint64(i)) // a query of zeros
	}
}

// TestOverflow has values so large that sums of them may be no float32: that is an error, or right.
func TestOverflow(t *testing.T) {
	a := newAttention(t, cudatest.Open(t))
	m := shape{d: 64, heads: 1, tokens: []int{900}, profile: tiers.ProfileBalanced, values: 0x1p119, constant: true}
	rng := rand.New(rand.NewPCG(5, 6))
	all := m.make(rng)
	q := m.query(rng, 2, 0)
	outs, lses := dense(t, all, q, 0)
	got, err := answer(a, resident(t, a.device, all), Warps{8, 8}, q, 0)
	if err == nil {
		if output, lse := differs(got, outs, lses); output > mostError || lse > mostError {
			t.Fatalf("output errs by %g, log-sum-exp by %g", output, lse)
		}
	}
	q[3] = float32(math.NaN())
	if _, err = answer(a, resident(t, a.device, all), Warps{8, 8}, q, 0); err == nil {
		t.Fatal("an answer to what is no number")
	}
	for _, share := range []uint32{1, Everything / 2, Everything - 1} {
		if _, err = answerShare(a, resident(t, a.device, all), Warps{8, 8}, q, 0, share); err == nil {
			t.Fatal("an answer to what is no number, of a part of the pages")
		}
	}
}
