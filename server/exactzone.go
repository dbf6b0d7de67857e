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
	res.zoneBytes += 2 * int64(hi-lo) * int64(sp.headBytes())
	for p := range rows.pieces(sp, lo, hi) {
		k, v := p.head(sp, head)
		if err := c.attendRows(ctx, res, q, k, v, p.start, p.end()); err != nil {
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

// attendRows lets each position see what it may of positions [at, end), of which k and v are a head's rows. Rows of bfloat16 are read as they lie,
// others are widened first.
func (c *call) attendRows(ctx context.Context, res *headResult, q []float32, k, v []byte, at, end uint64) error {
	sp := c.seq.spec
	d, row := sp.headDim, sp.headBytes()
	if sp.typ == compress.BF16 {
		return c.attendTo(ctx, res, q, at, end, func(ps []attention.Partial, q []float32, from, to uint64) {
			a, b := int(from-at)*row, int(to-at)*row
			attention.AttendBF16(ps, q, k[a:b], v[a:b], d, sp.softcap)
		})
	}
	z := zonePool.Get().(*zoneScratch)
	defer zonePool.Put(z)
	for ; at < end; at += zoneBlock {
		n := int(min(zoneBlock, end-at))
		compress.ToFloat32(z.k[:n*d], k[:n*row], sp.typ)
		compress.ToFloat32(z.v[:n*d], v[:n*row], sp.typ)
		err := c.attendTo(ctx, res, q, at, at+uint64(n), func(ps []attention.Partial, q []float32, from, to uint64) {
			a, b := int(from-at)*d, int(to-at)*d
			attention.Attend(ps, q, z.k[a:b], z.v[a:b], d, sp.softcap, nil)
		})
		if err != nil || at+uint64(n) == end {
			return err
		}
		k, v = k[n*row:], v[n*row:]
	}
	return nil
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
	pins, _, err := c.reader().Pin(ctx, []tiers.Request{{Header: h, Head: head, Plane: tiers.PlaneSinks}})
	if err != nil {
		return err
	}
	defer pins[0].Release(1) // counted with the exact zone, not with the sealed body
	b := pins[0].Ranges[0]
	res.zoneBytes += int64(len(b))
	n = min(n, first.limit)
	half := len(b) / 2
	return c.attendRows(ctx, res, q, b[:half], b[half:], first.Start, first.Start+uint64(n))
}
