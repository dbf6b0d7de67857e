package quality

import (
	"context"
	"fmt"
	"math"

	"kvtier/attention"
	"kvtier/server/sparse"
	"kvtier/tiers"
)

// answer is one method's answer to a question.
type answer struct {
	out    [][]float32 // [rows][dim]
	weight [][]float64 // [rows][pos+1], the weight that each token has in it
	read   []bool      // [pos+1], whether the token's value was read
	stated float64     // error it states, mean over rows; NaN: states none
	ram    int64       // sealed bytes in cache lines
	disk   int64       // sealed bytes in blocks of the disk
}

// method answers a question with a share of the sealed body's 4-bit bytes.
type method struct {
	name   string
	answer func(ctx context.Context, h *headContext, x *question, share float64) (*answer, error)
	fixed  bool // it has no budget: asked once
	named  bool // it runs only if it is asked for
}

// methods are kvtier's own path and what it is compared with. The comparators
// read the same codes, and their bytes are counted kindly: only what they
// choose and what they choose by, without lines that are touched in part.
func methods() []method {
	return []method{
		{name: "kvtier", answer: kvtier},
		{name: "pages", answer: byPage},
		{name: "gpu", answer: gpu, named: true},
		{name: "oracle", answer: selecting(oracle)},
		{name: "quest16", answer: selecting(quest)},
		{name: "mean16", answer: selecting(blockMeans)},
		{name: "streaming", answer: selecting(streaming)},
		{name: "k4v4", answer: readAll(false), fixed: true},
		{name: "exact", answer: readAll(true), fixed: true},
	}
}

// kvtier runs the daemon's own path.
func kvtier(ctx context.Context, h *headContext, x *question, share float64) (*answer, error) {
	return viaSparse(ctx, h, x, sparse.Budget{Share: float32(share)}, h.segs)
}

// byPage runs the daemon's own path by page, of this many bytes: the daemon allows it more.
func byPage(ctx context.Context, h *headContext, x *question, share float64) (*answer, error) {
	return viaSparse(ctx, h, x, sparse.Budget{Share: float32(share), ByPage: true}, h.segs)
}

// readAll reads everything: at 4 bits, or all that is stored.
func readAll(low bool) func(context.Context, *headContext, *question, float64) (*answer, error) {
	return func(ctx context.Context, h *headContext, x *question, _ float64) (*answer, error) {
		segs := h.segs
		if !low {
			segs = make([]sparse.Segment, len(h.segs))
			for i, s := range h.segs {
				segs[i] = at4Bits(s)
			}
		}
		return viaSparse(ctx, h, x, sparse.Budget{All: true}, segs)
	}
}

// at4Bits is the segment as if it had no more than 4 bits a number.
func at4Bits(s sparse.Segment) sparse.Segment {
	h := *s.Header
	h.Profile = tiers.ProfileBalanced
	return sparse.Segment{Header: &h, Limit: s.Limit}
}

func viaSparse(ctx context.Context, h *headContext, x *question, b sparse.Budget, segs []sparse.Segment) (*answer, error) {
	ps := attention.ClonePartials(x.zone)
	a := newAnswer(x)
	logs := make([][]float64, x.rows)
	for r := range logs {
		logs[r] = make([]float64, x.pos+1)
		for t := range logs[r] {
			logs[r][t] = math.Inf(-1)
		}
	}
	tr := &sparse.Trace{Token: func(row, segment, place int, log float32, how sparse.How) {
		pos := h.position(segs[segment], segment, place, b.All)
		logs[row][pos] = float64(log)
		a.read[pos] = a.read[pos] || how == sparse.Read
	}}
	before := h.tier.blocks.Load()
	acc, err := sparse.Attend(ctx, h.tier, segs, sparse.Query{Head: h.head, Q: x.q, Partials: ps}, b, tr)
	if err != nil {
		return nil, err
	}
	a.ram, a.disk = acc.Moved.RAM, h.tier.blocks.Load()-before
	a.stated = float64(acc.Error)
	h.finish(a, x, ps, logs)
	return a, nil
}

// position is where the token at a place stands; lossless rows, which are
// traced when they are read, are in order of position.
func (h *headContext) position(s sparse.Segment, segment, place int, whole bool) int {
	if s.Header.Profile == tiers.ProfileExact && whole {
		return int(s.Header.Start) + s.Header.Heads[h.head].Sinks + place
	}
	return h.places[segment][place]
}

func newAnswer(x *question) *answer {
	return &answer{read: make([]bool, x.pos+1), stated: math.NaN()}
}

// finish takes the outputs from partials, and the weights from the scores of
// sealed tokens and those of the exact zone.
func (h *headContext) finish(a *answer, x *question, ps []attention.Partial, logs [][]float64) {
	d := h.d.Dim
	for r := range ps {
		out := make([]float32, d)
		ps[r].Output(out)
		a.out = append(a.out, out)
		lse := float64(ps[r].LSE())
		w := logs[r]
		for _, z := range [][2]int{{0, tiers.SinkTokens}, {h.end, x.pos + 1}} {
			for t := z[0]; t < z[1]; t++ {
				w[t] = float64(attention.Dot(x.q[r*d:(r+1)*d], h.k[t*d:(t+1)*d]))
			}
		}
		for t := range w {
			w[t] = math.Exp(w[t] - lse)
		}
		a.weight = append(a.weight, w)
	}
}

// choice says which sealed tokens a comparator reads for so many bytes.
type choice func(h *headContext, x *question, bytes float64) []int

// selecting attends to the exact zone and to chosen tokens only.
func selecting(choose choice) func(context.Context, *headContext, *question, float64) (*answer, error) {
	return func(_ context.Context, h *headContext, x *question, share float64) (*answer, error) {
		tokens := choose(h, x, share*float64(h.bodyK4V4))
		d := h.d.Dim
		ps, a := attention.ClonePartials(x.zone), newAnswer(x)
		a.ram = int64(share * float64(h.bodyK4V4)) // it was given, and has used, that much
		a.disk = a.ram
		logs := make([][]float64, x.rows)
		for r := range logs {
			logs[r] = make([]float64, x.pos+1)
			for t := range logs[r] {
				logs[r][t] = math.Inf(-1)
			}
			q := x.q[r*d : (r+1)*d]
			for _, t := range tokens {
				s := attention.Dot(q, h.k4[t*d:(t+1)*d])
				ps[r].Add(s, h.v4[t*d:(t+1)*d])
				logs[r][t] = float64(s)
			}
		}
		for _, t := range tokens {
			if t < tiers.SinkTokens || t >= h.end {
				return nil, fmt.Errorf("token %d is not sealed", t)
			}
			a.read[t] = true
		}
		h.finish(a, x, ps, logs)
		return a, nil
	}
}
