package gpu

import (
	"context"
	"errors"
	"time"

	"kvtier/bench/stats"
	"kvtier/tiers"
	tier "kvtier/tiers/gpu"
	"kvtier/tiers/gpu/kernels"
	"kvtier/tiers/ram"
)

// bringUp measures how a segment gets from the RAM tier to the device's: by itself, from slabs that are pinned, and through buffers.
func bringUp(ctx context.Context, o *Options) (out []Copy, err error) {
	d, heads := 128, 8
	if o.Short {
		d, heads = 64, 1
	}
	l, err := makeLayer(ctx, []int{tiers.SegmentTokens}, heads, d, tiers.ProfileBalanced, false, o.Seed)
	if err != nil {
		return nil, err
	}
	for _, w := range []struct {
		what string
		most int64
	}{{"a segment from RAM, pinned slabs", 1 << 30}, {"a segment from RAM, through buffers", 0}} {
		c, err := bringUpOnce(ctx, o, l, w.most)
		if err != nil {
			return out, err
		}
		c.What = w.what
		out = append(out, c)
	}
	return out, nil
}

// bringUpOnce brings a segment up again and again, with so many bytes of RAM pinned at most.
func bringUpOnce(ctx context.Context, o *Options, l *layer, pinned int64) (c Copy, err error) {
	var up *tier.Tier
	below, err := ram.New(ram.Options{Bytes: 64 << 20, Unmapping: func(b []byte) error { return up.Unmapping(b) }})
	if err != nil {
		return c, err
	}
	if up, err = tier.Open(tier.Options{Device: o.Device, Bytes: 64 << 20, Slab: below.Slab, PinBytes: pinned}); err != nil {
		return c, err
	}
	defer func() { err = errors.Join(err, up.Close(), below.Close()) }()
	h := l.segments[0].Header
	var reqs []tiers.Request
	for _, p := range l.pieces[0] {
		if kernels.Planes(false).Has(p.Plane) {
			reqs = append(reqs, tiers.Request{Header: h, Head: p.Head, Plane: p.Plane})
			c.Bytes += len(p.Bytes)
		}
	}
	if err := below.Put(ctx, h, l.pieces[0]); err != nil {
		return c, err
	}
	var gbs []float64
	for range o.Repeats + 2 {
		begin := time.Now()
		pins, err := below.Pin(ctx, reqs)
		if err != nil {
			return c, err
		}
		pieces := make([]tiers.Piece, len(reqs))
		for i, r := range reqs {
			pieces[i] = tiers.Piece{Head: r.Head, Plane: r.Plane, Bytes: pins[i].Ranges[0]}
		}
		err = up.PutFrom(ctx, h, pieces, func() {
			for i := range pins {
				pins[i].Release(0)
			}
		})
		gbs = append(gbs, float64(c.Bytes)/float64(time.Since(begin).Nanoseconds()))
		if err = errors.Join(err, up.Drop(h.ID, tiers.AllPlanes)); err != nil {
			return c, err
		}
	}
	if (up.PinnedBytes() > 0) != (pinned > 0) {
		return c, errors.New("the slabs of RAM are not pinned")
	}
	c.GBs = stats.SpreadOf(gbs[2:])
	return c, nil
}
