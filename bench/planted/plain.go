package planted

import (
	"context"
	"fmt"
	"math/rand/v2"

	"kvtier/bench/memtier"
	"kvtier/compress"
	"kvtier/server/sparse"
	"kvtier/tiers"
)

// Plain is one KV head's context with nothing planted in it, sealed, for
// measurements of time. Segments end at fixed places, so its first tokens can
// stand for a shorter context, whose rows they are.
type Plain struct {
	Shape Shape
	Tier  *memtier.Tier
	s     *sealed
}

// NewPlain makes and seals a context. Equal arguments give equal ones. say may be nil.
func NewPlain(ctx context.Context, shape Shape, tokens int, seed uint64, say Progress) (*Plain, error) {
	if say == nil {
		say = func(string, ...any) {}
	}
	if err := shape.check(); err != nil {
		return nil, err
	}
	if tokens < recentTokens {
		return nil, fmt.Errorf("%d tokens: a context has at least %d", tokens, recentTokens)
	}
	h := newHaystack(Options{Shape: shape, Tokens: tokens, Seed: seed})
	h.plan = &plan{}
	h.fill()
	s, err := h.seal(ctx, say)
	if err != nil {
		return nil, err
	}
	return &Plain{Shape: shape, Tier: s.tier, s: s}, nil
}

// Segments returns those of the first so many tokens, and how many tokens they cover.
func (p *Plain) Segments(tokens int) (segments []sparse.Segment, covered int) {
	covered = sealedOf(tokens)
	return p.s.segments[:covered/tiers.SegmentTokens], covered
}

// Full is what the sealed among the first so many tokens take at 4 bits, in bytes.
func (p *Plain) Full(tokens int) (n int64) {
	segments, _ := p.Segments(tokens)
	for i := range segments {
		n += int64(p.s.view(i).BytesAt4Bits())
	}
	return n
}

// Rows returns keys and values of tokens [lo, hi), bfloat16 [hi-lo][d].
func (p *Plain) Rows(lo, hi int) (k, v []byte) {
	row := p.Shape.HeadDim * compress.BF16.Size()
	return p.s.h.kb[lo*row : hi*row], p.s.h.vb[lo*row : hi*row]
}

// Query returns what the group asks at a position, ordinary queries [group][d],
// scaled. Equal numbers give equal ones.
func (p *Plain) Query(position int, number uint64) (q []float32) {
	h := p.s.h
	rng := rand.New(rand.NewPCG(h.opt.Seed, 4<<32|number))
	for head := range p.Shape.Group {
		q = append(q, h.sampled(rng, head, position)...)
	}
	return q
}
