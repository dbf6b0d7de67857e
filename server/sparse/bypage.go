package sparse

import (
	"math"
	"slices"
	"time"

	"kvtier/attention"
	"kvtier/attention/kernels"
	"kvtier/compress"
	"kvtier/tiers"
)

// A budget bounds bytes because bytes from a disk cost time. Where they come from RAM, deciding about a leaf costs more than
// reading it. So an answer by page decides twice, about pages: their means say which are skimmed, the first bits of their keys say
// which of these are read whole. For the same bytes it errs more, for the same time much less
// (docs/decisions/0037-by-page.md).
type byPage struct {
	*run
	gains  []float32   // [pages], what reading them is worth
	shares []float32   // [rows], what share of the softmax weights of leaves are in units of
	out    [][]float32 // rot's sums of values
	stored []float32   // [rows][d], the query, channels in the stored order of the segment under way
	layout compress.KeyLayout
	folded kernels.KeyQuery // in the bins of the group of tokens under way
	batch  kernels.ValueBatch
	scores []float32 // [rows][kernels.ValueTokens]; those of the batch's tokens, which begin at from, are weights
	from   int
}

// wholePage is a page that was chosen, and what is stored of it.
type wholePage struct {
	seg, page           int    // page of its segment
	order, bins, values []byte // order: of its segment's bits of keys
	keys                [compress.NumKeyPlanes - 1][]byte
	drains              []byte // the last bits of drains, if they are among its tokens
}

// skimPart is the part of a budget, page means taken off, that goes to the first bits of keys.
const skimPart = .1

// skimmedPages is how many pages an answer by page skims when share of the body's 4-bit bytes may be read.
func (b *body) skimmedPages(share float32) int {
	left := max(0, float64(share)*b.full-b.always-b.means)
	return int(min(b.pages, max(1, skimPart*left/b.scanOfPage())))
}

// affordable is how many of n pages that were skimmed the rest of the budget pays for.
func (u *byPage) affordable(n int) int {
	page := float64(tiers.PageTokens * (compress.ValueScaleBytes + compress.ValueRowBytes(u.d)))
	for _, plane := range u.planeBytes[1 : compress.NumKeyPlanes-1] {
		page += float64(tiers.PageTokens / tiers.LeafTokens * plane)
	}
	most := min(float64(n), max(0, u.left)/page)
	// The order of bits is read again of each segment of which a page is chosen, and drains' last bits.
	segment := 0.
	for i := range u.segs {
		v := u.segs[i].view
		if segment += lines(compress.KeyOrderBytes(u.d)); v.Drains() > 0 {
			segment += lines(v.DrainValue(v.Info.Body + v.Drains()).Off)
		}
	}
	most -= segment * min(1, most/float64(len(u.segs))) / page
	all := float64(u.all)
	// Chosen pages share bins with others that are chosen.
	const shared = tiers.StepTokens / tiers.PageTokens
	groups := all / shared * (1 - math.Pow(1-most/all, shared))
	return int(max(1, most-groups*float64(compress.KeyStepsBytes(u.d))/page))
}

// answer goes through the stages.
func (u *byPage) answer() error {
	defer u.release()
	for _, stage := range []struct {
		do func() error
		ns *int64
	}{
		{u.survey, &u.acc.NsScore},
		{u.skim, &u.acc.NsScan},
		{u.fetch, &u.acc.NsFetch},
		{u.attend, &u.acc.NsScan},
		{u.estimate, &u.acc.NsScore},
	} {
		start := time.Now()
		if err := stage.do(); err != nil {
			return err
		}
		*stage.ns += time.Since(start).Nanoseconds()
	}
	return nil
}

// survey scores the means of all pages.
func (u *byPage) survey() error {
	if err := u.readMeanKeys(); err != nil {
		return err
	}
	u.massAll()
	u.weighAll()
	u.newTotals()
	for r, total := range u.total {
		u.base[r] = total + headroom
	}
	u.acc.Pages, u.acc.PagesTotal = int64(u.all), int64(u.all)
	return nil
}

// newTotals takes softmax sums for what weighAll found.
func (u *byPage) newTotals() {
	for r := range u.rows {
		u.total[r], u.unit[r] = u.totalOfAll(r), exp(headroom)
	}
}

