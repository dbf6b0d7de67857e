package sparse

import (
	"kvtier/compress"
	"kvtier/tiers"
)

// plan says which parts of the body are read at each stage. All are shares.
type plan struct {
	pages  float32 // pages whose leaves are scored
	leaves float32 // leaves whose keys are scanned at 2 bits
	refine float32 // leaves whose keys are scanned at 4 bits
	values float32 // tokens whose values are read
}

// planFor returns the largest plan along the measured path (docs/decisions/0004-budget-path.md)
// that transfers at most share of the body's 4-bit bytes from RAM.
func planFor(share float32, d int) plan {
	lo, hi := float32(0), float32(1)
	if at(1).cost(d) <= share {
		return at(1)
	}
	for range 20 {
		if mid := (lo + hi) / 2; at(mid).cost(d) <= share {
			lo = mid
		} else {
			hi = mid
		}
	}
	return at(lo)
}

// at is the path: a plan for every x in [0, 1], x being the share of leaves scanned.
func at(x float32) plan {
	p := plan{pages: min(1, 2*x), leaves: x, refine: x / 4, values: .01}
	if x > .2 {
		p.values += (x - .2) / 10
	}
	if x > .3 {
		f := (x - .3) / .7
		p.refine = .075 + f*.925
		p.values = .02 + f*.48
	}
	return p
}

// cost is the share of the body's 4-bit bytes that a plan transfers, in whole
// cache lines, summaries and steps included.
func (p plan) cost(d int) float32 {
	const line = 64
	lines := func(n int) float32 { return float32((n + line - 1) / line * line) }
	k2, _, _ := compress.KeyPlaneLeafBytes(d)
	row := compress.ValueRowBytes(d)
	full := float32(2*row + compress.ValueScaleBytes) // a token
	sum := float32(2*d + 8)                           // a unit's summary
	b := sum/tiers.PageTokens + p.pages*sum/tiers.LeafTokens
	b += (p.leaves + p.refine) * lines(k2) / tiers.LeafTokens
	// Leaves next to each other share their steps; scattered ones do not.
	b += min(1, p.leaves*8) * float32(compress.KeyStepsBytes(d)) / tiers.StepTokens
	b += float32(d) / 32 // outliers' keys
	b += p.values * (line + lines(row))
	return b / full
}
