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
	for i, s := range u.segs {
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
const leastDeviating = .001

// deviate adds up by how much the keys of a leaf's unread tokens deviate from
// their page's mean. mass [rows] is their share.
func (u *run) deviate(x *leaf, mass []float32) {
	if slices.Max(mass) < leastDeviating/float32(len(u.leaves)) {
		return
	}
	s := u.segs[x.seg]
	if s.deviation == nil {
		s.deviation = newRows(u.rows, u.d)
	}
	known, mean := u.unpack(x)
	for r, m := range mass {
		u.less[r] = -m
	}
	kernels.Axpys(s.deviation, u.less, 1, mean, u.d, known)
	kernels.Axpys(s.deviation, u.shares[x.at:], u.stride, u.leafKeys, u.d, known)
	s.codes.lean(mass, x.group, len(x.planes))
}

// newRows returns n rows of d zeros.
func newRows(n, d int) [][]float32 {
	all, rows := make([]float32, n*d), make([][]float32, n)
	for r := range rows {
		rows[r] = all[r*d : (r+1)*d]
	}
	return rows
}

// lean notes that keys weigh mass [rows] of a group of tokens of which so many planes are read.
func (c *codes) lean(mass []float32, group, planes int) {
	sum := &c.leaning[group][planes-1]
	if *sum == nil {
		*sum = make([]float32, len(mass))
	}
	for r, m := range mass {
		(*sum)[r] += m
	}
}

// addLean adds to deviation [rows][d] by how much keys deviate on average, weighted
// as they are by their row, in the bits that are not known (channels in stored
// order): of a normal deviation e, the mean of e exp(q.e) is cov(e) q times that of exp(q.e).
func (c *codes) addLean(deviation [][]float32) {
	d := len(c.order.Channels)
	var variance [compress.MaxHeadDim]float32
	for group, byPlanes := range c.leaning {
		for p, mass := range byPlanes {
			if mass == nil {
				continue
			}
			for j, s := range c.steps[group].Step {
				s *= 256
				variance[j] = min(s*compress.KeyNoise[c.levels[p][j/16]]*s, math.MaxFloat32)
			}
			for r, m := range mass {
				q, dst := c.q[r*d:(r+1)*d], deviation[r][:d]
				for j := range dst {
					dst[j] += m * q[j] * variance[j]
				}
			}
		}
	}
}

// follow moves the answer by what the deviations of keys say of values.
func (u *run) follow() {
	dk, v, all := u.row2[:u.d], u.row2[u.d:], newRows(u.rows, u.d)
	any := false
	for _, s := range u.segs {
		if s.deviation != nil {
			s.codes.addLean(s.deviation)
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