// skim reads the first bits of the keys of the pages that may matter, and weighs these by them.
func (u *byPage) skim() error {
	u.tell(u.choose(u.pages))
	u.list = u.list[:0]
	for page := range u.pages {
		u.list = append(u.list, page)
	}
	u.addLeaves(u.list)
	u.mergeLeaves(len(u.leaves))
	if err := u.readOrders(u.inOrder); err != nil {
		return err
	}
	if err := u.readBins(u.inOrder, 0); err != nil {
		return err
	}
	if err := u.readFirst(); err != nil {
		return err
	}
	for at, end := 0, 0; at < len(u.leaves); at = end {
		for end = at + 1; end < len(u.leaves) && u.together(end-1, end); end++ {
		}
		if u.leaves[at].planes > 0 {
			u.scoreLeaves(at, end)
		}
	}
	u.acc.Leaves = int64(len(u.leaves))
	u.weighSkimmed()
	return nil
}

// tell puts pages, of all, into the run's tables.
func (u *byPage) tell(chosen []int) {
	u.pages, u.pageOf = len(chosen), u.pageOf[:0]
	for i := range u.segs {
		s := &u.segs[i]
		s.firstPage = len(u.pageOf)
		for ; len(chosen) > 0 && chosen[0] < s.firstOfAll+s.view.Pages(); chosen = chosen[1:] {
			u.pageOf = append(u.pageOf, int32(chosen[0]-s.firstOfAll))
		}
		s.endPage = len(u.pageOf)
	}
}

// readFirst reads the first plane of the keys of all pages that are told apart.
func (u *byPage) readFirst() error {
	u.firsts = append(u.firsts[:0], make([][]byte, u.pages)...)
	for i := range u.segs {
		s := &u.segs[i]
		for _, page := range u.pageOf[s.firstPage:s.endPage] {
			u.want(i, s.view.PageKeys(0, int(page)))
		}
	}
	at := 0
	return u.each(tiers.PlaneK1, func(seg int, got got) error {
		s, size := &u.segs[seg], u.planeBytes[0]
		for page := s.firstPage; page < s.endPage; page++ {
			b := got.next(s.view.PageKeys(0, int(u.pageOf[page])).Len)
			u.firsts[page] = b
			for ; at < len(u.leaves) && int(u.leaves[at].page) == page; at++ {
				x := &u.leaves[at]
				if b == nil || s.codes.q == nil || !u.hasBins(x, 0) {
					u.isLate(x, x.all())
					continue
				}
				x.first, x.planes, b = b[:size:size], 1, b[size:]
				u.acc.Scanned += int64(x.n)
			}
		}
		return nil
	})
}

