package sparse

import (
	"kvtier/attention"
	"kvtier/attention/kernels"
	"kvtier/compress"
	"kvtier/tiers"
)

// leaf is 16 tokens whose keys are read in part. There may be many: it is kept small.
type leaf struct {
	first     []byte // plane of its keys; deep leaves have all in run.deepPlanes
	at        int32  // index in run.leaves
	page      int32  // in the run's tables
	seg, i    int32
	group     int32 // of steps, in run.groups
	deep      int32 // index in the tables of deep leaves; -1: only the first plane is read
	n         uint8 // tokens
	planes    uint8 // of keys that are read
	most      uint8 // that can be read: the last one of drains only
	weighed   bool
	chosen    uint16  // a bit for each token whose value is read
	late      uint16  // and for each of which something is late
	keyGain   float32 // what reading the next plane takes away of the error, as far as is known, once it is weighed
	valueGain float32 // the same of all values
	tokens    float32 // about how many of them rule that
}

// all is a bit for each token.
func (x *leaf) all() uint16 { return uint16(1<<x.n - 1) }

// place returns where the leaf's first token is stored.
func (x *leaf) place() int { return int(x.i) * tiers.LeafTokens }

// planesOf returns the planes that are read, until the next call.
func (u *run) planesOf(x *leaf) [][]byte {
	if x.deep < 0 {
		u.single[0] = x.first
		return u.single[:x.planes]
	}
	return u.deepPlanes[x.deep][:x.planes]
}

// addPlane takes in a leaf's next plane.
func (u *run) addPlane(x *leaf, b []byte) {
	switch {
	case x.planes == 0:
		x.first = b
	case x.deep < 0:
		x.deep = int32(len(u.deepPlanes))
		u.deepPlanes = append(u.deepPlanes, [compress.NumKeyPlanes][]byte{x.first, b})
		u.valueGain = append(u.valueGain, make([]float32, tiers.LeafTokens)...)
	default:
		u.deepPlanes[x.deep][x.planes] = b
	}
	x.planes++
}

// prefetch has the processor fetch what scoring a leaf reads.
func (u *run) prefetch(x *leaf) {
	for _, b := range u.planesOf(x) {
		kernels.Prefetch(b)
	}
}

