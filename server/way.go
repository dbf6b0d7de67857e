package server

import (
	"fmt"
	"slices"
	"strings"

	kvtierv1 "kvtier/proto/kvtier/v1"
	"kvtier/server/sparse"
	"kvtier/tiers"
)

// A budget bounds bytes, because bytes from a disk cost time. Choosing them line by line costs time, too, more than bytes
// that RAM gives are worth: from there it is quicker to read pages whole, or everything
// (docs/decisions/0021-all-from-ram.md, 0037-by-page.md).

// ByPage says which budgets are answered from whole pages.
type ByPage int

// The values of ByPage: none, those of which all that is stored lies in RAM, and all.
const (
	NeverByPage ByPage = iota
	ByPageFromRAM
	AlwaysByPage
)

var byPageNames = []string{"never", "ram", "always"}

func (b ByPage) String() string {
	if b < 0 || int(b) >= len(byPageNames) {
		return fmt.Sprintf("ByPage(%d)", int(b))
	}
	return byPageNames[b]
}

// MarshalText returns the name.
func (b ByPage) MarshalText() ([]byte, error) { return []byte(b.String()), nil }

// UnmarshalText takes a name.
func (b *ByPage) UnmarshalText(name []byte) error {
	i := slices.Index(byPageNames, string(name))
	if i < 0 {
		return fmt.Errorf("%q: it is one of %s", name, strings.Join(byPageNames, ", "))
	}
	*b = ByPage(i)
	return nil
}

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
	all := opt.ReadAllInRAM > 0 && share >= opt.ReadAllInRAM
	switch {
	case (all || opt.ByPage == ByPageFromRAM) && c.inRAM():
		if all {
			return whole
		}
		return byPage
	case opt.ByPage == AlwaysByPage:
		return byPage
	}
	return byLine
}

// inRAM says whether all that is stored of the call's sealed tokens lies in RAM. Lossless rows take longer to read than a choice among their codes does:
// as if they did not.
func (c *call) inRAM() bool {
	for _, s := range c.seq.srv.segmentsOf(c.st, c.layer, c.st.sealed()) {
		if s.Header.Profile == tiers.ProfileExact || !c.seq.srv.store.InRAM(s.Header, sparse.WholePlanes(s)) {
			return false
		}
	}
	return true
}
