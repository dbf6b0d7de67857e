package sparse

import (
	"slices"

	"kvtier/attention"
	"kvtier/attention/kernels"
	"kvtier/compress"
	"kvtier/tiers"
)

// Tokens whose values are not read stand by their page's mean value. But those
// of them that weigh much are not like the mean: their keys lie towards the
// query. How values follow keys is a linear map (attention.ValueMap), so that the
// deviations of keys can be summed, by their tokens' weights, before it is applied once.

// readMap reads how values follow keys from the last of the largest segments:
// all segments' keys and values are projections of hidden states by the same weights.
func (u *run) readMap() error {
	best := 0
	for i := range u.segs {
		s := &u.segs[i]
		if s.view.Stored() >= u.segs[best].view.Stored() {
			best = i
		}
	}
	u.want(best, tiers.Range{Len: attention.ValueMapBytes(u.d)})
	return u.each(tiers.PlaneMap, func(_ int, got got) error {
		u.mapped, _ = attention.ParseValueMap(got.b[0], u.d)
		return nil
	})
}

// leastDeviating is the share of the softmax of which it makes no difference how its keys deviate.
const leastDeviating = .01

// followers adds up the keys of unread tokens, each times its weight, a segment after the other and a
// group of tokens after the other, since those have bins of their own.
type followers struct {
	seg, group int32 // under way; -1: none
	// Of the group, by the number of planes that are read: sums of codes [rows][d], and of weights [rows].
	codes [compress.NumKeyPlanes][][]float32
	mass  [compress.NumKeyPlanes][]float32
	used  [compress.NumKeyPlanes]bool
	// Of the segment: by planes, the weights of pages [rows][mostPages], nil if there are none; and sums [rows][d], channels in
	// stored order, of keys, and of the variance of what is not known of them.
	pages        [compress.NumKeyPlanes][]float32
	keys, spread [][]float32
	// deviations is by how much keys of all segments deviate from their pages' means, [rows][d]; nil if there are none.
	deviations [][]float32
}

// deviate takes in a leaf's unread tokens; leaves come in order of place. share [rows] is theirs.
func (u *run) deviate(f *followers, x *leaf, share []float32) {
	if slices.Max(share) < leastDeviating/float32(len(u.leaves)) {
		return
	}
	if f.group != x.group {
		u.endGroup(f)
		if f.seg != x.seg {
			u.endSegment(f)
		}
		f.seg, f.group = x.seg, x.group
	}
	s, p := &u.segs[x.seg], int(x.planes)-1
	if f.codes[p] == nil {
		f.codes[p], f.mass[p] = u.newRows(), u.floats(u.rows)
	}
	if f.pages[p] == nil {
		f.pages[p] = u.floats(u.rows * mostPages)
	}
	f.used[p] = true
	sums := u.sumsOf(x)
	for r := range u.rows {
		f.mass[p][r] += sums[2*r]
		f.pages[p][r*mostPages+int(u.pageOf[x.page])] += sums[2*r]
	}
	u.layoutOf(s, p+1).SumCodes(f.codes[p], u.weightsOf(x), tiers.LeafTokens, u.planesOf(x))
}

// endGroup brings sums of codes into the group's bins.
func (u *run) endGroup(f *followers) {
	for p := range f.used {
		if !f.used[p] {
			continue
		}
		if f.keys == nil {
			f.keys, f.spread = u.newRows(), u.newRows()
		}
		c, steps := &u.segs[f.seg].codes, u.groups[f.group].steps
		kernels.AddBins(f.keys, f.spread, f.codes[p], f.mass[p], steps.Lo, steps.Step, c.levels[p][:u.d/16], &unknownOf)
		for r := range f.codes[p] {
			clear(f.codes[p][r][:c.known[p]])
		}
		clear(f.mass[p])
		f.used[p] = false
	}
}

// endSegment takes means off what was summed. In the bits that are not known keys deviate on average, weighted
// as they are by their row, as a normal deviation e does: the mean of e exp(q.e) is cov(e) q times that of exp(q.e).
func (u *run) endSegment(f *followers) {
	if f.keys == nil {
		return
	}
	if f.deviations == nil {
		f.deviations = u.newRows()
	}
	s, means, sums, spare := &u.segs[f.seg], u.newRows(), u.newRows(), u.newRows()
	steps := u.newSteps(u.d)
	if err := s.means.Keys.ReadSteps(steps); err != nil {
		panic(err) // scoreAll has read them
	}
	for p, weights := range f.pages {
		if weights == nil {
			continue
		}
		for r := range means {
			clear(means[r])
			clear(sums[r])
		}
		s.means.Keys.AddTo(means, sums, spare, weights, mostPages, steps)
		for r, row := range means {
			for j, c := range s.codes.order.Channels[:s.codes.known[p]] {
				f.keys[r][j] -= row[c]
			}
		}
		f.pages[p] = nil
	}
	for r, keys := range f.keys {
		spread, q, out := f.spread[r], s.codes.q[r*u.d:], f.deviations[r]
		for j, c := range s.codes.order.Channels {
			out[c] += keys[j] + q[j]*spread[j]
		}
		clear(keys)
		clear(spread)
	}
}

// unknownOf is the variance of what is not known of a channel of which so many pairs of bits are, over the square of a bin. Of channels of
// which nothing is known it is all that there is; a score lacks about half of it (docs/decisions/0033-format-4.md).
var unknownOf = func() (t [len(compress.KeyNoise)]float32) {
	for l, noise := range compress.KeyNoise {
		t[l] = 256 * 256 * noise
	}
	t[0] *= 2
	return t
}()

// newRows returns rows [rows][d] of zeros, one behind the other.
func (u *run) newRows() [][]float32 {
	all, rows := u.floats(u.rows*u.d), u.rowArena.zeros(u.rows)
	for r := range rows {
		rows[r] = all[r*u.d : (r+1)*u.d]
	}
	return rows
}

// follow moves the answer by what the deviations of keys say of values.
func (u *run) follow(f *followers) {
	u.endGroup(f)
	u.endSegment(f)
	if f.deviations == nil {
		return
	}
	shifts := u.newRows()
	u.mapped.Add(shifts, f.deviations[0][:u.rows*u.d], u.floats(u.rows*attention.MapRank))
	for r, x := range shifts {
		u.rot[r].Shift(u.base[r], x)
	}
}
