package server

import (
	"context"
	"sync"

	"google.golang.org/grpc/codes"

	"kvtier/attention"
	"kvtier/compress"
	"kvtier/tiers"
)

// exactZone attends to the open tail, or a layer's window, and to learned
// attention sinks and the sequence's first tokens.
func (c *call) exactZone(ctx context.Context, head int, q []float32, res *headResult) error {
	sp := c.seq.spec
	g := sp.group()
	if len(sp.sinks) > 0 {
		for r := range res.ps {
			res.ps[r].AddMass(sp.sinks[c.layer*sp.queryHeads+head*g+r%g])
		}
	}
	if err := c.firstTokens(ctx, head, q, res); err != nil {
		return err
	}
	rows := c.st.rows[c.layer]
	lo, hi := rows.base, c.start+uint64(c.n)
	if w := uint64(sp.window[c.layer]); w > 0 {
		if c.start+1 > w {
			lo = max(lo, c.start+1-w)
		}
		if need := c.start + 1; need > w && rows.base > need-w || need <= w && rows.base > 0 {
			return fail(codes.FailedPrecondition, ReasonForkPoint, "layer %d keeps a window from token %d on: queries at %d reach before it", c.layer, rows.base, c.start)
		}
	}
	if hi <= lo {
		return nil
	}
	z := zonePool.Get().(*zoneScratch)
	defer zonePool.Put(z)
	for at := lo; at < hi; at += zoneBlock {
		if err := ctx.Err(); err != nil {
			return err
		}
		end := min(at+zoneBlock, hi)
		n := int(end-at) * sp.headDim
		k, v := z.k[:n], z.v[:n]
		rows.headInto(k, v, sp, head, at, end)
		res.zoneBytes += 2 * int64(end-at) * int64(sp.headDim*sp.typ.Size())
		c.attendBlock(res, q, k, v, at, end)
	}
	return nil
}

// zoneBlock bounds the scratch that a long tail takes, in tokens.
const zoneBlock = 512

// zoneScratch holds one head's rows of a block, as floats.
type zoneScratch struct {
	k, v [zoneBlock * 256]float32 // for the largest head dimension
}

var zonePool = sync.Pool{New: func() any { return new(zoneScratch) }}

// attendBlock lets each position see what it may of positions [at, end).
func (c *call) attendBlock(res *headResult, q, k, v []float32, at, end uint64) {
	sp := c.seq.spec
	d, g := sp.headDim, sp.group()
	for i := range c.n {
		pos := c.start + uint64(i)
		lo, hi := at, min(end, pos+1)
		if w := uint64(sp.window[c.layer]); w > 0 && pos+1 > w {
			lo = max(lo, pos+1-w)
		}
		if hi <= lo {
			continue
		}
		res.exact += int64(hi - lo)
		a, b := int(lo-at)*d, int(hi-at)*d
		attention.Attend(res.ps[i*g:(i+1)*g], q[i*g*d:(i+1)*g*d], k[a:b], v[a:b], d, sp.softcap, nil)
	}
}

// firstTokens attends to the sequence's first tokens, which a sealed span
// keeps unquantised.
func (c *call) firstTokens(ctx context.Context, head int, q []float32, res *headResult) error {
	sp := c.seq.spec
	if sp.window[c.layer] > 0 || len(c.st.spans) == 0 {
		return nil
	}
	first := c.st.spans[0]
	h := first.segments[c.layer]
	n := h.Heads[head].Sinks
	if n == 0 {
		return nil
	}
	pins, _, err := c.seq.srv.store.Pin(ctx, []tiers.Request{{Header: h, Head: head, Plane: tiers.PlaneSinks}})
	if err != nil {
		return err
	}
	defer pins[0].Release(1) // counted with the exact zone, not with the sealed body
	b := pins[0].Ranges[0]
	kv := make([]float32, 2*n*sp.headDim)
	compress.ToFloat32(kv, b, sp.typ)
	res.zoneBytes += int64(len(b))
	n = min(n, first.limit)
	half := len(kv) / 2
	c.attendBlock(res, q, kv[:n*sp.headDim], kv[half:half+n*sp.headDim], first.Start, first.Start+uint64(n))
	return nil
}
