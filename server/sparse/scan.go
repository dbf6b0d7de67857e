package sparse

import (
	"slices"

	"kvtier/attention"
	"kvtier/attention/kernels"
	"kvtier/compress"
	"kvtier/tiers"
)

// scan reads the first bits of all keys in the pages that most probably hold a
// strong token. Where what they show makes it worth
// more than anything else, it goes on with further pages; the others are estimated.
func (u *run) scan() error {
	if err := u.look(attention.Top(u.rankPages(), u.first)); err != nil {
		return err
	}
	if err := u.look(u.promising()); err != nil {
		return err
	}
	u.acc.Leaves = int64(len(u.leaves))
	return nil
}

// mergeLeaves brings the leaves into order of place, after those from the n-th on were added.
func (u *run) mergeLeaves(n int) {
	first, rest := u.leaves[:n], u.leaves[n:]
	for u.inOrder = u.inOrder[:0]; len(first)+len(rest) > 0; {
		if len(rest) == 0 || len(first) > 0 && first[0].page < rest[0].page {
			u.inOrder, first = append(u.inOrder, int(first[0].at)), first[1:]
		} else {
			u.inOrder, rest = append(u.inOrder, int(rest[0].at)), rest[1:]
		}
	}
}

// changed is how little the log of a normaliser may change for worths to be good still.
const changed = .01

// look reads the first bits of all keys in the chosen pages, which are in order.
func (u *run) look(chosen []int) error {
	if len(chosen) == 0 {
		return nil
	}
	at := len(u.leaves)
	u.addLeaves(chosen)
	if err := u.firstKeys(at); err != nil {
		return err
	}
	chosen = u.arrived(at, chosen)
	u.mergeLeaves(at)
	u.reveal(chosen)
	outliers := u.outliers[:0] // of those added now
	for ; at < len(u.leaves); at++ {
		x := &u.leaves[at]
		u.acc.Scanned += int64(x.n)
		if s := &u.segs[x.seg]; u.closely && s.view.Outliers(int(u.pageOf[x.page])) {
			outliers = append(outliers, at)
		}
	}
	u.outliers = outliers
	for plane := 1; plane < outlierPlanes; plane++ {
		if err := u.readKeys(plane, outliers); err != nil {
			return err
		}
		if u.anyLate() {
			outliers = slices.DeleteFunc(outliers, func(i int) bool { return int(u.leaves[i].planes) <= plane })
		}
	}
	if u.normalise() > changed {
		for i := range u.leaves {
			u.leaves[i].weighed = false
		}
	}
	return nil
}

// firstKeys reads the first bits of keys of the leaves from the n-th on, as far as it comes to be known how they are coded.
func (u *run) firstKeys(n int) error {
	leaves := u.list[:0]
	for ; n < len(u.leaves); n++ {
		leaves = append(leaves, n)
	}
	u.list = leaves
	if err := u.readOrders(leaves); err != nil {
		return err
	}
	if u.anyLate() {
		leaves = slices.DeleteFunc(leaves, func(i int) bool { return u.segs[u.leaves[i].seg].codes.q == nil })
	}
	return u.readKeys(0, leaves)
}

// arrived takes pages out of those that were chosen of which the first bits of any leaf are late, and their leaves out of
// those from the n-th on: such a page's mass cannot be told from that of its leaves, so it stands by its means as if it
// had not been chosen. It is not chosen again.
func (u *run) arrived(n int, chosen []int) []int {
	if !u.anyLate() {
		return chosen
	}
	left, to := chosen[:0], n
	for from := n; from < len(u.leaves); {
		page, end, lost := u.leaves[from].page, from, false
		for ; end < len(u.leaves) && u.leaves[end].page == page; end++ {
			lost = lost || u.leaves[end].planes == 0
		}
		if lost {
			u.lost = append(u.lost, int(page))
			for ; from < end; from++ {
				u.isLate(&u.leaves[from], u.leaves[from].all())
			}
			continue
		}
		left = append(left, int(page))
		for ; from < end; from, to = from+1, to+1 {
			x := &u.leaves[to]
			*x = u.leaves[from]
			w, sums := u.weightsOf(x), u.sumsOf(x)
			x.at = int32(to)
			copy(u.weightsOf(x), w)
			copy(u.sumsOf(x), sums)
		}
	}
	u.leaves = u.leaves[:to]
	return left
}

