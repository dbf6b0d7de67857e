package sparse

import (
	"iter"
	"math"
	"slices"

	"kvtier/attention"
	"kvtier/attention/kernels"
	"kvtier/tiers"
)

// Of a context of a million tokens 16,000 pages have means, and a query can look into a few hundred of them. Survey
// scores all means once, in few passes; it tells the pages apart that may matter to any row, and all others
// stand together from then on, by their mass and their mean.

// A context of up to allApart pages has no rest. A test changes it.
var allApart = 2048

const (
	// apart is how many times as many pages of a longer one are told apart as may be scanned,
	apart = 2
	// and leastPart, of allApart, how many at least.
	leastPart = 4
)

// toldApart returns how many of so many pages are told apart if so many may be scanned.
func toldApart(all, scanned int) int {
	if all <= allApart {
		return all
	}
	return min(all, max(allApart/leastPart, apart*scanned))
}

// rest is what pages that are not told apart are together.
type rest struct {
	tokens int64
	mass   []float32   // [rows], log of the sum of their weights; -Inf if there are none
	means  [][]float32 // [rows][d], sum of mean values times weights, of which exp(mass) is the unit
	spread float32     // spread of values, mean of all pages
}

// survey scores all pages' means, and tells those apart that may matter.
func (u *run) survey() error {
	if err := u.readMeanKeys(); err != nil {
		return err
	}
	for p := range u.known {
		u.known[p] = !u.sparing
	}
	if u.pages == u.all {
		u.tellApart(nil, 0)
		return nil
	}
	u.massAll()
	u.weighAll()
	rank := u.rankAll()
	u.tellApart(rank, kthLargest(rank, u.pages))
	u.sumRest()
	return nil
}

// readMeanKeys reads all pages' mean keys, and their mean values if these are not chosen one by one, and scores the keys.
func (u *run) readMeanKeys() error {
	for i := range u.segs {
		means := u.segs[i].view.MeanKeys()
		if !u.sparing {
			means = tiers.Range{Len: means.Off + means.Len}
		}
		u.want(i, means)
	}
	if err := u.each(tiers.PlanePages, func(seg int, got got) error {
		s := &u.segs[seg]
		return s.view.PageMeans(&s.means, got.b[0])
	}); err != nil {
		return err
	}
	u.rest.mass = u.floats(u.rows)
	for r := range u.rest.mass {
		u.rest.mass[r] = -inf
	}
	return u.scoreAll()
}

// mostPages is how many pages a segment has at most, in whole leaves of mean keys.
const mostPages = tiers.SegmentTokens / tiers.PageTokens

// scoreAll scores the mean keys of all pages.
func (u *run) scoreAll() error {
	u.scores = sized(u.scores, u.rows*u.all)
	if u.q.Softcap != 0 {
		u.rawScores = sized(u.rawScores, u.rows*u.all)
	}
	u.folded = kernels.KeyQuery{Words: u.words(u.rows * u.d), Scale: u.floats(2 * u.rows)}
	of := u.floats(u.rows * mostPages)
	for i := range u.segs {
		s := &u.segs[i]
		if i+1 < len(u.segs) {
			u.segs[i+1].means.Prefetch()
		}
		if err := s.means.Keys.Scores(of, mostPages, u.q.Q, u.folded); err != nil {
			return corrupt(s.s, err)
		}
		for r := range u.rows {
			row := u.scores[r*u.all+s.firstOfAll:][:s.view.Pages()]
			copy(row, of[r*mostPages:])
			if u.q.Softcap != 0 {
				copy(u.rawScores[r*u.all+s.firstOfAll:], row)
			}
			attention.SoftcapAll(row, u.q.Softcap)
		}
	}
	return nil
}

// massAll estimates the log of every page's mass, by row, and by how much its strongest token may weigh more than that for a query of norm 1.
func (u *run) massAll() {
	u.surveyed, u.surprise = sized(u.surveyed, u.rows*u.all), sized(u.surprise, u.all)
	spreads, logs := u.floats(u.all), u.floats(u.all)
	x, full := &u.rest, attention.LogN(tiers.PageTokens)
	for p := range logs {
		logs[p] = full
	}
	for i := range u.segs {
		s := &u.segs[i]
		pages := s.view.Pages()
		s.means.Spreads.Read(spreads[s.firstOfAll:][:pages])
		x.spread += s.means.Values.SumOfSpreads()
		if last := pages - 1; last >= 0 { // it may not be full
			logs[s.firstOfAll+last] = attention.LogN(s.view.PageTokens(last))
		}
	}
	for r, norm2 := range u.norm2 {
		kernels.Masses(u.surveyed[r*u.all:][:u.all], u.scores[r*u.all:], logs, spreads, norm2/2, attention.MassClip)
	}
	for i := range logs {
		logs[i] *= 2
	}
	kernels.Roots(u.surprise, logs, spreads)
	x.spread /= float32(u.all)
}

// weighAll weighs pages, by row in units of the heaviest.
func (u *run) weighAll() {
	u.restWeights, u.tops = sized(u.restWeights, u.rows*u.all), u.floats(2*u.rows)
	for r := range u.rows {
		mass := u.surveyed[r*u.all:][:u.all]
		top := kernels.Largest(mass, -inf)
		u.tops[2*r], u.tops[2*r+1] = top, kernels.Weights(u.restWeights[r*u.all:][:u.all], mass, top)
	}
}

