package sparse

import (
	"bytes"
	"math"

	"kvtier/attention"
	"kvtier/attention/kernels"
	"kvtier/compress"
	"kvtier/tiers"
)

// Skimming looks at the first bits of the keys of pages that may matter. A page's mean key is known, of all channels and with 4 bits: so what is
// looked for is by how much its tokens' scores deviate from their mean, as far as these bits say. Nothing is kept of single tokens.

// skimmer is what skimming finds, and what it needs room for.
type skimmer struct {
	// By row and page, [rows][pages]: the log of the unit in which weights of its tokens are; the sum of what they are expected to
	// weigh, and of the squares of that. -Inf and 0 of pages that were not skimmed.
	unit, sum, squares []float32
	seen               map[int][]float32 // only for traces, by page among all: logs of its tokens' weights, [rows][tiers.PageTokens]

	// Of the segment under way, by row: what unknown bits raise a weight by, log, and the grade's ofShare and ofSquare.
	raise, ofShare, ofSquare []float32
	parts                    []float32                                         // see kernels.BinSquares
	unitSteps                []float32                                         // [d], bins of which 256 are 1
	noises                   [compress.MaxHeadDim / kernels.LineTokens]float32 // by group of channels, of a query of norm 1

	layout  *compress.KeyLayout // of the first plane of the segment under way
	lines   []uint8             // of which it is made
	query   kernels.KeyQuery    // in the bins of the group under way
	scores  []float32           // [rows][tiers.PageTokens], of the page under way
	means   []float32           // [rows]
	offsets []float32           // [rows][leavesOfPage]
	sums    []float32           // [rows][leavesOfPage][2]
}

const leavesOfPage = tiers.PageTokens / tiers.LeafTokens

// ones makes sums of products.
var ones = func() (x [tiers.PageTokens]float32) {
	for i := range x {
		x[i] = 1
	}
	return x
}()

// skim reads the first bits of the keys of the pages that may matter, and weighs these by them.
func (u *byPage) skim() error {
	u.tell(u.choose(u.pages))
	if err := u.readCodes(); err != nil {
		return err
	}
	if err := u.readFirst(); err != nil {
		return err
	}
	if err := u.look(); err != nil {
		return err
	}
	u.weighAll()
	u.newTotals()
	u.weighSkimmed()
	return nil
}

// readCodes reads how the keys of all pages that are told apart are coded: the order of their bits, and bins of those channels of
// which the first plane may know.
func (u *byPage) readCodes() error {
	groups := compress.KeyPlaneLines(u.d)[0]
	for i := range u.segs {
		s, group := &u.segs[i], -1
		for _, page := range u.pageOf[s.firstPage:s.endPage] {
			if group < 0 {
				u.want(i, s.view.KeyOrder())
			}
			if g := s.groupOf(int(page)); g != group {
				group = g
				u.want(i, s.view.Bins(g, 0, groups))
			}
		}
	}
	u.bins = sized(u.bins, u.pages)
	return u.each(tiers.PlaneSteps, func(seg int, got got) error {
		s, group := &u.segs[seg], -1
		if b := got.next(s.view.KeyOrder().Len); b != nil {
			order, err := compress.ParseKeyOrder(b, u.d)
			if err != nil {
				return err
			}
			u.begin(s, order)
		}
		for page := s.firstPage; page < s.endPage; page++ {
			if g := s.groupOf(int(u.pageOf[page])); g != group {
				group = g
				u.bins[page] = got.next(s.view.Bins(g, 0, groups).Len)
			} else {
				u.bins[page] = u.bins[page-1]
			}
		}
		return nil
	})
}

// readFirst reads the first plane of the keys of all pages that are told apart.
func (u *byPage) readFirst() error {
	for i := range u.segs {
		s := &u.segs[i]
		for _, page := range u.pageOf[s.firstPage:s.endPage] {
			u.want(i, s.view.PageKeys(0, int(page)))
		}
	}
	u.firsts = sized(u.firsts, u.pages)
	return u.each(tiers.PlaneK1, func(seg int, got got) error {
		s := &u.segs[seg]
		for page := s.firstPage; page < s.endPage; page++ {
			u.firsts[page] = got.next(s.view.PageKeys(0, int(u.pageOf[page])).Len)
		}
		return nil
	})
}

// pagesAhead is how many pages before their use first bits and bins are fetched into the cache.
const pagesAhead = 4

