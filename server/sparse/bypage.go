package sparse

import (
	"math"
	"slices"

	"kvtier/attention"
	"kvtier/attention/kernels"
	"kvtier/compress"
	"kvtier/tiers"
)

// A budget bounds bytes because bytes from a disk cost time. Where they come from RAM, deciding about a leaf costs more than
// reading it. So an answer by page decides three times, about pages: their means say which are skimmed, the first bits of their keys which of these are
// looked at again, and the next bits which are read whole. For the same bytes it errs more, for the same time much less
// (docs/decisions/0037-by-page.md, 0039-a-second-look-at-pages.md).
type byPage struct {
	*run
	drains float64            // bytes of drains' last bits, of all segments
	gains  []float32          // [pages], what reading them is worth
	out    [][]float32        // rot's sums of values
	layout compress.KeyLayout // of the keys of the segment under way
	folded kernels.KeyQuery   // the query in the bins of the group of tokens under way
	batch  kernels.ValueBatch
	scores []float32 // [rows][kernels.ValueTokens]; those of the batch's tokens, which begin at from, are weights
	from   int
}

// wholePage is a page that was chosen, and what is stored of it.
type wholePage struct {
	seg, page    int // page of its segment
	bins, values []byte
	keys         [compress.NumKeyPlanes - 1][]byte
	drains       []byte // the last bits of drains, if they are among its tokens
}

const (
	// skimPart is the part of a budget, page means taken off, that goes to the first bits of keys,
	skimPart = .15
	// leastSkimmed how many pages are skimmed, if there are so many, whatever the budget: of few pages means say too little,
	leastSkimmed = 8
	// and againTimes how many times as many pages are looked at again as can be read.
	againTimes = 2
)

// skimmedPages is how many pages an answer by page skims when share of the body's 4-bit bytes may be read.
func (b *body) skimmedPages(share float32) int {
	left := max(0, float64(share)*b.full-b.always-b.means)
	return int(min(b.pages, max(leastSkimmed, skimPart*left/b.scanOfPage())))
}

// affordable is how many pages the rest of the budget pays for, of which so many planes of keys are there: with one, bins are to be read, too.
func (u *byPage) affordable(planes int) int {
	page := float64(tiers.PageTokens * (compress.ValueScaleBytes + compress.ValueRowBytes(u.d)))
	for _, plane := range u.planeBytes[planes : compress.NumKeyPlanes-1] {
		page += float64(leavesOfPage * plane)
	}
	most := min(float64(u.pages), max(0, u.left)/page)
	// Of a segment of which a page is chosen drains' last bits may be read.
	most -= u.drains * min(1, most/float64(len(u.segs))) / page
	if planes == 1 { // chosen pages share bins with others that are chosen
		const shared = tiers.StepTokens / tiers.PageTokens
		all := float64(u.all)
		groups := all / shared * (1 - math.Pow(1-most/all, shared))
		most -= groups * float64(compress.KeyStepsBytes(u.d)) / page
	}
	return int(max(1, most))
}

// answer goes through the stages of an answer by page.
func (u *byPage) answer() error {
	return u.through(
		stage{u.survey, &u.acc.NsScore},
		stage{u.skim, &u.acc.NsScan},
		stage{u.skimAgain, &u.acc.NsScan},
		stage{u.fetch, &u.acc.NsFetch},
		stage{u.attend, &u.acc.NsScan},
		stage{func() error { u.estimate(); return nil }, &u.acc.NsScore},
	)
}

