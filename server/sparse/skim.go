package sparse

import (
	"bytes"
	"math"

	"kvtier/attention"
	"kvtier/attention/kernels"
	"kvtier/compress"
	"kvtier/tiers"
)

// Skimming looks at the first bits of the keys of pages that may matter, and at the next bits of those that may be read. A page's mean key is known, of
// all channels and with 4 bits: so what is looked for is by how much its tokens' scores deviate from their mean, as far as these bits say. Nothing is
// kept of single tokens.

// skimmer is what skimming finds, and what it needs room for.
type skimmer struct {
	// By row and page, [rows][pages]: the log of the unit in which weights of its tokens are; their sum; and how far single ones are expected to
	// rule it, as sums of shares and of their squares. -Inf and 0 of pages that were not skimmed.
	unit, sum, shares, squares []float32
	seen                       map[int][]float32 // only for traces, by page among all: logs of its tokens' weights, [rows][tiers.PageTokens]

	// Of the segment under way, by group of channels in stored order: squares of 256 times the query [rows][groups], and [groups] by how much of them
	// the variance of what is unknown grows of a score.
	squaresOfQ, noises []float32
	ones               []float32 // [d]
	// By row: what unknown bits raise a weight by, log, and the grade's ofShare and ofSquare.
	raise, ofShare, ofSquare []float32
	lines                    []uint8            // of these planes
	layout                   compress.KeyLayout // made of them
	query                    kernels.KeyQuery   // in the bins of the group under way

	batch  []int32          // pages of the segment that are weighed together
	scores []float32        // of their tokens, [pages][rows][tiers.PageTokens]
	sums   []kernels.RunSum // [pages][rows]
	means  []float32        // [rows], of the scores of a page that is not full
}

// skimPlanes is how many planes of keys are skimmed, one after the other.
const skimPlanes = 2

// batchRuns is how many runs of scores, a page's of a row, are weighed together: as many as stay in the first-level cache.
const batchRuns = 64

// leavesOfPage is how many leaves a full page has.
const leavesOfPage = tiers.PageTokens / tiers.LeafTokens

// skim reads the first bits of the keys of the pages that may matter, and weighs these by them.
func (u *byPage) skim() error {
	u.tell(u.choose(u.pages))
	u.bins, u.keys = sized(u.bins, u.pages), sized(u.keys, u.pages)
	clear(u.keys)
	all := func(int) bool { return true }
	if err := u.readCodes(true, compress.KeyPlaneLines(u.d)[0], all); err != nil {
		return err
	}
	if err := u.readKeys(0, all); err != nil {
		return err
	}
	u.newSkimmer()
	if err := u.look(1); err != nil {
		return err
	}
	u.weighSkimmed()
	return nil
}

// skimAgain reads the next bits of the keys of the pages that may be read, and weighs these anew. Others will not be read.
func (u *byPage) skimAgain() error {
	chosen := attention.Top(u.gains, min(u.pages, againTimes*u.affordable(1)))
	apart := sized(u.again, u.pages)
	u.again = apart
	clear(apart)
	for _, page := range chosen {
		apart[page] = u.gains[page] > 0 // which it is of none that is late
	}
	wanted := func(page int) bool { return apart[page] }
	if err := u.readCodes(false, u.d/kernels.LineTokens, wanted); err != nil {
		return err
	}
	if err := u.readKeys(1, wanted); err != nil {
		return err
	}
	if err := u.look(skimPlanes); err != nil {
		return err
	}
	u.weighSkimmed()
	for page := range u.gains {
		if u.keys[page][1] == nil {
			u.gains[page] = 0
		}
	}
	return nil
}