// totalOfAll is the estimated log of row r's softmax sum, by the exact zone and means.
func (u *run) totalOfAll(r int) float32 {
	return logAdd(u.q.Partials[r].LSE(), u.tops[2*r]+log(u.tops[2*r+1]))
}

// rankAll returns by how much, log, a page's strongest token may weigh at most of any row's softmax sum, as far as that is known.
func (u *run) rankAll() []float32 {
	rank := sized(u.rankOfAll, u.all)
	u.rankOfAll = rank
	for i := range rank {
		rank[i] = -inf
	}
	for r := range u.rows {
		total, norm := u.totalOfAll(r), float32(math.Sqrt(float64(u.norm2[r])))
		for i, x := range u.surveyed[r*u.all:][:u.all] {
			rank[i] = max(rank[i], x-total+norm*u.surprise[i])
		}
	}
	return rank
}

// ascending is the inverse of descending.
func ascending(b uint32) float32 {
	if b>>31 == 0 {
		return math.Float32frombits(^b &^ (1 << 31))
	}
	return math.Float32frombits(b)
}

// kthLargest returns a bound that about k numbers reach, at most: ties and near ties may be left out.
func kthLargest(x []float32, k int) float32 {
	const shift = 18
	var counts [1 << (32 - shift)]int32
	for _, v := range x {
		counts[descending(v)>>shift]++
	}
	n := 0
	for b, c := range counts {
		if n += int(c); n > k {
			return ascending(uint32(b)<<shift - 1)
		}
	}
	return -inf
}

// tellApart puts the pages whose rank reaches least into the run's tables; all of them if there are no ranks.
func (u *run) tellApart(rank []float32, least float32) {
	n := 0
	for i := range u.segs {
		s := &u.segs[i]
		s.firstPage = n
		pages := s.view.Pages()
		for p := 0; p < pages; p++ {
			from := p
			for p < pages && n < u.pages && (rank == nil || rank[s.firstOfAll+p] >= least) {
				u.pageOf[n], u.tokens[n], u.spreads[n] = int32(p), int32(s.view.PageTokens(p)), s.means.Spreads.Of(p)
				p, n = p+1, n+1
			}
			u.values.Add(s.means.Values, from, p)
		}
		s.endPage = n
	}
	u.shrink(n)
}

// shrink settles for fewer pages.
func (u *run) shrink(pages int) {
	u.pages, u.slots = pages, pages+len(u.segs)
	clear(u.tokens[pages:])
	u.tokens = u.tokens[:u.slots]
	u.scanned, u.known, u.norms, u.spreads, u.pageOf = u.scanned[:pages], u.known[:pages], u.norms[:pages], u.spreads[:pages], u.pageOf[:pages]
	u.scatter, u.far = u.scatter[:u.rows*pages], u.far[:u.rows*pages]
}

// sumRest adds up what is not told apart.
func (u *run) sumRest() {
	x := &u.rest
	x.means = u.newRows()
	weights, scales := u.restWeights, u.floats(u.rows)
	for r := range u.rows {
		w, top := weights[r*u.all:][:u.all], u.tops[2*r]
		sum := u.tops[2*r+1] - u.withoutPages(w)
		if sum > 0 && slices.ContainsFunc(w, func(x float32) bool { return x > 0 }) {
			x.mass[r], scales[r] = top+log(sum), 1/sum
		}
	}
	for i := range u.segs {
		s := &u.segs[i]
		if i+1 < len(u.segs) {
			u.segs[i+1].means.Values.Prefetch()
		}
		s.means.Values.AddTo(x.means, weights[s.firstOfAll:], u.all)
		x.tokens += int64(s.view.Stored())
		for _, p := range u.pageOf[s.firstPage:s.endPage] {
			x.tokens -= int64(s.view.PageTokens(int(p)))
		}
	}
	for r, row := range x.means {
		for j := range row {
			row[j] *= scales[r]
		}
	}
}

// others yields the pages of a segment that are not told apart, in order.
func (u *run) others(s *segmentRun) iter.Seq[int] {
	return func(yield func(int) bool) {
		apart := u.pageOf[s.firstPage:s.endPage]
		for p := range s.view.Pages() {
			if len(apart) > 0 && int(apart[0]) == p {
				apart = apart[1:]
			} else if !yield(p) {
				return
			}
		}
	}
}

// withoutPages sets weights of pages that are told apart to 0, and returns their sum.
func (u *run) withoutPages(w []float32) (sum float32) {
	for i := range u.segs {
		s := &u.segs[i]
		for _, p := range u.pageOf[s.firstPage:s.endPage] {
			sum += w[s.firstOfAll+int(p)]
			w[s.firstOfAll+int(p)] = 0
		}
	}
	return sum
}

// addTo adds the rest to partials that are in rotated space.
func (x *rest) addTo(outs []attention.Partial) {
	for r := range outs {
		if x.mass[r] > -inf {
			outs[r].Add(x.mass[r], x.means[r])
		}
	}
}

// restError is by how much of its share the rest errs, in the units of errorScale: of masses of pages that nobody looked at all may be too large or too small
// together, so that this does not depend on how many there are. Measured (docs/decisions/0039-a-second-look-at-pages.md).
const restError = .17 / errorScale

// error2 is the square of the error that the rest causes in row r, if exp(total) is the softmax sum and norm2 the square of the output: its values scatter, and
// its mean lies as far from the output as that is from nothing.
func (x *rest) error2(r int, total, norm2 float32) float32 {
	if x.mass[r] == -inf {
		return 0
	}
	share := restError * exp(min(x.mass[r]-total, 0))
	return share * share * (x.spread + norm2)
}