// reveal takes pages out of what is estimated.
func (u *run) reveal(pages []int) {
	for _, p := range pages {
		u.scanned[p], u.tokens[p] = true, 0
		for at := p; at < len(u.mass); at += u.slots {
			u.mass[at], u.ruled[at], u.noise[at] = -inf, 0, 0
		}
	}
}

// promising returns the pages, not scanned yet, where scanning is worth more
// than anything else that the rest of the budget can buy.
func (u *run) promising() []int {
	if u.most <= u.first {
		return nil
	}
	gain := u.pageGains()
	for _, p := range u.lost {
		gain[p] = 0
	}
	clear(u.hist[:])
	for _, g := range gain {
		u.hist.add(g/u.pageBytes, u.pageBytes)
	}
	u.offers(u.inOrder, 1)
	least := u.hist.threshold(u.left)
	var worth int
	for i, g := range gain {
		if g > 0 && g/u.pageBytes >= least {
			worth++
		} else {
			gain[i] = 0
		}
	}
	return attention.Top(gain, min(worth, u.most-u.first))
}

// firstBits is what the first bits of a page's keys take away of its error; further ones and values have to take the rest.
const firstBits = .5

// pageGains returns the error that scanning each page may take away: of that of its mass, and of
// what its tokens' values scatter. It is 0 of those that are scanned.
func (u *run) pageGains() []float32 {
	gain := u.floats(u.pages)
	for r := range u.rows {
		shares := u.weights[:u.slots]
		u.estimatedShares(shares, r)
		ruled, noise := u.ofRow(u.ruled, r), u.ofRow(u.noise, r)
		for p := range gain {
			at := p*u.rows + r
			gain[p] += firstBits * shares[p] * shares[p] * (noise[p]*u.far[at] + ruled[p]*u.scatter[at])
		}
	}
	return gain
}

// estimatedShares writes row r's shares of the slots that are estimated to dst; the others' are 0.
func (u *run) estimatedShares(dst []float32, r int) {
	mass := u.ofRow(u.mass, r)
	top := kernels.Largest(mass, -inf)
	kernels.Weights(dst, mass, top)
	factor := exp(top - u.total[r])
	for i := range dst {
		dst[i] *= factor
	}
}

// readOrders reads the order of the keys' bits in the segments of leaves, as far as it is not known.
func (u *run) readOrders(leaves []int) error {
	last := int32(-1)
	for _, i := range leaves {
		if x := &u.leaves[i]; x.seg != last && u.segs[x.seg].codes.q == nil {
			last = x.seg
			u.want(int(x.seg), u.segs[x.seg].view.KeyOrder())
		}
	}
	return u.each(tiers.PlaneSteps, func(seg int, got got) error {
		s := &u.segs[seg]
		b := got.next(s.view.KeyOrder().Len)
		if b == nil {
			return nil
		}
		order, err := compress.ParseKeyOrder(b, u.d)
		if err == nil {
			u.begin(s, order)
		}
		return err
	})
}

// readBins reads the bins of keys in those channels of which a plane tells the first bits.
func (u *run) readBins(leaves []int, plane int) error {
	u.newGroups = u.newGroups[:0]
	last := int32(-1)
	for _, i := range leaves {
		x := &u.leaves[i]
		s, g := &u.segs[x.seg], &u.groups[x.group]
		if n := s.codes.known[plane] / kernels.LineTokens; x.group != last && g.read < n {
			last = x.group
			u.newGroups = append(u.newGroups, x.group)
			u.want(int(x.seg), s.view.Bins(int(x.group)-s.firstGroup, g.read, n))
		}
	}
	rest := u.newGroups
	return u.each(tiers.PlaneSteps, func(seg int, got got) error {
		s := &u.segs[seg]
		for ; len(rest) > 0 && int(rest[0]) < s.firstGroup+s.view.StepGroups(); rest = rest[1:] {
			g := &u.groups[rest[0]]
			bins := s.view.Bins(int(rest[0])-s.firstGroup, g.read, s.codes.known[plane]/kernels.LineTokens)
			b := got.next(bins.Len)
			if b == nil {
				continue // late, and wanted again with the next leaf
			}
			if err := u.readGroup(s, g, b); err != nil {
				return err
			}
		}
		return nil
	})
}

// hasBins says whether the bins are read that a plane of a leaf needs.
func (u *run) hasBins(x *leaf, plane int) bool {
	return u.groups[x.group].read*kernels.LineTokens >= u.segs[x.seg].codes.known[plane]
}
