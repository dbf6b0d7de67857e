package sparse

import (
	"kvtier/attention"
	"kvtier/attention/kernels"
	"kvtier/compress"
	"kvtier/tiers"
)

// leaf is 16 tokens whose keys are read in part.
type leaf struct {
	page     int // in the run's tables
	seg, i   int
	place, n int // first token, number of tokens
	group    int // of steps, in run.groups
	planes   [][]byte
	most     int // planes of keys that can be read: the last one of drains only
	at       int // of its tokens in the tables of scratch
	// What reading more of it takes away of the error, as far as is known, once it is weighed: keys, by
	// the number of planes that are read then; and values, and about how many tokens rule that.
	weighed                bool
	keyGain                [compress.NumKeyPlanes]float32
	valueGain, valueTokens float32
	chosen                 uint16 // a bit for each token whose value is read
}

// addLeaves adds the leaves of the chosen pages, which are in order.
func (u *run) addLeaves(chosen []int) {
	seg := 0
	for _, page := range chosen {
		for page >= u.segs[seg].firstPage+u.segs[seg].view.Pages() {
			seg++
		}
		s := &u.segs[seg]
		first, end := s.view.LeavesOf(page - s.firstPage)
		for l := first; l < end; l++ {
			n := len(u.leaves)
			x := leaf{page: page, seg: seg, i: l, place: l * tiers.LeafTokens, n: s.view.LeafTokens(l), group: s.firstGroup + s.view.StepGroup(l),
				at: n * tiers.LeafTokens, most: compress.NumKeyPlanes - 1}
			if s.view.IsDrain(l) && s.view.DrainKeys().Len > 0 {
				x.most++
			}
			at := n * compress.NumKeyPlanes
			x.planes = u.planes[at : at : at+compress.NumKeyPlanes]
			u.leaves = append(u.leaves, x)
		}
	}
}

// scoring is how the leaves of a page are scored of which so many planes are read.
type scoring struct {
	page, group, planes int
	layout              *compress.KeyLayout
	query               kernels.KeyQuery
	grades              []grade
}

// scoreLeaf scores the leaf's tokens from the planes that were read. Channels of
// which nothing is known yet stand at the page's mean. What the unknown bits
// scatter raises a weight on average, as it does a mass (attention.Mass). Padding weighs nothing.
func (u *run) scoreLeaf(x *leaf) {
	how := &u.scoring
	if how.page != x.page || how.planes != len(x.planes) || how.group != x.group { // a page's leaves come together
		u.prepare(how, x)
	}
	how.layout.Score(u.log[x.at:], u.stride, how.query, x.planes)
	if u.q.Softcap == 0 && x.n == tiers.LeafTokens {
		return
	}
	for r := range u.rows {
		log := u.log[r*u.stride+x.at:][:tiers.LeafTokens]
		if u.q.Softcap != 0 {
			for t, score := range log {
				log[t] = how.grades[r].raise + attention.Softcap(score, u.q.Softcap)
			}
		}
		for t := x.n; t < len(log); t++ {
			log[t] = -inf
		}
	}
}

func (u *run) prepare(how *scoring, x *leaf) {
	s, planes := &u.segs[x.seg], len(x.planes)
	query, scale := u.query(x), how.query.Scale
	*how = scoring{x.page, x.group, planes, u.layoutOf(s, planes), kernels.KeyQuery{Words: query.Words, Scale: scale}, u.grades(x, planes)}
	copy(scale, query.Scale)
	if hidden := u.hiddenOf(s, planes); hidden != nil {
		for r, pages := 0, s.view.Pages(); r < u.rows; r++ {
			scale[2*r+1] += hidden[r*pages+x.page-s.firstPage]
		}
	}
	if u.q.Softcap == 0 {
		for r := range how.grades {
			scale[2*r+1] += how.grades[r].raise
		}
	}
}

// sumsOf returns the sum of a leaf's shares of row r, and the sum of their squares.
func (u *run) sumsOf(x *leaf, r int) (sum, squares float32) {
	at := 2 * (r*u.stride + x.at) / tiers.LeafTokens
	return u.sums[at], u.sums[at+1]
}