// survey scores the means of all pages.
func (u *byPage) survey() error {
	if err := u.readMeanKeys(); err != nil {
		return err
	}
	u.massAll()
	u.weighAll()
	u.acc.Pages, u.acc.PagesTotal = int64(u.all), int64(u.all)
	for i := range u.segs {
		if v := u.segs[i].view; v.Drains() > 0 {
			u.drains += lines(v.DrainValue(v.Info.Body + v.Drains()).Off)
		}
	}
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

// fetch has the pages that weigh most pinned, all planes of all segments together.
func (u *byPage) fetch() error {
	u.askFor(attention.Top(u.gains, u.affordable(skimPlanes)))
	pins, err := u.pin(tiers.PlaneV4, u.reqs)
	if err != nil {
		return err
	}
	u.pins = append(u.pins, pins...)
	u.take(pins)
	return nil
}

// askFor makes a request for each plane of each segment of which pages are chosen.
func (u *byPage) askFor(chosen []int) {
	u.fetched, u.reqs, u.ranges = u.fetched[:0], u.reqs[:0], u.ranges[:0]
	for seg := range u.segs {
		s, first := &u.segs[seg], len(u.fetched)
		for ; len(chosen) > 0 && chosen[0] < s.endPage; chosen = chosen[1:] {
			if page := chosen[0]; u.gains[page] > 0 {
				x := wholePage{seg: seg, page: int(u.pageOf[page]), bins: u.bins[page]}
				copy(x.keys[:], u.keys[page][:])
				u.fetched = append(u.fetched, x)
			}
		}
		pages := u.fetched[first:]
		if len(pages) == 0 {
			continue
		}
		for plane := skimPlanes; plane < len(pages[0].keys); plane++ {
			from := len(u.ranges)
			for i := range pages {
				u.ranges = append(u.ranges, s.view.PageKeys(plane, pages[i].page))
			}
			u.request(seg, tiers.KeyPlanes[plane], from)
		}
		from := len(u.ranges)
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
	u.pinned = append(u.pinned, seg)
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
	kept, read := u.fetched[:0], u.list[:0]
	for first, end := 0, 0; first < len(u.fetched); first = end {
		seg := u.fetched[first].seg
		s := &u.segs[seg]
		for end = first; end < len(u.fetched) && u.fetched[end].seg == seg; end++ {
		}
		pages := u.fetched[first:end]
		const planes = len(wholePage{}.keys) - skimPlanes
		keys, values := pins[:planes], pins[planes].Ranges
		pins = pins[planes+1:]
		var drains []byte
		if s.hasDrains(pages) {
			drains, pins = pins[0].Ranges[0], pins[1:]
		}
		for i, p := range pages {
			p.values = values[i]
			whole := p.values != nil
			for plane, pin := range keys {
				p.keys[skimPlanes+plane] = pin.Ranges[i]
				whole = whole && pin.Ranges[i] != nil
			}
			if s.view.Drains() > 0 && p.page == s.view.PageOfDrains() {
				p.drains = drains
				whole = whole && drains != nil
			}
			if whole {
				kept, read = append(kept, p), append(read, s.firstOfAll+p.page)
			} else {
				u.acc.Late += int64(s.view.PageTokens(p.page))
			}
		}
	}
	clear(u.fetched[len(kept):])
	u.fetched, u.list = kept, read
	u.tell(read)
}

// attend attends to all that was fetched.
func (u *byPage) attend() error {
	for r := range u.rot {
		u.rot[r].Max = u.total[r] + headroom
	}
	u.out, u.scores = attention.AppendSums(nil, u.rot), u.floats(u.rows*kernels.ValueTokens)
	u.folded = kernels.KeyQuery{Words: u.words(u.rows * u.d), Scale: u.floats(2 * u.rows)}
	seg, group := -1, -1
	for i := range u.fetched {
		p := &u.fetched[i]
		u.prefetch(i)
		s := &u.segs[p.seg]
		if p.seg != seg {
			seg, group = p.seg, -1
			u.layout = compress.NewKeyLayout(u.d, s.codes.order.Lines, len(p.keys))
		}
		if g := s.groupOf(p.page); g != group {
			group = g
			if err := u.fold(p, &u.layout); err != nil {
				return err
			}
		}
		if err := u.page(p); err != nil {
			return err
		}
	}
	u.flush()
	return nil
}

// fold brings the query into the bins of a page, of which the keys have a layout.
func (u *byPage) fold(p *wholePage, layout *compress.KeyLayout) error {
	s := &u.segs[p.seg]
	if err := layout.FoldStored(u.folded, s.codes.q, p.bins, s.view.Info.KeyExp); err != nil {
		return corrupt(s.s, err)
	}
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
	u.weigh(s, p.page, at, n)
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
	const all = compress.NumKeyPlanes
	layout := compress.NewKeyLayout(u.d, u.segs[p.seg].codes.order.Lines, all)
	if err := u.fold(p, &layout); err != nil {
		return err
	}
	var planes [all][]byte
	copy(planes[:], p.keys[:])
	planes[len(p.keys)] = p.drains
	layout.Score(u.scores[at:], kernels.ValueTokens, u.folded, planes[:])
	return u.fold(p, &u.layout) // for the pages behind it
}

// weigh makes weights of the scores of a page's n tokens, which begin at the given one.
func (u *byPage) weigh(s *segmentRun, page, at, n int) {
	for r := range u.rows {
		row := u.scores[r*kernels.ValueTokens+at:][:n]
		attention.SoftcapAll(row, u.q.Softcap)
		if u.tr.Token != nil {
			for t, score := range row {
				u.tr.Token(r, s.index, page*tiers.PageTokens+t, score, Read)
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
func (u *byPage) estimate() {
	u.sumRest()
	u.rest.addTo(u.rot)
	mergeRotated(u.q.Partials, u.rot, u.d)
	u.acc.Estimated += u.rest.tokens
	out := u.floats(u.d)
	for r := range u.rows {
		p := &u.q.Partials[r]
		p.Output(out)
		norm2, total := attention.Norm2(out), p.LSE()
		if norm2 > 0 {
			u.acc.Error += min(1, errorScale*float32(math.Sqrt(float64(u.rest.error2(r, total, norm2)/norm2)))) / float32(u.rows)
		}
	}
	u.acc.errorRows = float64(u.rows)
	u.traceOthers()
}

// traceOthers tells of the tokens of the pages that were not read: of those that were skimmed each has its own weight, the others share their page's.
func (u *byPage) traceOthers() {
	if u.tr.Token == nil {
		return
	}
	for i := range u.segs {
		s := &u.segs[i]
		for p := range u.others(s) {
			n, all := s.view.PageTokens(p), s.firstOfAll+p
			seen, skimmed := u.skimmer.seen[all]
			for r := range u.rows {
				for t := range n {
					if skimmed {
						u.tr.Token(r, s.index, p*tiers.PageTokens+t, seen[r*tiers.PageTokens+t], Scanned)
					} else {
						u.tr.Token(r, s.index, p*tiers.PageTokens+t, u.surveyed[r*u.all+all]-attention.LogN(n), Estimated)
					}
				}
			}
		}
	}
}
