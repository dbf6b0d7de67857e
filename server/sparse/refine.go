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
// so many planes are read at least: others were not worth the last one. Planes
// behind the next one are left out where they cannot be worth what the rest of
// the budget buys. Offers are good until the next call.
func (u *run) offers(planes int) *histogram {
	clear(u.hist[:])
	bytes, value := compress.KeyPlaneBytes(u.d), u.valueBytes()
	perValue := 1 / value
	var perByte [compress.NumKeyPlanes]float32
	for p, n := range bytes {
		perByte[p] = 1 / float32(n)
	}
	for i := range u.leaves {
		x := &u.leaves[i]
		if len(x.planes) < planes {
			continue
		}
		if p := len(x.planes); p < x.most {
			u.hist.add(x.keyGain[p]*perByte[p], float32(bytes[p]))
		}
		for _, gain := range u.valueGain[x.at:][:tiers.LeafTokens] {
			u.hist.add(gain*perValue, value)
		}
	}
	least := u.hist.threshold(u.left) // more offers only raise it
	for i := range u.leaves {
		x := &u.leaves[i]
		if len(x.planes) < planes {
			continue
		}
		var worth float32
		for p := len(x.planes) + 1; p < x.most; p++ {
			worth = max(worth, x.keyGain[p]*perByte[p])
		}
		if worth < least {
			continue
		}
		if x.bounded {
			u.weighAhead(x)
		}
		for p := len(x.planes) + 1; p < x.most; p++ {
			u.hist.add(x.keyGain[p]*perByte[p], float32(bytes[p]))
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
	ranges, bySeg := make([][]tiers.Range, len(u.segs)), u.bySegment(chosen, func(leaf int) int { return leaf })
	from := tiers.KeyPlanes[plane]
	if from == tiers.PlaneK8 {
		from = tiers.PlaneDrains
	}
	for _, i := range chosen {
		x := &u.leaves[i]
		at := u.segs[x.seg].view.LeafKeys(plane, x.i)
		if from == tiers.PlaneDrains {
			at = u.segs[x.seg].view.DrainKeys()
		}
		ranges[x.seg] = appendRange(ranges[x.seg], at)
		if plane == 0 {
			u.acc.Scanned += int64(x.n)
		}
	}
	size := compress.KeyPlaneBytes(u.d)[plane]
	return u.each(from, ranges, func(seg int, b [][]byte) error {
		var bytes []byte // that are left of a range
		for _, at := range bySeg[seg] {
			if len(bytes) == 0 {
				bytes, b = b[0], b[1:]
			}
			kernels.Prefetch(ahead(bytes, aheadLeaves*size, size))
			x := &u.leaves[at]
			x.planes = append(x.planes, bytes[:size:size])
			bytes = bytes[size:]
			u.scoreLeaf(x)
		}
		return nil
	})
}

// appendRange appends a range, to the last one if it begins where that ends.
func appendRange(ranges []tiers.Range, x tiers.Range) []tiers.Range {
	if n := len(ranges); n > 0 && ranges[n-1].Off+ranges[n-1].Len == x.Off {
		ranges[n-1].Len += x.Len
		return ranges
	}
	return append(ranges, x)
}

// ahead returns up to n bytes from at on, none if there are none.
func ahead(b []byte, at, n int) []byte {
	b = b[min(at, len(b)):]
	return b[:min(n, len(b))]
}
