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
	at       int // in the tables of scratch: its index among leaves
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
				at: n, most: compress.NumKeyPlanes - 1}
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

// headroom is how far, log, the unit of weights lies above what the softmax sum is taken for at first:
// the sum may have been underestimated, and no weight is more than 1.
const headroom = 8

// leastWeight is the least weight that counts for something: squares of lesser ones leave float32's
// normal range, where processors take long. As a share that is about leastShare.
const (
	leastWeight = 1e-18
	leastShare  = leastWeight * 2981 // exp(headroom)
)

// scoreLeaf weighs the leaf's tokens by the planes that were read. Channels of
// which nothing is known yet stand at the page's mean. What the unknown bits
// scatter raises a weight on average, as it does a mass (attention.Mass). Padding weighs nothing.
func (u *run) scoreLeaf(x *leaf) {
	w, sums := u.weightsOf(x), u.sumsOf(x)
	u.score(w, x)
	kernels.LeafWeights(w, sums, leastWeight)
	for r := range u.rows {
		if sums[2*r] >= 1 { // a weight may have been more than 1
			u.raise(x)
			u.scoreLeaf(x)
			return
		}
	}
}

// score writes the logs of a leaf's weights to dst [rows][16].
func (u *run) score(dst []float32, x *leaf) {
	how := &u.scoring
	if how.page != x.page || how.planes != len(x.planes) || how.group != x.group { // a page's leaves come together
		u.prepare(how, x)
	}
	how.layout.Score(dst, tiers.LeafTokens, how.query, x.planes)
	if u.q.Softcap == 0 && x.n == tiers.LeafTokens {
		return
	}
	for r := range u.rows {
		log := dst[r*tiers.LeafTokens:][:tiers.LeafTokens]
		if u.q.Softcap != 0 {
			for t, score := range log {
				log[t] = how.grades[r].raise + attention.Softcap(score, u.q.Softcap) - u.base[r]
			}
		}
		for t := x.n; t < len(log); t++ {
			log[t] = -inf
		}
	}
}

// raise raises the unit of weights so that a leaf's are less than 1, and brings all weights there are to it.
func (u *run) raise(x *leaf) {
	u.score(u.rescored, x)
	for r := range u.rows {
		top := kernels.Largest(u.rescored[r*tiers.LeafTokens:][:tiers.LeafTokens], -inf)
		if top < -3 { // 16 of them are less than 1 together
			continue
		}
		factor := exp(-top - headroom)
		u.base[r] += top + headroom
		for i := range u.leaves {
			w, sums := u.weightsOf(&u.leaves[i])[r*tiers.LeafTokens:][:tiers.LeafTokens], u.sumsOf(&u.leaves[i])[2*r:]
			for t := range w {
				w[t] *= factor
			}
			sums[0], sums[1] = sums[0]*factor, sums[1]*factor*factor
		}
	}
	u.scoring.page = -1
}

// weightsOf returns the weights of a leaf's tokens, [rows][16].
func (u *run) weightsOf(x *leaf) []float32 {
	n := u.rows * tiers.LeafTokens
	return u.w[x.at*n:][:n:n]
}

// sumsOf returns the sums of a leaf's weights and of their squares, [rows][2].
func (u *run) sumsOf(x *leaf) []float32 {
	n := 2 * u.rows
	return u.sums[x.at*n:][:n:n]
}

// gainsOf returns what reading the values of a leaf's tokens takes away of the error.
func (u *run) gainsOf(x *leaf) []float32 {
	return u.valueGain[x.at*tiers.LeafTokens:][:tiers.LeafTokens]
}

// logOf returns the log of a weight, for traces.
func (u *run) logOf(r int, w float32) float32 { return u.base[r] + log(max(w, leastWeight)) }

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
			scale[2*r+1] += how.grades[r].raise - u.base[r]
		}
	}
}
