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
	kb, vb := rows.slice(lo, hi, sp.rowBytes())
	res.zoneBytes += 2 * int64(hi-lo) * int64(sp.headDim*sp.typ.Size())
	if sp.typ == compress.BF16 {
		at := head * sp.headDim * sp.typ.Size()
		return c.attendTo(ctx, res, q, lo, hi, func(ps []attention.Partial, q []float32, from, to uint64) {
			skip := int(from-lo)*sp.rowBytes() + at
			attention.AttendBF16(ps, q, kb[skip:], vb[skip:], int(to-from), sp.kvHeads*sp.headDim, sp.headDim, sp.softcap)
		})
	}
	z := zonePool.Get().(*zoneScratch)
	defer zonePool.Put(z)
	for at := lo; at < hi; at += zoneBlock {
		end := min(at+zoneBlock, hi)
		n := int(end-at) * sp.headDim
		k, v := z.k[:n], z.v[:n]
		rows.headInto(k, v, sp, head, at, end)
		if err := c.attendBlock(ctx, res, q, k, v, at, end); err != nil {
			return err
		}
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
func (c *call) attendBlock(ctx context.Context, res *headResult, q, k, v []float32, at, end uint64) error {
	d, softcap := c.seq.spec.headDim, c.seq.spec.softcap
	return c.attendTo(ctx, res, q, at, end, func(ps []attention.Partial, q []float32, from, to uint64) {
		a, b := int(from-at)*d, int(to-at)*d
		attention.Attend(ps, q, k[a:b], v[a:b], d, softcap, nil)
	})
}

// attendTo has each position's rows of q attend to those of positions [at, end) that it may see.
func (c *call) attendTo(ctx context.Context, res *headResult, q []float32, at, end uint64,
	attend func(ps []attention.Partial, q []float32, from, to uint64)) error {
	sp := c.seq.spec
	d, g := sp.headDim, sp.group()
	for i := range c.n {
		if err := ctx.Err(); err != nil {
			return err
		}
		pos := c.start + uint64(i)
		lo, hi := at, min(end, pos+1)
		if w := uint64(sp.window[c.layer]); w > 0 && pos+1 > w {
			lo = max(lo, pos+1-w)
		}
		if hi <= lo {
			continue
		}
		res.exact += int64(hi - lo)
		attend(res.ps[i*g:(i+1)*g], q[i*g*d:(i+1)*g*d], lo, hi)
	}
	return nil
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
	return c.attendBlock(ctx, res, q, kv[:n*sp.headDim], kv[half:half+n*sp.headDim], first.Start, first.Start+uint64(n))
}
