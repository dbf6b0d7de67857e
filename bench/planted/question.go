package planted

import (
	"context"
	"math/rand/v2"

	"golang.org/x/sync/errgroup"

	"kvtier/attention"
)

// question is a sample with its queries and their true answers.
type question struct {
	*sample
	q      []float32 // [group][d]; of a chain: what the heads that do not look ask
	truth  []*truth  // [group]; nil where a chain looks
	looks  []int     // rows that look, by entry of peaks; all rows of an ordinary question
	chain  []hop
	starts []float32 // [content], unit: a chain's first direction
}

// hop is one step of a chain, as dense attention took it. Its query is
// rest + scale * direction, the direction being read from the answer before.
type hop struct {
	rest  []float32 // [d]
	scale float64
	truth *truth
}

// query is the hop's query, given where the answer before points.
func (s *hop) query(h *Haystack, direction []float32) []float32 {
	q := append([]float32(nil), s.rest...)
	h.addContent(q, s.scale, direction)
	return q
}

// ask makes all questions. Rows that do not look are drawn from a pool of
// ordinary ones, so that their truth is computed once.
func (h *Haystack) ask(ctx context.Context, say Progress) ([]*question, error) {
	group := h.opt.Shape.Group
	pool, err := h.pool(ctx, max(1, h.opt.Samples/4)*group)
	if err != nil {
		return nil, err
	}
	say("%d questions: their queries and true answers", len(h.plan.samples))
	out := make([]*question, len(h.plan.samples))
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(workers)
	ordinary := 0
	for i, s := range h.plan.samples {
		rng := rand.New(rand.NewPCG(s.seed, 1))
		qu := &question{sample: s, truth: make([]*truth, group)}
		out[i] = qu
		for r := range group {
			p := pool[rng.IntN(len(pool))]
			if s.task == Ordinary {
				p = pool[ordinary]
				qu.looks = append(qu.looks, r)
				ordinary++
			}
			qu.q, qu.truth[r] = append(qu.q, p.q...), p.truth
		}
		g.Go(func() error {
			h.complete(qu, rng)
			return ctx.Err()
		})
	}
	return out, g.Wait()
}

// row is one ordinary query with its true answer.
type row struct {
	q     []float32
	truth *truth
}

func (h *Haystack) pool(ctx context.Context, n int) ([]row, error) {
	out := make([]row, n)
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(workers)
	for i := range out {
		g.Go(func() error {
			rng := rand.New(rand.NewPCG(h.opt.Seed, 4<<32|uint64(i)))
			q := h.ordinary(rng, i%h.opt.Shape.Group, h.opt.Tokens-1)
			h.settleSink(q, h.scores(q), .2+.3*rng.Float64())
			out[i] = row{q, h.dense(q, nil)}
			return ctx.Err()
		})
	}
	return out, g.Wait()
}

// complete adds the rows that look.
func (h *Haystack) complete(qu *question, rng *rand.Rand) {
	d := h.w.d
	set := func(r, entry int, q []float32) {
		copy(qu.q[r*d:(r+1)*d], q)
		qu.truth[r] = h.dense(q, qu.peaks[entry])
		qu.looks = append(qu.looks, r)
	}
	switch qu.task {
	case Ordinary:
	case MultiQuery:
		for r, peaks := range qu.peaks {
			set(r, r, h.look(rng, r, peaks, qu.weight[r], qu.sink[r]))
		}
	case CWE, FWE:
		set(qu.row, 0, h.lookForClass(rng, qu.sample))
	case Chain:
		h.follow(qu, rng)
	default:
		set(qu.row, 0, h.look(rng, qu.row, qu.peaks[0], qu.weight[0], qu.sink[0]))
	}
}

// lookForClass looks for what all classes of a sample share.
func (h *Haystack) lookForClass(rng *rand.Rand, s *sample) []float32 {
	c := len(h.w.content)
	x := make([]float32, c)
	for i := range x {
		x[i] = attention.Dot(h.w.mix[i*c:(i+1)*c], s.class.marker)
	}
	q, _ := h.aim(h.base(rng, s.row, h.opt.Tokens-1), make([]float32, c), scaled(h.discriminant(x), x), s.peaks[0], s.weight[0], s.sink[0])
	return q
}

// follow takes a chain's hops by dense attention. Each query points where the
// answer before does, and so strongly that the wanted weight is reached.
func (h *Haystack) follow(qu *question, rng *rand.Rand) {
	c := len(h.w.content)
	direction := h.match(qu.peaks[0][0])
	unit(direction)
	qu.starts = direction
	qu.truth[qu.row] = nil
	for i := range hops {
		base := h.base(rng, qu.row, h.opt.Tokens-1)
		x := h.contentOf(qu.peaks[i][0])
		q, nats := h.aim(base, make([]float32, c), scaled(direction, x), qu.peaks[i], qu.weight[i], qu.sink[i])
		step := hop{rest: append([]float32(nil), q...), truth: h.dense(q, qu.peaks[i])}
		if s := attention.Dot(direction, x); s > 0 {
			step.scale = nats / float64(s)
		}
		h.addContent(step.rest, -step.scale, direction)
		qu.chain = append(qu.chain, step)
		direction = h.plan.toContent(h.w, narrow(step.truth.out))
	}
}
