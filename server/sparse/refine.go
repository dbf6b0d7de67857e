package sparse

import (
	"slices"

	"kvtier/compress"
	"kvtier/tiers"
)

// refine reads the next plane of keys of the leaves where that is worth more
// than anything else that the rest of the budget can buy.
func (u *run) refine(plane int) error {
	list := u.deep
	if plane == 1 {
		list = u.inOrder
	}
	clear(u.hist[:])
	u.offers(list, plane)
	var means []float32
	if plane == 1 {
		means = u.offerMeans()
	}
	least := u.hist.threshold(u.left)
	if err := u.readMeans(atLeast(means, least)); err != nil {
		return err
	}
	chosen := u.list[:0]
	for _, i := range list {
		if x := &u.leaves[i]; int(x.planes) == plane && x.planes < x.most && x.keyGain*u.perByte[plane] >= least {
			chosen = append(chosen, i)
		}
	}
	u.list = chosen
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
	if plane == 1 {
		for _, i := range u.inOrder {
			if u.leaves[i].deep >= 0 {
				u.deep = append(u.deep, i)
			}
		}
	}
	return nil
}

// valueBytes is about what reading one value costs: its row, and a share of the
// line that holds its scale.
func valueBytes(d int) float32 { return float32(lines(compress.ValueRowBytes(d))) + 32 }

// aheadLeaves is how many leaves before their use keys are fetched into the cache.
const aheadLeaves = 8

// readKeys reads a plane of the chosen leaves, which are in order of place, and
// scores their tokens anew.
func (u *run) readKeys(plane int, chosen []int) error {
	if err := u.readBins(chosen, plane); err != nil {
		return err
	}
	if u.anyLate() {
		chosen = slices.DeleteFunc(slices.Clone(chosen), func(i int) bool {
			x := &u.leaves[i]
			if u.hasBins(x, plane) {
				return false
			}
			u.isLate(x, x.all())
			x.most = x.planes // nothing behind it can be used either
			return true
		})
	}
	size := u.planeBytes[plane]
	from := tiers.KeyPlanes[plane]
	if from == tiers.PlaneK8 {
		from = tiers.PlaneDrains
	}
	for _, i := range chosen {
		x := &u.leaves[i]
		at := tiers.Range{Off: int(x.i) * size, Len: size}
		if from == tiers.PlaneDrains {
			at.Off = 0
		}
		u.want(int(x.seg), at)
	}
	return u.each(from, func(seg int, got got) error {
		list := u.ofSegment(&chosen, seg, func(leaf int) int { return leaf })
		for _, i := range list {
			x := &u.leaves[i]
			if b := got.next(size); b != nil {
				u.addPlane(x, b)
			} else {
				u.isLate(x, x.all())
				x.most = x.planes // nothing behind it can be used either
			}
		}
		u.scoreList(list, plane)
		return nil
	})
}

// scoreList weighs the tokens of the listed leaves of which the plane has come, as many leaves as can be together.
func (u *run) scoreList(list []int, plane int) {
	fetched := 0
	for lo, hi := 0, 0; lo < len(list); lo = hi {
		for hi = lo + 1; hi < len(list) && u.together(list[hi-1], list[hi]); hi++ {
		}
		for ; fetched < min(hi+aheadLeaves, len(list)); fetched++ {
			u.prefetch(&u.leaves[list[fetched]])
		}
		if int(u.leaves[list[lo]].planes) > plane {
			u.scoreLeaves(list[lo], list[hi-1]+1)
		}
	}
}

// together says whether leaf j can be weighed with leaf i: it comes behind it, and shares its bins and how many planes were read.
func (u *run) together(i, j int) bool {
	x, y := &u.leaves[i], &u.leaves[j]
	return j == i+1 && y.group == x.group && y.planes == x.planes
}