// readCodes reads how the keys of wanted pages are coded: bins of the first groups of channels, and, if that is not known
// yet, the order of their segments' bits.
func (u *byPage) readCodes(order bool, groups int, wanted func(page int) bool) error {
	// eachPage calls use for each of a segment's pages that are wanted; first says that none before it is of its group of tokens.
	eachPage := func(s *segmentRun, use func(page, group int, first bool)) {
		group := -1
		for page := s.firstPage; page < s.endPage; page++ {
			if wanted(page) {
				g := s.groupOf(int(u.pageOf[page]))
				use(page, g, g != group)
				group = g
			}
		}
	}
	for i := range u.segs {
		s := &u.segs[i]
		if order && s.firstPage < s.endPage {
			u.want(i, s.view.KeyOrder())
		}
		eachPage(s, func(_, group int, first bool) {
			if first {
				u.want(i, s.view.Bins(group, 0, groups))
			}
		})
	}
	return u.each(tiers.PlaneSteps, func(seg int, got got) (err error) {
		s := &u.segs[seg]
		if order {
			if b := got.next(s.view.KeyOrder().Len); b != nil {
				if s.codes.order, err = compress.ParseKeyOrder(b, u.d); err != nil {
					return err
				}
				s.codes.q = u.floats(u.rows * u.d)
				s.codes.order.Permute(s.codes.q, u.q.Q)
			}
		}
		var bins []byte
		eachPage(s, func(page, group int, first bool) {
			if first {
				bins = got.next(s.view.Bins(group, 0, groups).Len)
			}
			u.bins[page] = bins
		})
		return nil
	})
}

// readKeys reads a plane of the keys of those pages that are told apart of which this is wanted.
func (u *byPage) readKeys(plane int, wanted func(page int) bool) error {
	for i := range u.segs {
		s := &u.segs[i]
		for page := s.firstPage; page < s.endPage; page++ {
			if wanted(page) {
				u.want(i, s.view.PageKeys(plane, int(u.pageOf[page])))
			}
		}
	}
	return u.each(tiers.KeyPlanes[plane], func(seg int, got got) error {
		s := &u.segs[seg]
		for page := s.firstPage; page < s.endPage; page++ {
			if wanted(page) {
				p := int(u.pageOf[page])
				if u.keys[page][plane] = got.next(s.view.PageKeys(plane, p).Len); u.bins[page] == nil || s.codes.order.Lines == nil {
					u.keys[page][plane] = nil // is of no use
				}
				if u.keys[page][plane] == nil {
					u.acc.Late += int64(s.view.PageTokens(p))
				}
			}
		}
		return nil
	})
}

// newSkimmer makes room for what skimming finds.
func (u *byPage) newSkimmer() {
	k := &u.skimmer
	k.unit, k.sum = u.floats(u.rows*u.pages), u.floats(u.rows*u.pages)
	k.shares, k.squares = u.floats(u.rows*u.pages), u.floats(u.rows*u.pages)
	for i := range k.unit {
		k.unit[i] = -inf
	}
	k.raise, k.ofShare, k.ofSquare, k.means = u.floats(u.rows), u.floats(u.rows), u.floats(u.rows), u.floats(u.rows)
	groups := u.d / kernels.LineTokens
	k.squaresOfQ, k.noises, k.ones = u.floats(u.rows*groups), u.floats(groups), u.floats(u.d)
	for i := range k.ones {
		k.ones[i] = 1
	}
	k.query = kernels.KeyQuery{Words: u.words(u.rows * u.d), Scale: u.floats(2 * u.rows)}
	pages := max(1, batchRuns/u.rows)
	k.batch, k.scores = sized(k.batch, pages)[:0:pages], u.floats(pages*u.rows*tiers.PageTokens)
	k.sums = sized(k.sums, pages*u.rows)
	if u.tr.Token != nil {
		k.seen = make(map[int][]float32)
	}
}

// pagesAhead is how many pages before their use keys and bins are fetched into the cache.
const pagesAhead = 4

// look weighs the tokens of all pages of which so many planes have come.
func (u *byPage) look(planes int) error {
	u.skimmer.lines = nil
	for i := range u.segs {
		if err := u.lookInto(&u.segs[i], planes); err != nil {
			return err
		}
	}
	return nil
}