// look weighs the tokens of all pages of which everything has come. What it finds takes the place of what means say of the pages' masses.
func (u *byPage) look() error {
	k := &u.skimmer
	k.unit, k.sum, k.squares = u.floats(u.rows*u.pages), u.floats(u.rows*u.pages), u.floats(u.rows*u.pages)
	for i := range k.unit {
		k.unit[i] = -inf
	}
	k.raise, k.ofShare, k.ofSquare, k.means = u.floats(u.rows), u.floats(u.rows), u.floats(u.rows), u.floats(u.rows)
	k.parts, k.unitSteps = u.floats(u.rows*u.d/kernels.LineTokens), u.floats(u.d)
	for j := range k.unitSteps {
		k.unitSteps[j] = 1. / 256
	}
	k.query = kernels.KeyQuery{Words: u.words(u.rows * u.d), Scale: u.floats(2 * u.rows)}
	k.scores = u.floats(u.rows * tiers.PageTokens)
	k.offsets, k.sums = u.floats(u.rows*leavesOfPage), u.floats(u.rows*leavesOfPage*2)
	if u.tr.Token != nil {
		k.seen = make(map[int][]float32)
	}
	for i := range u.segs {
		s := &u.segs[i]
		if s.firstPage < s.endPage && s.codes.q != nil {
			u.grade(s)
			k.layout = u.firstLayout(s)
		}
		group := -1
		for page := s.firstPage; page < s.endPage; page++ {
			p := int(u.pageOf[page])
			if s.codes.q == nil || u.bins[page] == nil || u.firsts[page] == nil {
				u.firsts[page] = nil
				u.acc.Late += int64(s.view.PageTokens(p))
				continue
			}
			if next := page + pagesAhead; next < u.pages {
				kernels.Prefetch(u.firsts[next])
				kernels.Prefetch(u.bins[next])
			}
			if g := s.groupOf(p); g != group {
				group = g
				if err := k.layout.FoldStored(k.query, s.codes.q, u.bins[page], s.view.Info.KeyExp); err != nil {
					return corrupt(s.s, err)
				}
			}
			u.lookAt(s, page, p)
		}
	}
	return nil
}

// grade finds what it means for scores of a segment's keys that only their first plane is known.
func (u *byPage) grade(s *segmentRun) {
	k := &u.skimmer
	kernels.BinSquares(k.parts, s.codes.q, k.unitSteps)
	groups, noises := u.d/kernels.LineTokens, k.noises[:]
	for g := range groups {
		width := 256 * s.codes.order.StandInStep(g, s.view.Info.KeyExp)
		noises[g] = width * width * compress.KeyNoise[s.codes.levels[0][g]]
	}
	for r := range u.rows {
		noise := min(kernels.Dot(k.parts[r*groups:(r+1)*groups], noises[:groups]), mostNoise)
		k.raise[r] = attention.Mass(1, 0, noise)
		k.ofShare[r], k.ofSquare[r] = exp(noise/2-k.raise[r]), exp(2*(noise-k.raise[r]))
	}
}

// firstLayout returns the layout of the first plane of a segment's keys: few lines, which are often those of the segment before.
func (u *byPage) firstLayout(s *segmentRun) *compress.KeyLayout {
	k := &u.skimmer
	lines := s.codes.order.Lines[:compress.KeyPlaneLines(u.d)[0]]
	if k.layout != nil && bytes.Equal(lines, k.lines) {
		return k.layout
	}
	k.lines = lines
	return u.layoutOf(s, 1)
}

