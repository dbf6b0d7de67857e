package quality

import (
	"context"
	"fmt"
	"math"

	"kvtier/attention"
	"kvtier/bench/memtier"
	"kvtier/compress"
	"kvtier/server/sparse"
	"kvtier/tiers"
	"kvtier/tiers/seal"
)

// recentTokens behind the first query stay exact, as in the daemon.
const recentTokens = 256

// layerContext is one layer of a dump as the daemon would hold it: the first
// tokens and the newest ones exact, all others sealed.
type layerContext struct {
	d    *Dump
	tier *counted
	segs []sparse.Segment
	end  int // where the sealed tokens end
	// BodyK4V4 is what all sealed tokens of a head have at 4 bits, in bytes.
	bodyK4V4 int64
}

func newContext(d *Dump, profile tiers.Profile) (*layerContext, error) {
	c := &layerContext{d: d, tier: &counted{Tier: memtier.New()}, end: d.Tokens - d.Queries - recentTokens}
	if c.end < tiers.SinkTokens+tiers.PageTokens {
		return nil, fmt.Errorf("%d tokens are too few: %d queries, %d recent and %d first tokens are exact, and something has to be sealed",
			d.Tokens, d.Queries, recentTokens, tiers.SinkTokens)
	}
	sums := make([]*attention.QuerySum, d.Heads)
	for h := range sums {
		sums[h] = attention.NewQuerySum(d.Dim)
	}
	for lo := 0; lo < c.end; lo += tiers.SegmentTokens {
		hi := min(lo+tiers.SegmentTokens, c.end)
		o := seal.Options{Profile: profile}
		if lo == 0 {
			o.Sinks = tiers.SinkTokens
		}
		for h, s := range sums { // nothing that comes after the seal
			q := d.sampled(h, lo, hi)
			s.Add(q)
			o.Metrics = append(o.Metrics, s.Metric())
			o.Queries = append(o.Queries, q[max(0, len(q)-codecQueries*d.Group*d.Dim):])
			s.Decay()
		}
		h, parts := seal.Segment(d.rows(lo, hi, compress.F32), o)
		if err := c.tier.Add(h, parts); err != nil {
			return nil, err
		}
		c.segs = append(c.segs, sparse.Segment{Header: h, Limit: h.Tokens, Low: h.Blocks(tiers.PartLow) > 0})
		v := seal.View{D: d.Dim, Info: h.Heads[0]}
		c.bodyK4V4 += int64(v.BytesAt4Bits())
	}
	return c, nil
}

// codecQueries is how many positions of queries the codec's error is measured on.
const codecQueries = 8

// rows returns tokens [lo, hi) as a worker appends them, in elements of t.
func (d *Dump) rows(lo, hi int, t compress.ElementType) *seal.Rows {
	w := d.Heads * d.Dim
	pack := func(x []float32) []byte {
		b := make([]byte, t.Size()*len(x))
		compress.FromFloat32(b, x, t)
		return b
	}
	return &seal.Rows{Start: uint64(lo), Heads: d.Heads, HeadDim: d.Dim, Type: t,
		K: pack(d.K[lo*w : hi*w]), V: pack(d.V[lo*w : hi*w])}
}

// headContext is one KV head of it.
type headContext struct {
	*layerContext
	head int
	k, v []float32 // [Tokens][Dim], as the model made them
	// Sealed tokens decoded from 4 bits, by position: k4, v4 [end][Dim]; tokens that are not sealed are zero.
	k4, v4 []float32
	places [][]int // position of each place, by segment
	sums   *summaries
}

func (c *layerContext) forHead(ctx context.Context, head int) (*headContext, error) {
	d := c.d
	h := &headContext{layerContext: c, head: head, k: d.head(d.K, head), v: d.head(d.V, head),
		k4: make([]float32, c.end*d.Dim), v4: make([]float32, c.end*d.Dim)}
	for _, s := range c.segs {
		rows, _, err := sparse.Rows(ctx, c.tier, at4Bits(s), head)
		if err != nil {
			return nil, err
		}
		compress.Unrotate(rows.V, d.Dim)
		at := make([]int, len(rows.Positions))
		for i, off := range rows.Positions {
			pos := off + int(s.Header.Start)
			at[i] = pos
			copy(h.k4[pos*d.Dim:(pos+1)*d.Dim], rows.K[i*d.Dim:(i+1)*d.Dim])
			copy(h.v4[pos*d.Dim:(pos+1)*d.Dim], rows.V[i*d.Dim:(i+1)*d.Dim])
		}
		h.places = append(h.places, at)
	}
	return h, nil
}

// question is one position's queries of one group, and the truth about it.
type question struct {
	q    []float32 // [group][dim]
	rows int
	pos  int
	zone []attention.Partial // the exact zone
	// Truth from the model's own keys and values, in float64.
	out    [][]float64 // [rows][dim]
	weight [][]float64 // [rows][pos+1]
}

func (h *headContext) question(i int) *question {
	d := h.d
	x := &question{q: d.query(h.head, i), rows: d.Group, pos: d.Tokens - d.Queries + i}
	n := x.pos + 1
	x.zone = attention.NewPartials(d.Group, d.Dim)
	for _, z := range [][2]int{{0, tiers.SinkTokens}, {h.end, n}} {
		lo, hi := z[0]*d.Dim, z[1]*d.Dim
		attention.Attend(x.zone, x.q, h.k[lo:hi], h.v[lo:hi], d.Dim, 0, nil)
	}
	for r := range d.Group {
		out, weight := dense64(x.q[r*d.Dim:(r+1)*d.Dim], h.k[:n*d.Dim], h.v[:n*d.Dim])
		x.out, x.weight = append(x.out, out), append(x.weight, weight)
	}
	return x
}

// dense64 is the oracle: softmax attention in float64.
func dense64(q, k, v []float32) (out, weight []float64) {
	d := len(q)
	weight = make([]float64, len(k)/d)
	hi := math.Inf(-1)
	for t := range weight {
		var s float64
		for j, x := range k[t*d : (t+1)*d] {
			s += float64(q[j]) * float64(x)
		}
		weight[t], hi = s, max(hi, s)
	}
	var sum float64
	for t, s := range weight {
		weight[t] = math.Exp(s - hi)
		sum += weight[t]
	}
	out = make([]float64, d)
	for t := range weight {
		weight[t] /= sum
		for j, x := range v[t*d : (t+1)*d] {
			out[j] += weight[t] * float64(x)
		}
	}
	return out, weight
}