// addLeaves adds the leaves of the chosen pages, which are in order.
func (u *run) addLeaves(chosen []int) {
	seg := 0
	for _, page := range chosen {
		for page >= u.segs[seg].endPage {
			seg++
		}
		s := &u.segs[seg]
		first, end := s.view.LeavesOf(int(u.pageOf[page]))
		for l := first; l < end; l++ {
			x := leaf{at: int32(len(u.leaves)), page: int32(page), seg: int32(seg), i: int32(l), group: int32(s.firstGroup + s.view.StepGroup(l)),
				n: uint8(s.view.LeafTokens(l)), most: compress.NumKeyPlanes - 1, deep: -1}
			if s.view.IsDrain(l) && s.view.DrainKeys().Len > 0 {
				x.most++
			}
			u.leaves = append(u.leaves, x)
		}
	}
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

// scoreLeaves weighs the tokens of u.leaves[lo:hi], which share their bins and of which the same planes were read, by these planes. Channels of
// which nothing is known yet stand at the page's mean. What the unknown bits
// scatter raises a weight on average, as it does a mass (attention.Mass). Padding weighs nothing.
func (u *run) scoreLeaves(lo, hi int) {
	n := u.rows * tiers.LeafTokens
	w, sums := u.w[lo*n:hi*n], u.sums[2*lo*u.rows:2*hi*u.rows]
	u.score(w, lo, hi)
	kernels.LeafWeights(w, sums, u.offsetsOf(lo, hi), leastWeight)
	for at := 0; at < len(sums); at += 2 {
		if sums[at] >= 1 { // a weight may have been more than 1
			u.raise(&u.leaves[lo+at/(2*u.rows)])
			u.scoreLeaves(lo, hi)
			return
		}
	}
}

// score writes the scores of leaves [lo, hi) to dst [leaves][rows][16], as far as they are known: see offsetsOf.
func (u *run) score(dst []float32, lo, hi int) {
	x, n := &u.leaves[lo], u.rows*tiers.LeafTokens
	s, planes := &u.segs[x.seg], int(x.planes)
	layout, query := u.layoutOf(s, planes), u.query(x)
	for i := lo; i < hi; i++ {
		layout.Score(dst[(i-lo)*n:], tiers.LeafTokens, query, u.planesOf(&u.leaves[i]))
	}
	if u.q.Softcap != 0 {
		u.capScores(dst, lo, hi)
	}
	for i := lo; i < hi; i++ {
		for t := int(u.leaves[i].n); t < tiers.LeafTokens; t++ {
			for at := (i-lo)*n + t; at < (i-lo+1)*n; at += tiers.LeafTokens {
				dst[at] = -inf
			}
		}
	}
}

// capScores caps scores, with what pages' means add to them.
func (u *run) capScores(scores []float32, lo, hi int) {
	hidden := u.hiddenOf(&u.segs[u.leaves[lo].seg], int(u.leaves[lo].planes))
	for i := lo; i < hi; i++ {
		for r := range u.rows {
			row := scores[((i-lo)*u.rows+r)*tiers.LeafTokens:][:tiers.LeafTokens]
			if hidden != nil {
				for t := range row {
					row[t] += hidden[r*mostPages+int(u.pageOf[u.leaves[i].page])]
				}
			}
			attention.SoftcapAll(row, u.q.Softcap)
		}
	}
}

// offsetsOf returns, until the next call, what makes logs of weights, in the unit of weights, of scores of leaves [lo, hi), [leaves][rows]: what unknown bits raise a
// weight by, and what the page's mean scores in the channels of which nothing is known, unless scores are capped with that.
func (u *run) offsetsOf(lo, hi int) []float32 {
	x := &u.leaves[lo]
	s, planes := &u.segs[x.seg], int(x.planes)
	grades, hidden := u.grades(x, planes), u.hiddenOf(s, planes)
	u.offsets = sized(u.offsets, (hi-lo)*u.rows)
	for i := range hi - lo {
		page := int(u.pageOf[u.leaves[lo+i].page])
		for r := range grades {
			offset := grades[r].raise - u.base[r]
			if hidden != nil && u.q.Softcap == 0 {
				offset += hidden[r*mostPages+page]
			}
			u.offsets[i*u.rows+r] = offset
		}
	}
	return u.offsets
}

// raise raises the unit of weights so that a leaf's are less than 1, and brings all weights there are to it.
func (u *run) raise(x *leaf) {
	u.score(u.rescored, int(x.at), int(x.at)+1)
	offsets := u.offsetsOf(int(x.at), int(x.at)+1)
	for r := range u.rows {
		top := kernels.Largest(u.rescored[r*tiers.LeafTokens:][:tiers.LeafTokens], -inf) + offsets[r]
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
}

// weightsOf returns the weights of a leaf's tokens, [rows][16].
func (u *run) weightsOf(x *leaf) []float32 {
	n := u.rows * tiers.LeafTokens
	return u.w[int(x.at)*n:][:n:n]
}

// sumsOf returns the sums of a leaf's weights and of their squares, [rows][2].
func (u *run) sumsOf(x *leaf) []float32 {
	n := 2 * u.rows
	return u.sums[int(x.at)*n:][:n:n]
}

// gainsOf returns what reading the values of a deep leaf's tokens takes away of the error.
func (u *run) gainsOf(x *leaf) []float32 {
	return u.valueGain[int(x.deep)*tiers.LeafTokens:][:tiers.LeafTokens]
}

// logOf returns the log of a weight, for traces.
func (u *run) logOf(r int, w float32) float32 { return u.base[r] + log(max(w, leastWeight)) }