// lookInto is look of one segment.
func (u *byPage) lookInto(s *segmentRun, planes int) error {
	k, group := &u.skimmer, -1
	for page := s.firstPage; page < s.endPage; page++ {
		keys := u.keys[page][:planes]
		if next := page + pagesAhead; next < u.pages {
			kernels.Prefetch(u.keys[next][planes-1])
			kernels.Prefetch(u.bins[next])
		}
		if keys[planes-1] == nil {
			continue
		}
		p := int(u.pageOf[page])
		if group < 0 {
			u.grade(s, planes)
		}
		if g := s.groupOf(p); g != group {
			group = g
			if err := k.layout.FoldStored(k.query, s.codes.q, u.bins[page], s.view.Info.KeyExp); err != nil {
				return corrupt(s.s, err)
			}
		}
		leaves := (s.view.PageTokens(p) + tiers.LeafTokens - 1) / tiers.LeafTokens
		k.layout.ScoreLeaves(k.scores[len(k.batch)*u.rows*tiers.PageTokens:], tiers.LeafTokens, tiers.PageTokens, k.query, keys, u.planeBytes[:planes], leaves, 0)
		if planes == 1 {
			u.acc.Scanned += int64(s.view.PageTokens(p))
			u.acc.Leaves += int64(leaves)
		}
		if k.batch = append(k.batch, int32(page)); len(k.batch) == cap(k.batch) {
			u.weighBatch(s)
		}
	}
	u.weighBatch(s)
	return nil
}

const (
	// mostWidth keeps what is computed from a range of keys finite, whatever was stored,
	mostWidth = 1e15
	// and mostUnknown what is computed from the variance of a score.
	mostUnknown = 40
)

// grade finds what it means for scores of a segment's keys that only so many planes are known.
func (u *byPage) grade(s *segmentRun, planes int) {
	k, order := &u.skimmer, &s.codes.order
	n, each := 0, compress.KeyPlaneLines(u.d)
	for _, lines := range each[:planes] {
		n += lines
	}
	lines := order.Lines[:n]
	if !bytes.Equal(lines, k.lines) { // else it is as in the segment before
		k.lines, k.layout = lines, compress.NewKeyLayout(u.d, order.Lines, planes)
	}
	var levels [compress.MaxHeadDim / kernels.LineTokens]uint8
	for _, g := range lines {
		levels[g]++
	}
	var steps [compress.MaxHeadDim / kernels.LineTokens]float32
	order.StandInSteps(steps[:], s.view.Info.KeyExp)
	groups := u.d / kernels.LineTokens
	for g := range groups {
		width := min(steps[g], mostWidth)
		k.noises[g] = width * width * compress.KeyNoise[levels[g]]
	}
	kernels.BinSquares(k.squaresOfQ, s.codes.q, k.ones)
	for r := range u.rows {
		noise := float32(0)
		for g, of := range k.noises {
			noise += of * k.squaresOfQ[r*groups+g]
		}
		if !(noise <= mostUnknown) { // or it is no number
			noise = mostUnknown
		}
		k.raise[r] = attention.Mass(1, 0, noise)
		k.ofShare[r], k.ofSquare[r] = 1, exp(2*(noise-k.raise[r]))
		if more := noise/2 - k.raise[r]; more > 0 {
			k.ofShare[r] = exp(more)
		}
	}
}

// weighBatch weighs the tokens of the batch's pages, which are a segment's, by how their scores deviate from their page's mean.
func (u *byPage) weighBatch(s *segmentRun) {
	k := &u.skimmer
	if len(k.batch) == 0 {
		return
	}
	sums, scores := k.sums[:len(k.batch)*u.rows], k.scores
	last := int(u.pageOf[k.batch[len(k.batch)-1]]) // the only one that may not be full
	n := s.view.PageTokens(last)
	ragged := len(sums) - u.rows
	if n < tiers.PageTokens {
		for r := range u.rows {
			row := scores[(ragged+r)*tiers.PageTokens:][:tiers.PageTokens]
			k.means[r] = 0
			for _, x := range row[:n] {
				k.means[r] += x / float32(n)
			}
			for t := n; t < len(row); t++ {
				row[t] = -inf
			}
		}
	}
	kernels.SumRuns(sums, scores)
	if n < tiers.PageTokens {
		for r, mean := range k.means {
			sums[ragged+r].Mean = mean
		}
	}
	if u.q.Softcap != 0 {
		u.capBatch(s, sums)
	}
	for i, page := range k.batch {
		p := int(u.pageOf[page])
		at := s.firstOfAll + p
		if k.seen != nil {
			k.seen[at] = make([]float32, u.rows*tiers.PageTokens)
		}
		for r, sum := range sums[i*u.rows:][:u.rows] {
			shift := u.run.scores[r*u.all+at] - sum.Mean + k.raise[r]
			x := r*u.pages + int(page)
			k.unit[x], k.sum[x] = sum.Top+shift, sum.Sum
			k.shares[x], k.squares[x] = sum.Sum*k.ofShare[r], sum.Squares*k.ofSquare[r]
			if k.seen != nil {
				for t, x := range scores[(i*u.rows+r)*tiers.PageTokens:][:tiers.PageTokens] {
					k.seen[at][r*tiers.PageTokens+t] = x + shift
				}
			}
		}
	}
	k.batch = k.batch[:0]
}

