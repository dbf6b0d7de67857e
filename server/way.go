package server

import (
	kvtierv1 "kvtier/proto/kvtier/v1"
	"kvtier/server/sparse"
	"kvtier/tiers"
)

// A budget bounds bytes, because bytes cost time. Choosing them line by line costs time, too, more than bytes that RAM gives are worth,
// and a disk gives blocks, of which lines take a part. So it is quicker to read pages whole, three times as many cache lines in about as many
// blocks, and from RAM it may be quicker to read everything (docs/decisions/0021-all-from-ram.md, 0037-by-page.md, 0038-pages-by-default.md).

// pageFactor is how many times as much as its budget says an answer by page may read: then it errs about as lines would, from a share of .1 on.
const pageFactor = 3

// way is how a call with a budget is answered.
type way int

const (
	byLine way = iota
	byPage
	whole // from everything
)

// chooseWay says how the call is to be answered.
func (c *call) chooseWay() way {
	opt, share := &c.seq.srv.opt, c.asked()
	if c.budget.mode != kvtierv1.AttendMode_ATTEND_MODE_BUDGET || c.seq.spec.window[c.layer] > 0 || share >= wholeShare {
		return byLine // or from everything, or without sealed tokens
	}
	switch {
	case opt.ReadAllInRAM > 0 && share >= opt.ReadAllInRAM && c.inRAM():
		return whole
	case opt.ByPage:
		return byPage
	}
	return byLine
}

// inRAM says whether all that is stored of the call's sealed tokens lies in RAM. Lossless rows take longer to read than a choice among their codes does:
// as if they did not.
func (c *call) inRAM() bool {
	for _, s := range c.sealedSegments() {
		if s.Header.Profile == tiers.ProfileExact || !c.seq.srv.store.InRAM(s.Header, sparse.WholePlanes(s)) {
			return false
		}
	}
	return true
}
