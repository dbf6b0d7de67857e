package sparse

import (
	"kvtier/attention"
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

// deviate adds up by how much the keys of a leaf's unread tokens, which weigh
// mass, deviate from their page's mean.
func (u *run) deviate(x *leaf, mass []float32) {
	s, d := u.segs[x.seg], u.d
	if s.deviation == nil {
		s.deviation = attention.NewPartials(u.rows, d)
	}
	var buf [2 * compress.MaxHeadDim]float32
	mean, row := buf[:d], buf[d:2*d]
	s.keys.Row(row, u.pages[x.page].i)
	s.codes.order.Permute(mean, row)
	keys := make([]float32, tiers.LeafTokens*d)
	known := compress.UnpackKeys(keys, d, s.codes.order.Lines, s.codes.steps[x.group], x.planes...)
	for t := range x.n {
		if x.read[t] {
			continue
		}
		k := keys[t*d : (t+1)*d]
		for j, m := range mean[:known] {
			k[j] -= m
		}
		clear(k[known:])
		for r := range u.rows {
			s.deviation[r].Add(x.log[r][t], k)
		}
	}
	for r := range u.rows {
		s.codes.lean(row, r, x.group, len(x.planes))
		s.deviation[r].Shift(mass[r], row)
	}
}

// lean writes by how much keys deviate on average, weighted as they are by row
// r, in the bits that are not known (channels in stored order): of a normal
// deviation e, the mean of e exp(q.e) is cov(e) q times that of exp(q.e).
func (c *codes) lean(dst []float32, r, group, planes int) {
	q, levels := c.q[r*len(dst):], c.levels[planes-1]
	for j, s := range c.steps[group].Step[:len(dst)] {
		s *= 256
		dst[j] = q[j] * s * s * compress.KeyNoise[levels[j/16]]
	}
}

// follow moves the answer by what the deviations of keys say of values.
func (u *run) follow() {
	buf := make([]float32, 3*u.d)
	stored, dk, v := buf[:u.d], buf[u.d:2*u.d], buf[2*u.d:]
	for _, s := range u.segs {
		for r := range s.deviation {
			if s.deviation[r].Sum > 0 {
				s.deviation[r].Output(stored)
				s.codes.order.Restore(dk, stored)
				clear(v)
				u.values.Add(v, 1, dk)
				u.rot[r].Shift(s.deviation[r].LSE(), v)
			}
		}
	}
}