// lookAt weighs the tokens of a page, the p-th of its segment.
func (u *byPage) lookAt(s *segmentRun, page, p int) {
	k := &u.skimmer
	n, scores := s.view.PageTokens(p), k.scores
	leaves := (n + tiers.LeafTokens - 1) / tiers.LeafTokens
	u.single[0] = u.firsts[page]
	k.layout.ScoreLeaves(scores, tiers.LeafTokens, tiers.PageTokens, k.query, u.single[:], u.planeBytes[:1], leaves, 0)
	if n < tiers.PageTokens {
		for r := range u.rows {
			clear(scores[r*tiers.PageTokens+n : (r+1)*tiers.PageTokens])
		}
	}
	kernels.Dots(k.means, 1, scores, ones[:], tiers.PageTokens)
	at := s.firstOfAll + p
	for r, sum := range k.means {
		row := scores[r*tiers.PageTokens:][:tiers.PageTokens]
		for t := n; t < len(row); t++ {
			row[t] = -inf
		}
		shift := u.run.scores[r*u.all+at] - sum/float32(n)
		if u.q.Softcap != 0 { // the scores themselves, as they are capped
			shift = u.rawScores[r*u.all+at] - sum/float32(n)
			for t := range row[:n] {
				row[t] += shift
			}
			attention.SoftcapAll(row[:n], u.q.Softcap)
			shift = 0
		}
		top := kernels.Largest(row, -inf)
		for l := range leavesOfPage {
			k.offsets[r*leavesOfPage+l] = -top
		}
		k.unit[r*u.pages+page] = top + shift + k.raise[r]
	}
	if k.seen != nil {
		u.remember(page, at, scores)
	}
	kernels.LeafWeights(scores, k.sums, k.offsets, leastWeight)
	for r := range u.rows {
		var sum, squares float32
		for i, sums := 0, k.sums[r*2*leavesOfPage:]; i < 2*leavesOfPage; i += 2 {
			sum, squares = sum+sums[i], squares+sums[i+1]
		}
		x := r*u.pages + page
		u.surveyed[r*u.all+at] = k.unit[x] + log(sum)
		k.sum[x], k.squares[x] = sum*k.ofShare[r], squares*k.ofSquare[r]
	}
	u.acc.Scanned += int64(n)
	u.acc.Leaves += int64(leaves)
}

// remember keeps the scores of a page's tokens, as logs of weights.
func (u *byPage) remember(page, all int, scores []float32) {
	k := &u.skimmer
	logs := make([]float32, len(scores))
	for i, x := range scores {
		r := i / tiers.PageTokens
		logs[i] = x + k.offsets[r*leavesOfPage] + k.unit[r*u.pages+page]
	}
	k.seen[all] = logs
}

// weighSkimmed finds by how much the skimmed pages' tokens rule the error: the squares of their shares, by how values scatter. A token has all of a
// row's softmax at most.
func (u *byPage) weighSkimmed() {
	k := &u.skimmer
	u.gains = u.floats(u.pages)
	units := u.floats(u.pages)
	for r := range u.rows {
		at := r * u.pages
		kernels.Weights(units, k.unit[at:at+u.pages], u.total[r])
		sums, squares := k.sum[at:], k.squares[at:]
		for p, unit := range units {
			u.gains[p] += min(squares[p]*unit*unit, sums[p]*unit)
		}
	}
	for i := range u.segs {
		s := &u.segs[i]
		for page := s.firstPage; page < s.endPage; page++ {
			u.gains[page] *= s.means.Values.Spread(int(u.pageOf[page]))
		}
	}
}

// choose returns, in order, the pages that have the best places in the order of presence of any head (see rankPages), as far as
// places are told apart: presences that lie together have the same, and of pages that have, the first are taken.
func (u *byPage) choose(n int) []int {
	const (
		bins   = 4096
		perNat = 64
	)
	var counts [bins]int32
	best, at := sized(u.places, u.all), sized(u.binsOf, u.all)
	u.places, u.binsOf = best, at
	for i := range best {
		best[i] = math.MaxInt32
	}
	presence := u.floats(u.all)
	for r := range u.rows {
		clear(counts[:])
		copy(presence, u.surveyed[r*u.all:])
		kernels.Axpy(presence, float32(math.Sqrt(float64(u.norm2[r]))), u.surprise)
		top := kernels.Largest(presence, -inf)
		for i, x := range presence {
			at[i] = bins - 1
			if below := (top - x) * perNat; below < bins-1 { // else it is far below, or both are infinite
				at[i] = int32(below)
			}
			counts[at[i]]++
		}
		before := int32(0)
		for b, n := range counts {
			counts[b] = before
			before += n
		}
		for i, b := range at {
			best[i] = min(best[i], counts[b])
		}
	}
	return u.bestPlaces(best, n)
}

// bestPlaces returns the indices, in order, of the n least of places, which are less than there are.
func (u *byPage) bestPlaces(places []int32, n int) []int {
	counts := sized(u.binsOf, len(places))
	clear(counts)
	for _, x := range places {
		counts[x]++
	}
	last := 0 // place of which so many are taken as are left
	for last < len(counts)-1 && int(counts[last]) <= n {
		n -= int(counts[last])
		last++
	}
	chosen := u.list[:0]
	for i, x := range places {
		if int(x) < last {
			chosen = append(chosen, i)
		} else if int(x) == last && n > 0 {
			chosen, n = append(chosen, i), n-1
		}
	}
	u.list = chosen
	return chosen
}
