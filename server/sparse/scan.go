package sparse

import (
	"cmp"
	"math"
	"slices"

	"kvtier/attention"
	"kvtier/compress"
	"kvtier/tiers"
)

// scorePages scores all pages, and estimates the normaliser from them and the
// exact zone.
func (u *run) scorePages() error {
	ranges := make([][]tiers.Range, len(u.segs))
	for i, s := range u.segs {
		ranges[i] = []tiers.Range{{Len: 2 * attention.MeansBytes(s.view.Pages(), u.d)}}
	}
	err := u.each(tiers.PlanePages, ranges, func(seg int, b [][]byte) error {
		s := u.segs[seg]
		s.keys, s.values = s.view.PageMeans(b[0])
		u.scoreMeans(seg)
		return nil
	})
	if err != nil {
		return err
	}
	if u.follows {
		if err := u.readMap(); err != nil {
			return err
		}
	}
	u.acc.Pages, u.acc.PagesTotal = int64(len(u.pages)), int64(len(u.pages))
	masses := make([]float32, 0, len(u.pages))
	for r := range u.rows {
		u.total[r] = u.q.Partials[r].LSE()
		masses = masses[:0]
		for _, p := range u.pages {
			masses = append(masses, p.mass[r])
		}
		u.total[r] = logAdd(u.total[r], logSum(masses))
	}
	u.judge()
	return nil
}

// scoreMeans adds a segment's pages to those under consideration.
func (u *run) scoreMeans(seg int) {
	s := u.segs[seg]
	pages := s.view.Pages()
	scores, x := u.floats(u.rows*pages), u.floats(4*u.rows*pages)
	next := func() (row []float32) {
		row, x = x[:u.rows], x[u.rows:]
		return row
	}
	s.keys.Scores(scores, u.q.Q, 0, pages)
	for i := range pages {
		p := page{index: len(u.pages), seg: seg, i: i, n: s.view.PageTokens(i), mass: next(), rank: next(), scatter: next(), far: next()}
		for r := range u.rows {
			score, spread := attention.Softcap(scores[r*pages+i], u.q.Softcap), s.keys.Spread(i)*u.norm2[r]
			p.mass[r] = attention.Mass(p.n, score, spread)
			p.rank[r] = attention.Presence(p.n, score, spread)
		}
		u.pages = append(u.pages, p)
	}
}

// outlierPlanes is how many planes of outliers' keys are always read: nothing
// else says which of them matter.
const outlierPlanes = 3

// scan reads the first bits of all keys in the pages that most probably hold a
// strong token, and in pages of outliers. Where what they show makes it worth
// more than anything else, it goes on with further pages; the others are estimated.
func (u *run) scan() error {
	u.estimatePages()
	if err := u.look(attention.Top(u.rankPages(), u.first)); err != nil {
		return err
	}
	if err := u.look(u.promising()); err != nil {
		return err
	}
	// By place, as they are read from here on.
	slices.SortFunc(u.leaves, func(a, b leaf) int { return cmp.Or(a.page-b.page, a.i-b.i) })
	u.acc.Leaves = int64(len(u.leaves))
	return nil
}

// rankPages ranks each page by the best place that it has in the order of
// presence of any head, or of all of them, so that no head takes the places of
// another: presence is overestimated most for heads with large queries. Outliers
// come first.
func (u *run) rankPages() []float32 {
	n := len(u.pages)
	rank, presence, order := u.floats(n), u.floats(n), make([]uint64, n)
	place := func() {
		for i, x := range presence {
			order[i] = uint64(descending(x))<<32 | uint64(i)
		}
		slices.Sort(order)
		for at, key := range order {
			i := uint32(key)
			rank[i] = max(rank[i], float32(n-at))
		}
	}
	for r := range u.rows {
		for i := range u.pages {
			presence[i] = u.pages[i].rank[r]
		}
		place()
	}
	for i := range u.pages {
		presence[i] = u.share(u.pages[i].rank)
	}
	place()
	for i, p := range u.pages {
		if u.segs[p.seg].view.Outliers(p.i) {
			rank[i] = inf
		}
	}
	return rank
}

// descending returns bits that are the smaller, the larger a number is.
func descending(x float32) uint32 {
	b := math.Float32bits(x)
	if b>>31 == 0 {
		return ^b &^ (1 << 31)
	}
	return b
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
	leaves := make([]int, 0, len(u.leaves)-at) // added now
	var outliers []int
	for ; at < len(u.leaves); at++ {
		leaves = append(leaves, at)
		p := &u.pages[u.leaves[at].page]
		p.scanned = true
		if u.segs[p.seg].view.Outliers(p.i) {
			outliers = append(outliers, at)
		}
	}
	u.unread = slices.DeleteFunc(u.unread, func(e unread) bool { return e.page.scanned })
	if err := u.readSteps(leaves); err != nil {
		return err
	}
	if err := u.readKeys(0, leaves); err != nil {
		return err
	}
	for plane := 1; plane < outlierPlanes; plane++ {
		if err := u.readKeys(plane, outliers); err != nil {
			return err
		}
	}
	first := leaves[0]
	if u.normalise() > changed {
		first = 0
	}
	for i := range u.leaves[first:] {
		u.weigh(&u.leaves[first+i])
	}
	u.calibrate()
	return nil
}

// promising returns the pages, not scanned yet, where scanning is worth more
// than anything else that the rest of the budget can buy.
func (u *run) promising() []int {
	if u.most <= u.first {
		return nil
	}
	offers, gain := u.offers(1), u.floats(len(u.pages))
	for _, e := range u.unread {
		gain[e.page.index] = u.pageGain(e)
		offers.add(gain[e.page.index]/u.pageBytes, u.pageBytes)
	}
	least := offers.threshold(u.left)
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

// pageGain is the error that scanning a page may take away: that of its mass, as
// scanned pages taught it, and what its tokens' values scatter.
func (u *run) pageGain(e unread) (gain float32) {
	for r := range u.rows {
		share := exp(e.mass[r] + u.bias[r] - u.total[r])
		noise := max(float32(u.massVar[r]), e.noise[r])
		gain += share * share * (noise*e.page.far[r] + e.ruled[r]*e.page.scatter[r])
	}
	return gain
}

// readSteps reads how the keys of leaves are coded, as far as it is not known.
func (u *run) readSteps(leaves []int) error {
	ranges := make([][]tiers.Range, len(u.segs))
	groups := make([][]int, len(u.segs))
	for _, i := range leaves {
		x := &u.leaves[i]
		s := u.segs[x.seg]
		if s.codes == nil && len(ranges[x.seg]) == 0 {
			ranges[x.seg] = append(ranges[x.seg], s.view.KeyOrder())
		}
		known := s.codes != nil && s.codes.knows(x.group)
		if n := len(groups[x.seg]); !known && (n == 0 || groups[x.seg][n-1] != x.group) {
			groups[x.seg] = append(groups[x.seg], x.group)
			ranges[x.seg] = append(ranges[x.seg], s.view.Steps(x.group))
		}
	}
	return u.each(tiers.PlaneSteps, ranges, func(seg int, b [][]byte) error {
		s := u.segs[seg]
		if s.codes == nil {
			order, err := compress.ParseKeyOrder(b[0], u.d)
			if err != nil {
				return err
			}
			s.codes, b = newCodes(order, u.q.Q, s.view.StepGroups()), b[1:]
		}
		for i, g := range groups[seg] {
			if err := s.codes.addGroup(g, b[i], s.view.Info.KeyExp); err != nil {
				return err
			}
		}
		return nil
	})
}