// weighSkimmed has what first bits say of pages' masses take the place of what means say, and says by how much
// the pages' tokens rule the error: the squares of their shares, by how values scatter.
func (u *byPage) weighSkimmed() {
	u.gains, u.shares = u.floats(u.pages), u.floats(u.rows)
	found := u.floats(u.rows)
	for at := 0; at < len(u.leaves); {
		first := at
		for ; at < len(u.leaves) && u.leaves[at].page == u.leaves[first].page; at++ {
		}
		x := &u.leaves[first]
		if x.planes == 0 {
			continue // means go on standing for it
		}
		s, page := &u.segs[x.seg], int(u.pageOf[x.page])
		clear(found)
		for i := first; i < at; i++ {
			for r, sums := 0, u.sumsOf(&u.leaves[i]); r < u.rows; r++ {
				found[r] += sums[2*r]
			}
		}
		for r, sum := range found {
			u.surveyed[r*u.all+s.firstOfAll+page] = u.base[r] + log(sum)
		}
	}
	u.weighAll()
	u.newTotals()
	for r, base := range u.base {
		u.shares[r] = exp(min(base-u.total[r], mostPresence))
	}
	for i := range u.leaves {
		x := &u.leaves[i]
		if x.planes == 0 {
			continue
		}
		grades, sums, gain := u.grades(x, 1), u.sumsOf(x), float32(0)
		for r := range grades {
			g, unit := &grades[r], u.shares[r]
			gain += min(sums[2*r+1]*unit*unit*g.ofSquare, sums[2*r]*unit*g.ofShare)
		}
		u.gains[x.page] += gain * u.segs[x.seg].means.Values.Spread(int(u.pageOf[x.page]))
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
		norm, mass := float32(math.Sqrt(float64(u.norm2[r]))), u.surveyed[r*u.all:][:u.all]
		for i, x := range mass {
			presence[i] = x + norm*u.surprise[i]
		}
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

// fetch has the pages that weigh most pinned, all planes of all segments together.
func (u *byPage) fetch() error {
	u.askFor(attention.Top(u.gains, u.affordable(u.pages)))
	pins, err := u.pin(tiers.PlaneV4, u.reqs)
	if err != nil {
		return err
	}
	u.pins, u.pinned = append(u.pins, pins...), append(u.pinned, u.askedOf...)
	u.take(pins)
	return nil
}

// askFor makes a request for each plane of each segment of which pages are chosen.
func (u *byPage) askFor(chosen []int) {
	u.fetched, u.reqs, u.ranges, u.askedOf = u.fetched[:0], u.reqs[:0], u.ranges[:0], u.askedOf[:0]
	for seg := range u.segs {
		s, first := &u.segs[seg], len(u.fetched)
		for ; len(chosen) > 0 && chosen[0] < s.endPage; chosen = chosen[1:] {
			if first := u.firsts[chosen[0]]; first != nil && u.gains[chosen[0]] > 0 {
				u.fetched = append(u.fetched, wholePage{seg: seg, page: int(u.pageOf[chosen[0]]), keys: [compress.NumKeyPlanes - 1][]byte{first}})
			}
		}
		pages := u.fetched[first:]
		if len(pages) == 0 {
			continue
		}
		from, group := len(u.ranges), -1
		u.ranges = append(u.ranges, s.view.KeyOrder())
		for i := range pages {
			if g := s.groupOf(pages[i].page); g != group {
				group = g
				u.ranges = append(u.ranges, s.view.Steps(g))
			}
		}
		u.request(seg, tiers.PlaneSteps, from)
		for plane := 1; plane < len(pages[0].keys); plane++ {
			from := len(u.ranges)
			for i := range pages {
				u.ranges = append(u.ranges, s.view.PageKeys(plane, pages[i].page))
			}
			u.request(seg, tiers.KeyPlanes[plane], from)
		}
		from = len(u.ranges)
		for i := range pages {
			u.ranges = append(u.ranges, s.view.PageValues(pages[i].page))
		}
		u.request(seg, tiers.PlaneV4, from)
		if s.hasDrains(pages) {
			u.request(seg, tiers.PlaneDrains, len(u.ranges)) // whole
		}
	}
}

// request asks for the ranges of a segment's plane from the one of that number on.
func (u *byPage) request(seg int, p tiers.Plane, from int) {
	u.reqs = append(u.reqs, tiers.Request{Header: u.segs[seg].s.Header, Head: u.q.Head, Plane: p, Ranges: u.ranges[from:len(u.ranges):len(u.ranges)]})
	u.askedOf = append(u.askedOf, seg)
}

// groupOf returns the group of tokens of a page.
func (s *segmentRun) groupOf(page int) int {
	first, _ := s.view.LeavesOf(page)
	return s.view.StepGroup(first)
}

// hasDrains says whether drains lie in any of the pages of a segment.
func (s *segmentRun) hasDrains(pages []wholePage) bool {
	return s.view.Drains() > 0 && slices.ContainsFunc(pages, func(p wholePage) bool { return p.page == s.view.PageOfDrains() })
}

// take gives the pages what came of askFor's requests, and lets go of pages of which anything is late: means stand for them.
func (u *byPage) take(pins []tiers.Pin) {
	for i := range pins {
		u.acc.LateBytes += int64(pins[i].Late)
	}
	kept := u.fetched[:0]
	for first, end := 0, 0; first < len(u.fetched); first = end {
		seg := u.fetched[first].seg
		s := &u.segs[seg]
		for end = first; end < len(u.fetched) && u.fetched[end].seg == seg; end++ {
		}
		pages := u.fetched[first:end]
		const planes = len(wholePage{}.keys)
		steps, keys, values := pins[0].Ranges, pins[:planes], pins[planes].Ranges // keys: from the second plane on
		pins = pins[planes+1:]
		var drains []byte
		if s.hasDrains(pages) {
			drains, pins = pins[0].Ranges[0], pins[1:]
		}
		order, group, n := steps[0], -1, 0
		for i, p := range pages {
			if g := s.groupOf(p.page); g != group {
				group, n = g, n+1
			}
			p.order, p.bins, p.values = order, steps[n], values[i]
			whole := p.order != nil && p.bins != nil && p.values != nil
			for plane := 1; plane < planes; plane++ {
				p.keys[plane] = keys[plane].Ranges[i]
				whole = whole && p.keys[plane] != nil
			}
			if s.view.Drains() > 0 && p.page == s.view.PageOfDrains() {
				p.drains = drains
				whole = whole && drains != nil
			}
			if whole {
				kept = append(kept, p)
			} else {
				u.acc.Late += int64(s.view.PageTokens(p.page))
			}
		}
	}
	clear(u.fetched[len(kept):])
	u.fetched = kept
}

// attend attends to all that was fetched.
func (u *byPage) attend() error {
	rows, d := u.rows, u.d
	for r := range u.rot {
		u.rot[r].Max = u.total[r] + headroom
	}
	u.out = attention.AppendSums(nil, u.rot)
	u.stored, u.scores = u.floats(rows*d), u.floats(rows*kernels.ValueTokens)
	u.folded = kernels.KeyQuery{Words: u.words(rows * d), Scale: u.floats(2 * rows)}
	u.pageOf = u.pageOf[:0]
	seg, group := -1, -1
	for i := range u.fetched {
		p := &u.fetched[i]
		u.prefetch(i)
		s := &u.segs[p.seg]
		g := s.groupOf(p.page)
		err := error(nil)
		if p.seg != seg {
			for ; seg < p.seg; seg++ {
				u.segs[seg+1].firstPage, u.segs[seg+1].endPage = len(u.pageOf), len(u.pageOf)
			}
			group = -1
			err = u.enter(p)
		}
		if g != group && err == nil {
			group = g
			err = u.layout.FoldStored(u.folded, u.stored, p.bins, s.view.Info.KeyExp)
		}
		if err == nil {
			err = u.page(p)
		}
		if err != nil {
			return corrupt(s.s, err)
		}
		u.pageOf = append(u.pageOf, int32(p.page))
		s.endPage = len(u.pageOf)
	}
	for seg++; seg < len(u.segs); seg++ {
		u.segs[seg].firstPage, u.segs[seg].endPage = len(u.pageOf), len(u.pageOf)
	}
	u.flush()
	return nil
}

// prefetch has the processor fetch the keys of the page behind the i-th, and the values of that.
func (u *byPage) prefetch(i int) {
	kernels.Prefetch(u.fetched[i].values)
	if i+1 < len(u.fetched) {
		next := &u.fetched[i+1]
		kernels.Prefetch(next.bins)
		for _, b := range next.keys {
			kernels.Prefetch(b)
		}
	}
}

// enter goes on to the segment of a page.
func (u *byPage) enter(p *wholePage) error {
	order, err := compress.ParseKeyOrder(p.order, u.d)
	if err != nil {
		return err
	}
	order.Permute(u.stored, u.q.Q)
	u.layout = compress.NewKeyLayout(u.d, order.Lines, compress.NumKeyPlanes-1)
	return nil
}

// page attends to a page.
func (u *byPage) page(p *wholePage) error {
	s := &u.segs[p.seg]
	n := s.view.PageTokens(p.page)
	leaves := (n + tiers.LeafTokens - 1) / tiers.LeafTokens
	at := u.from + u.batch.Len()
	if at+leaves*tiers.LeafTokens > kernels.ValueTokens {
		u.flush()
		at, u.from = 0, 0
	}
	u.layout.ScoreLeaves(u.scores[at:], tiers.LeafTokens, kernels.ValueTokens, u.folded, p.keys[:], u.planeBytes[:], leaves, 0)
	if p.drains != nil {
		if err := u.scoreDrains(p, at); err != nil {
			return err
		}
	}
	u.weigh(s, p, at, n)
	row, scales := compress.ValueRowBytes(u.d), n*compress.ValueScaleBytes
	codes := p.values[scales:]
	if p.drains != nil { // a batch has low codes or has none
		u.flush()
		m := s.view.Drains()
		u.batch.AppendRun(p.values, codes, p.drains[s.view.DrainKeys().Len:], m, u.d, 0)
		u.flush()
		u.batch.AppendRun(p.values[m*compress.ValueScaleBytes:scales], codes[m*row:], nil, n-m, u.d, 0)
		return nil
	}
	u.batch.AppendRun(p.values[:scales], codes, nil, n, u.d, 0)
	return nil
}

// scoreDrains scores the drains, a page's first leaf, by all bits of their keys.
func (u *byPage) scoreDrains(p *wholePage, at int) error {
	s := &u.segs[p.seg]
	order, err := compress.ParseKeyOrder(p.order, u.d)
	if err != nil {
		return err
	}
	all := compress.NewKeyLayout(u.d, order.Lines, compress.NumKeyPlanes)
	if err := all.FoldStored(u.folded, u.stored, p.bins, s.view.Info.KeyExp); err != nil {
		return err
	}
	var planes [compress.NumKeyPlanes][]byte
	copy(planes[:], p.keys[:])
	planes[len(p.keys)] = p.drains
	all.Score(u.scores[at:], kernels.ValueTokens, u.folded, planes[:])
	return u.layout.FoldStored(u.folded, u.stored, p.bins, s.view.Info.KeyExp)
}

// weigh makes weights of the scores of a page's n tokens, which begin at the given one.
func (u *byPage) weigh(s *segmentRun, p *wholePage, at, n int) {
	for r := range u.rows {
		row := u.scores[r*kernels.ValueTokens+at:][:n]
		attention.SoftcapAll(row, u.q.Softcap)
		if u.tr.Token != nil {
			for t, score := range row {
				u.tr.Token(r, s.index, p.page*tiers.PageTokens+t, score, Read)
			}
		}
		if kernels.Largest(row, u.rot[r].Max) > u.rot[r].Max {
			u.flush() // weights are in the unit that there was
		}
	}
	for r := range u.rows {
		p := &u.rot[r]
		before := *p
		attention.Weigh(u.rot[r:r+1], u.scores[r*kernels.ValueTokens+at:], kernels.ValueTokens, n)
		sum := p.Sum - before.Sum
		if p.Max > before.Max { // the sum is more than means said
			sum = p.Sum - before.Sum*math.Exp(float64(before.Max-p.Max))
			u.total[r] = logAdd(u.total[r], p.Max+log(float32(sum)))
			u.unit[r] = exp(p.Max - u.total[r])
		}
		s.received += float32(sum) * u.unit[r]
	}
	u.acc.Read += int64(n)
}

// flush adds the batch's values to the sums.
func (u *byPage) flush() {
	n := u.batch.Len()
	u.batch.AddTo(u.out, u.scores[u.from:], kernels.ValueTokens)
	u.batch.Reset()
	u.from += n
}

// estimate lets the other pages stand by their means, merges everything into the query's partials and estimates the error.
func (u *byPage) estimate() error {
	u.pages = len(u.pageOf)
	u.sumRest()
	u.rest.addTo(u.rot)
	mergeRotated(u.q.Partials, u.rot, u.d)
	u.acc.Estimated += u.rest.tokens
	out := u.floats(u.d)
	for r := range u.rows {
		p := &u.q.Partials[r]
		p.Output(out)
		norm2, total := attention.Norm2(out), p.LSE()
		u.traceRest(r)
		if norm2 > 0 {
			u.acc.Error += min(1, errorScale*float32(math.Sqrt(float64(u.rest.error2(r, total, norm2)/norm2)))) / float32(u.rows)
		}
	}
	u.acc.errorRows = float64(u.rows)
	return nil
}

// traceRest tells of the tokens of the pages that were not read: of those that were skimmed each has its own weight, the others share their page's.
func (u *byPage) traceRest(r int) {
	if u.tr.Token == nil {
		return
	}
	skimmed := map[[2]int32][]leaf{}
	for _, x := range u.leaves {
		if x.planes > 0 {
			at := [2]int32{x.seg, x.i / (tiers.PageTokens / tiers.LeafTokens)}
			skimmed[at] = append(skimmed[at], x)
		}
	}
	for i := range u.segs {
		s := &u.segs[i]
		at := s.firstPage
		for p := range s.view.Pages() {
			if at < s.endPage && int(u.pageOf[at]) == p {
				at++
				continue
			}
			n := s.view.PageTokens(p)
			for t := range n {
				log, how := u.surveyed[r*u.all+s.firstOfAll+p]-attention.LogN(n), Estimated
				if leaves := skimmed[[2]int32{int32(i), int32(p)}]; leaves != nil {
					x := &leaves[t/tiers.LeafTokens]
					log, how = u.logOf(r, u.weightsOf(x)[r*tiers.LeafTokens+t%tiers.LeafTokens]), Scanned
				}
				u.tr.Token(r, s.index, p*tiers.PageTokens+t, log, how)
			}
		}
	}
}
