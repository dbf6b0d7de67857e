package sparse

import (
	"math"
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
	ranges := make([][]tiers.Range, len(u.segs))
	ranges[best] = []tiers.Range{{Len: attention.ValueMapBytes(u.d)}}
	return u.each(tiers.PlaneMap, ranges, func(_ int, b [][]byte) error {
		u.values, _ = attention.ParseValueMap(b[0], u.d)
		return nil
	})
}

// leastDeviating is the share of the softmax of which it makes no difference how its keys deviate.
const leastDeviating = .01

// deviate adds up by how much the keys of a leaf's unread tokens deviate from
// their page's mean. mass [rows] is their share.
func (u *run) deviate(x *leaf, mass []float32) {
	if slices.Max(mass) < leastDeviating/float32(len(u.leaves)) {
		return
	}
	s := &u.segs[x.seg]
	if s.deviation == nil {
		s.deviation = u.newRows()
	}
	known, mean := u.unpack(x)
	for r, m := range mass {
		u.less[r] = -m
	}
	kernels.Axpys(s.deviation, u.less, 1, mean, u.d, known)
	kernels.Axpys(s.deviation, u.shares[x.at:], u.stride, u.leafKeys, u.d, known)
	u.lean(mass, x)
}

// newRows returns rows [rows][d] of zeros.
func (u *run) newRows() [][]float32 {
	all, rows := u.floats(u.rows*u.d), make([][]float32, u.rows)
	for r := range rows {
		rows[r] = all[r*u.d : (r+1)*u.d]
	}
	return rows
}

// lean notes that a leaf's keys weigh mass [rows].
func (u *run) lean(mass []float32, x *leaf) {
	by := &u.groups[x.group].by[len(x.planes)-1]
	if by.leaning == nil {
		by.leaning = u.floats(u.rows)
	}
	for r, m := range mass {
		by.leaning[r] += m
	}
}

// addLean adds to a segment's deviations by how much its keys deviate on average, weighted
// as they are by their row, in the bits that are not known (channels in stored
// order): of a normal deviation e, the mean of e exp(q.e) is cov(e) q times that of exp(q.e).
func (u *run) addLean(s *segmentRun) {
	var variance [compress.MaxHeadDim]float32
	for i := range s.view.StepGroups() {
		group := &u.groups[s.firstGroup+i]
		for p := range group.by {
			mass := group.by[p].leaning
			if mass == nil {
				continue
			}
			for j, w := range group.steps.Step {
				w *= 256
				variance[j] = min(w*compress.KeyNoise[s.codes.levels[p][j/16]]*w, math.MaxFloat32)
			}
			for r, m := range mass {
				q, dst := s.codes.q[r*u.d:(r+1)*u.d], s.deviation[r][:u.d]
				for j := range dst {
					dst[j] += m * q[j] * variance[j]
				}
			}
		}
	}
}

// follow moves the answer by what the deviations of keys say of values.
func (u *run) follow() {
	dk, v, all := u.row2[:u.d], u.row2[u.d:], u.newRows()
	any := false
	for i := range u.segs {
		s := &u.segs[i]
		if s.deviation != nil {
			u.addLean(s)
			any = true
		}
		for r, deviation := range s.deviation {
			s.codes.order.Restore(dk, deviation)
			attention.Axpy(all[r], 1, dk)
		}
	}
	for r := range all {
		if any {
			clear(v)
			u.values.Add(v, all[r])
			u.rot[r].Shift(u.total[r], v)
		}
	}
}
