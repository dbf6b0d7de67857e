package sparse

import (
	"math"

	"kvtier/attention"
	"kvtier/compress"
	"kvtier/tiers"
	"kvtier/tiers/seal"
)

// plan says which parts of the body are read at each stage. All are shares.
type plan struct {
	pages  float64 // pages whose leaves are scored
	leaves float64 // leaves whose keys are scanned at 2 bits
	refine float64 // leaves whose keys are scanned at 4 bits
	values float64 // tokens whose values are read
}

// at is the path: a plan for every x in [0, 1], x being the share of leaves
// scanned (docs/decisions/0004-budget-path.md).
func at(x float64) plan {
	return plan{
		pages:  min(1, 2*x),
		leaves: x,
		refine: x * (.7 + .3*x),
		values: x/8 + .375*x*x*x,
	}
}

// planFor returns the largest plan on the path that transfers at most share of
// the body's 4-bit bytes from RAM; the least plan if what every query reads is
// more than that already.
func planFor(share float32, b body) plan {
	limit := float64(share) * b.full
	if b.cost(at(1)) <= limit {
		return at(1)
	}
	lo, hi := 0., 1.
	for range 20 {
		if mid := (lo + hi) / 2; b.cost(at(mid)) <= limit {
			lo = mid
		} else {
			hi = mid
		}
	}
	return at(lo)
}

// body counts what the segments of a query hold, to know what a plan costs.
type body struct {
	pages, leaves, groups, stored float64
	always                        float64 // bytes that every query reads
	full                          float64 // bytes of everything at 4 bits
	d                             int
}

func (b *body) add(v seal.View) {
	b.d = v.D
	b.pages += float64(v.Pages())
	b.leaves += float64(v.Leaves())
	b.groups += float64((v.Leaves() + leavesOfGroup - 1) / leavesOfGroup)
	b.stored += float64(v.Stored())
	b.full += float64(v.BytesAt4Bits())
	b.always += lines(attention.SummaryBytes(v.Pages(), v.D)) + lines(v.OutlierBytes())
}

// leavesOfGroup is how many leaves share their key steps.
const leavesOfGroup = tiers.StepTokens / tiers.LeafTokens

// cost is how many bytes a plan transfers from RAM, in whole cache lines.
func (b *body) cost(p plan) float64 {
	const leavesOfPage = tiers.PageTokens / tiers.LeafTokens
	k2, _, _ := compress.KeyPlaneLeafBytes(b.d)
	bytes := b.always
	bytes += p.pages * b.pages * lines(attention.SummaryBytes(leavesOfPage, b.d))
	bytes += (p.leaves + p.refine) * b.leaves * lines(k2)
	// A group's steps are read if any of its leaves is; at worst leaves lie scattered.
	bytes += (1 - math.Pow(1-p.leaves, leavesOfGroup)) * b.groups * lines(compress.KeyStepsBytes(b.d))
	return bytes + p.values*b.stored*(lines(compress.ValueScaleBytes)+lines(compress.ValueRowBytes(b.d)))
}

// lines is how many bytes of cache lines n bytes touch on average, if they lie
// at a multiple of n.
func lines(n int) float64 {
	if n == 0 {
		return 0
	}
	const line = 64
	align := min(n&-n, line)
	return float64(n - align + line)
}

// lineBytes is how many bytes of cache lines ranges touch; a line that ends one
// range and begins the next counts once.
func lineBytes(ranges []tiers.Range) int {
	const line = 64
	n, last := 0, -1
	for _, r := range ranges {
		if r.Len == 0 {
			continue
		}
		first, end := r.Off/line, (r.Off+r.Len-1)/line
		if first == last {
			first++
		}
		n += end - first + 1
		last = end
	}
	return n * line
}