// capBatch makes scores of deviations, caps them, and sums up these: their mean is as if it were the page's own.
func (u *byPage) capBatch(s *segmentRun, sums []kernels.RunSum) {
	k := &u.skimmer
	for i, page := range k.batch {
		p := int(u.pageOf[page])
		n, at := s.view.PageTokens(p), s.firstOfAll+p
		for r, sum := range sums[i*u.rows:][:u.rows] {
			row, shift := k.scores[(i*u.rows+r)*tiers.PageTokens:][:n], u.rawScores[r*u.all+at]-sum.Mean
			for t := range row {
				row[t] += shift
			}
			attention.SoftcapAll(row, u.q.Softcap)
		}
	}
	kernels.SumRuns(sums, k.scores)
	for i, page := range k.batch {
		for r := range u.rows {
			sums[i*u.rows+r].Mean = u.run.scores[r*u.all+s.firstOfAll+int(u.pageOf[page])]
		}
	}
}

// mostUnits is how far above the heaviest page's mass, by means, a token's weight may lie without weights being scaled: sums of squares stay finite.
const mostUnits = 40

// weighSkimmed puts what skimming found in the place of what means say of the pages' masses, and finds by how much the pages' tokens rule the
// error: the squares of their shares, by how values scatter. A token has all of a row's softmax at most.
func (u *byPage) weighSkimmed() {
	k := &u.skimmer
	u.gains = u.floats(u.pages)
	weights := u.floats(u.pages) // of tokens whose log is that of their page's unit
	for r := range u.rows {
		at := r * u.pages
		units, sums, shares, squares := k.unit[at:][:u.pages], k.sum[at:][:u.pages], k.shares[at:][:u.pages], k.squares[at:][:u.pages]
		all, top := u.restWeights[r*u.all:][:u.all], &u.tops[2*r]
		most := kernels.Largest(units, *top)
		if most > *top+mostUnits {
			scale := exp(*top - most)
			for i := range all {
				all[i] *= scale
			}
			u.tops[2*r+1] *= scale
			*top = most
		}
		kernels.Weights(weights, units, most)
		scale, total := float32(1), float64(u.tops[2*r+1])
		if most > *top { // both may be infinite
			scale = exp(most - *top)
		}
		for i := range u.segs {
			s := &u.segs[i]
			for page := s.firstPage; page < s.endPage; page++ {
				if u.keys[page][0] != nil {
					w := &all[s.firstOfAll+int(u.pageOf[page])]
					total -= float64(*w)
					*w = weights[page] * scale * sums[page]
					total += float64(*w)
				}
			}
		}
		u.tops[2*r+1] = float32(max(total, 0))
		u.total[r] = u.totalOfAll(r)
		share := exp(most - u.total[r])
		for p, w := range weights {
			w *= share
			u.gains[p] += min(squares[p]*w*w, shares[p]*w)
		}
		u.unit[r] = exp(headroom)
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
		best[i] = int32(n) // n pages have better places in any order
	}
	presence := u.floats(u.all)
	for r := range u.rows {
		clear(counts[:])
		top := kernels.Presences(presence, u.surveyed[r*u.all:], u.surprise, float32(math.Sqrt(float64(u.norm2[r]))), -inf)
		kernels.Depths(at, presence, top, perNat, bins-1) // those that are far below, or as infinite as top, lie together
		for _, b := range at {
			counts[b]++
		}
		before, last := 0, int32(0) // the last bin of which places count
		for b, pages := range counts {
			counts[b] = int32(before)
			if before < n {
				last = int32(b)
			}
			before += int(pages)
		}
		for i, b := range at {
			if b <= last {
				best[i] = min(best[i], counts[b])
			}
		}
	}
	return u.bestPlaces(best, n)
}

// bestPlaces returns the indices, in order, of the n least of places, none of which is above n: at least n are less.
func (u *byPage) bestPlaces(places []int32, n int) []int {
	counts := sized(u.binsOf, n+1)
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
