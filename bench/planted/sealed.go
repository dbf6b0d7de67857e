package planted

import (
	"context"
	"errors"
	"math/rand/v2"
	"sync"

	"golang.org/x/sync/errgroup"

	"kvtier/attention"
	"kvtier/bench/memtier"
	"kvtier/compress"
	"kvtier/server/sparse"
	"kvtier/tiers"
	"kvtier/tiers/seal"
)

// sealed is a haystack as the service holds it.
type sealed struct {
	h        *Haystack
	tier     *memtier.Tier
	segments []sparse.Segment
	position [][]int // by segment, of its stored tokens in the order of places
	full     int64   // bytes of all stored tokens at 4 bits
	// bounds are the boxes of Quest's blocks: least and largest channels, [blocks][d].
	bounds func() (lo, hi []float32)
}

// Every eighth position's queries make the metric, as in the server; the latest
// sixteen tell the codec's error.
const (
	sampledEvery = 8
	codecSample  = 16
)

// Progress is told what is being done.
type Progress func(format string, args ...any)

// seal seals all full segments but the newest tokens. Each segment's metric
// is of the queries of its own tokens and, fading, of those before.
func (h *Haystack) seal(ctx context.Context, say Progress) (*sealed, error) {
	n := h.end / tiers.SegmentTokens
	s := &sealed{h: h, tier: memtier.New(), segments: make([]sparse.Segment, n), position: make([][]int, n),
		bounds: sync.OnceValues(h.boxes)}
	sum := attention.NewQuerySum(h.w.d)
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(workers)
	for i := range n {
		if gctx.Err() != nil {
			break
		}
		queries := h.sampledQueries(i)
		sum.Add(queries)
		o := seal.Options{Profile: tiers.ProfileBalanced, Metrics: []*attention.Metric{sum.Metric()},
			Queries: [][]float32{queries[len(queries)-codecSample*h.opt.Shape.Group*h.w.d:]}}
		sum.Decay()
		g.Go(func() error { return s.add(i, o) })
		if i%16 == 15 {
			say("sealed %d of %d segments", i+1, n)
		}
	}
	if err := errors.Join(g.Wait(), ctx.Err()); err != nil {
		return nil, err
	}
	for i := range s.segments {
		s.full += int64(s.view(i).BytesAt4Bits())
	}
	return s, nil
}

// sampledQueries are the group's queries at some positions of segment i: [rows][d].
func (h *Haystack) sampledQueries(i int) (out []float32) {
	rng := rand.New(rand.NewPCG(h.opt.Seed, 3<<32|uint64(i)))
	for t := i * tiers.SegmentTokens; t < (i+1)*tiers.SegmentTokens; t += sampledEvery {
		for head := range h.opt.Shape.Group {
			out = append(out, h.sampled(rng, head, t)...)
		}
	}
	return out
}

// add seals segment i.
func (s *sealed) add(i int, o seal.Options) error {
	h := s.h
	lo, hi := i*tiers.SegmentTokens, (i+1)*tiers.SegmentTokens
	if i == 0 {
		o.Sinks = tiers.SinkTokens
	}
	row := h.w.d * compress.BF16.Size()
	header, parts := seal.Segment(&seal.Rows{Start: uint64(lo), Heads: 1, HeadDim: h.w.d, Type: compress.BF16,
		K: h.kb[lo*row : hi*row], V: h.vb[lo*row : hi*row]}, o)
	if err := s.tier.Add(header, parts); err != nil {
		return err
	}
	s.segments[i] = sparse.Segment{Header: header, Limit: header.Tokens}
	s.position[i] = s.view(i).Positions(s.tier.Piece(header, 0, tiers.PlaneOrder))
	for j := range s.position[i] {
		s.position[i][j] += lo
	}
	return nil
}

func (s *sealed) view(i int) seal.View {
	return seal.View{D: s.h.w.d, Info: s.segments[i].Header.Heads[0]}
}

// zone attends to what is not sealed into planes: the first tokens and the newest.
func (h *Haystack) zone(q []float32) []attention.Partial {
	d, sinks := h.w.d, tiers.SinkTokens
	ps := attention.NewPartials(len(q)/d, d)
	attention.Attend(ps, q, h.k[:sinks*d], h.v[:sinks*d], d, 0, nil)
	attention.Attend(ps, q, h.k[h.end*d:], h.v[h.end*d:], d, 0, nil)
	return ps
}
