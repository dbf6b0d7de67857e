package gpu

import (
	"context"
	"fmt"
	"math/rand/v2"
	"runtime"

	"golang.org/x/sync/errgroup"

	"kvtier/attention"
	"kvtier/bench/memtier"
	"kvtier/compress"
	"kvtier/server/sparse"
	"kvtier/tiers"
	"kvtier/tiers/seal"
)

// layer is a made-up layer of sealed segments, in memory.
type layer struct {
	heads, d int
	tier     *memtier.Tier
	segments []sparse.Segment
	pieces   [][]tiers.Piece // of each segment
	centres  []float32       // [heads][centres][d]
}

const centres = 8

// make seals segments of so many tokens each, of keys that gather around few centres, with channels of different size.
func makeLayer(ctx context.Context, tokens []int, heads, d int, profile tiers.Profile, low bool, seed uint64) (*layer, error) {
	l := &layer{heads: heads, d: d, tier: memtier.New(), segments: make([]sparse.Segment, len(tokens)), pieces: make([][]tiers.Piece, len(tokens))}
	rng := rand.New(rand.NewPCG(seed, 1))
	l.centres = normal(rng, heads*centres*d, 1.2)
	metrics := make([]*attention.Metric, heads)
	for h := range metrics {
		sum := attention.NewQuerySum(d)
		sum.Add(normal(rng, 4*d*d, 1))
		metrics[h] = sum.Metric()
	}
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(runtime.GOMAXPROCS(0))
	for i, n := range tokens {
		g.Go(func() error {
			if err := ctx.Err(); err != nil {
				return err
			}
			h, parts := seal.Segment(l.rows(n, i, seed), seal.Options{Profile: profile, Metrics: metrics, Low: low})
			if err := l.tier.Add(h, parts); err != nil {
				return err
			}
			l.segments[i] = sparse.Segment{Header: h, Limit: h.Tokens, Low: h.Blocks(tiers.PartLow) > 0}
			for head := range heads {
				for p := range tiers.NumPlanes {
					if off, n, ok := h.Piece(head, p); ok {
						l.pieces[i] = append(l.pieces[i], tiers.Piece{Head: head, Plane: p, Bytes: parts[p.Part()][off : off+n]})
					}
				}
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return nil, fmt.Errorf("make segments: %w", err)
	}
	return l, nil
}

func (l *layer) rows(n, segment int, seed uint64) *seal.Rows {
	rng := rand.New(rand.NewPCG(seed, uint64(segment)+2))
	k, v := make([]float32, n*l.heads*l.d), make([]float32, n*l.heads*l.d)
	for t := range n {
		for h := range l.heads {
			c, at := rng.IntN(centres), (t*l.heads+h)*l.d
			for j := range l.d {
				k[at+j] = l.centres[(h*centres+c)*l.d+j] + float32(rng.NormFloat64())*(.3+float32(j%7)/5)
				v[at+j] = float32(c%3) + float32(rng.NormFloat64())
			}
		}
	}
	return &seal.Rows{Start: uint64(segment) * tiers.SegmentTokens, Heads: l.heads, HeadDim: l.d, Type: compress.BF16, K: bf16(k), V: bf16(v)}
}

// queries returns rows for each head, [heads][rows][d], of so much strength: 1 spreads attention, 4 gathers it.
func (l *layer) queries(rows int, strength float32, rng *rand.Rand) []float32 {
	q := normal(rng, l.heads*rows*l.d, .1*float64(strength))
	for h := range l.heads {
		for r := range rows {
			c := rng.IntN(centres)
			for j := range l.d {
				q[(h*rows+r)*l.d+j] += strength / float32(l.d) * l.centres[(h*centres+c)*l.d+j]
			}
		}
	}
	return q
}

// loop answers by the Go loop: everything that is stored of the segments is read.
func (l *layer) loop(ctx context.Context, segments []sparse.Segment, q []float32, softcap float32) ([]attention.Partial, error) {
	rows := len(q) / (l.heads * l.d)
	ps := attention.NewPartials(l.heads*rows, l.d)
	for h := range l.heads {
		query := sparse.Query{Head: h, Q: q[h*rows*l.d:][:rows*l.d], Softcap: softcap, Partials: ps[h*rows:][:rows]}
		if _, err := sparse.Attend(ctx, l.tier, segments, query, sparse.Budget{All: true}, nil); err != nil {
			return nil, err
		}
	}
	return ps, nil
}

func normal(rng *rand.Rand, n int, sd float64) []float32 {
	x := make([]float32, n)
	for i := range x {
		x[i] = float32(sd * rng.NormFloat64())
	}
	return x
}

func bf16(x []float32) []byte {
	b := make([]byte, 2*len(x))
	compress.FromFloat32(b, x, compress.BF16)
	return b
}
