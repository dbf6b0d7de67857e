package sparse

import (
	"kvtier/attention/kernels"
	"kvtier/compress"
	"kvtier/tiers"
)

// refine reads the next plane of keys of the leaves where that is worth more
// than anything else that the rest of the budget can buy.
func (u *run) refine(plane int) error {
	bytes := float32(compress.KeyPlaneBytes(u.d)[plane])
	least := u.offers(plane).threshold(u.left)
	var chosen []int
	for i := range u.leaves {
		if x := &u.leaves[i]; len(x.planes) == plane && plane < x.most && x.keyGain[plane]/bytes >= least {
			chosen = append(chosen, i)
		}
	}
	if plane == 1 {
		u.acc.Scans = int64(len(chosen))
	} else if plane == 3 {
		u.acc.Refined = int64(len(chosen))
	}
	if err := u.readKeys(plane, chosen); err != nil {
		return err
	}
	for _, i := range chosen {
		u.weigh(&u.leaves[i])
	}
	return nil
}

// offers are the bits of keys and the values that can be read of leaves of which
// so many planes are read at least: others were not worth the last one. They are good until the next call.
func (u *run) offers(planes int) *histogram {
	clear(u.hist[:])
	var perByte [compress.NumKeyPlanes]float32
	bytes := compress.KeyPlaneBytes(u.d)
	for p, n := range bytes {
		perByte[p] = 1 / float32(n)
	}
	value := u.valueBytes()
	perValue := 1 / value
	for i := range u.leaves {
		x := &u.leaves[i]
		if len(x.planes) < planes {
			continue
		}
		for p := len(x.planes); p < x.most; p++ {
			u.hist.add(x.keyGain[p]*perByte[p], float32(bytes[p]))
		}
		for _, gain := range u.valueGain[x.at:][:tiers.LeafTokens] {
			u.hist.add(gain*perValue, value)
		}
	}
	return &u.hist
}

// valueBytes is about what reading one value costs: its row, and a share of the
// line that holds its scale.
func (u *run) valueBytes() float32 { return float32(lines(compress.ValueRowBytes(u.d))) + 32 }

// aheadLeaves is how many leaves before their use keys are fetched into the cache.
const aheadLeaves = 8

// readKeys reads a plane of the chosen leaves, which are in order of place, and
// scores their tokens anew.
func (u *run) readKeys(plane int, chosen []int) error {
	ranges := make([][]tiers.Range, len(u.segs))
	bySeg := make([][]int, len(u.segs))
	from := tiers.KeyPlanes[plane]
	if from == tiers.PlaneK8 {
		from = tiers.PlaneDrains
	}
	for _, i := range chosen {
		x := &u.leaves[i]
		bySeg[x.seg] = append(bySeg[x.seg], i)
		at := u.segs[x.seg].view.LeafKeys(plane, x.i)
		if from == tiers.PlaneDrains {
			at = u.segs[x.seg].view.DrainKeys()
		}
		ranges[x.seg] = append(ranges[x.seg], at)
	}
	if plane == 0 {
		for _, i := range chosen {
			u.acc.Scanned += int64(u.leaves[i].n)
		}
	}
	return u.each(from, ranges, func(seg int, b [][]byte) error {
		for i, at := range bySeg[seg] {
			kernels.Prefetch(b[min(i+aheadLeaves, len(b)-1)])
			u.leaves[at].planes = append(u.leaves[at].planes, b[i])
			u.scoreLeaf(&u.leaves[at])
		}
		return nil
	})
}
