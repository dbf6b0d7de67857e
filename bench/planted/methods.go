package planted

import (
	"context"
	"math"

	"kvtier/attention"
	"kvtier/compress"
	"kvtier/server/sparse"
	"kvtier/tiers"
)

// answer is what a method gives for the rows of one group.
type answer struct {
	out    [][]float32 // [rows][d]
	lse    []float32
	read   []bool  // [tokens]: its value was read; nil: all were
	bytes  int64   // transferred
	stated float64 // the error that the method states, mean over rows; negative: none
}

// method answers queries q [rows][d] at the last position.
type method struct {
	name   string
	budget float64 // share of the 4-bit bytes; 1: everything
	answer func(ctx context.Context, q []float32) (*answer, error)
	// whole says that it reads everything: it answers all questions in one go.
	whole bool
}

// methods lists what is compared. A budget that a method's own overhead exceeds is left out.
func (s *sealed) methods(budgets []float64, comparators bool) (out []method) {
	out = append(out, s.kvtier("k4v4", 1, sparse.Budget{All: true}))
	for _, b := range budgets {
		out = append(out, s.kvtier("kvtier", b, sparse.Budget{Share: float32(b)}))
		if !comparators {
			continue
		}
		tokens := s.affordable(b, 0)
		out = append(out, method{name: "oracle", budget: b, answer: s.selected(s.oracle, tokens, 0)},
			method{name: "quest-free", budget: b, answer: s.selected(s.quest, tokens, 0)},
			method{name: "window", budget: b, answer: s.selected(s.window, tokens, 0)})
		bounds := int64((s.h.end-tiers.SinkTokens)/questBlock) * int64(2*s.h.w.d)
		if tokens := s.affordable(b, bounds); tokens >= questBlock {
			out = append(out, method{name: "quest", budget: b, answer: s.selected(s.quest, tokens, bounds)})
		}
	}
	return out
}

// kvtier is the project's own path.
func (s *sealed) kvtier(name string, share float64, b sparse.Budget) method {
	return method{name: name, budget: share, whole: b.All, answer: func(ctx context.Context, q []float32) (*answer, error) {
		a := &answer{}
		tr := &sparse.Trace{}
		if !b.All {
			a.read = make([]bool, s.h.opt.Tokens)
			tr.Token = func(_, segment, place int, _ float32, how sparse.How) {
				if how == sparse.Read {
					a.read[s.position[segment][place]] = true
				}
			}
		}
		query := sparse.Query{Q: q, Partials: s.h.zone(q)}
		acc, err := sparse.Attend(ctx, s.tier, s.segments, query, b, tr)
		if err != nil {
			return nil, err
		}
		a.finish(query.Partials, s.h.w.d)
		a.bytes = acc.Moved.RAM
		a.stated = math.Hypot(float64(acc.Error), float64(acc.Codec))
		return a, nil
	}}
}

func (a *answer) finish(ps []attention.Partial, d int) {
	for i := range ps {
		out := make([]float32, d)
		ps[i].Output(out)
		a.out, a.lse = append(a.out, out), append(a.lse, ps[i].LSE())
	}
}

// tokenBytes is what one token's key and value take at 4 bits.
func (s *sealed) tokenBytes() int64 {
	return int64(2*compress.ValueRowBytes(s.h.w.d) + compress.ValueScaleBytes)
}

// affordable is how many tokens a share of the bytes pays for after an overhead.
func (s *sealed) affordable(share float64, overhead int64) int {
	return int((share*float64(s.full) - float64(overhead)) / float64(s.tokenBytes()))
}

// selected answers from the rows of so many chosen tokens and drops the others.
func (s *sealed) selected(choose func(q []float32, tokens int) []int, tokens int, overhead int64) func(context.Context, []float32) (*answer, error) {
	return func(ctx context.Context, q []float32) (*answer, error) {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		h, d := s.h, s.h.w.d
		a := &answer{read: make([]bool, h.opt.Tokens), stated: -1, bytes: overhead}
		ps := h.zone(q)
		for _, t := range choose(q, tokens) {
			a.read[t] = true
			a.bytes += s.tokenBytes()
			for r := range ps {
				ps[r].Add(attention.Dot(q[r*d:(r+1)*d], h.key(t)), h.value(t))
			}
		}
		a.finish(ps, d)
		return a, nil
	}
}

// window chooses the newest sealed tokens (StreamingLLM, arXiv 2309.17453).
func (s *sealed) window(_ []float32, tokens int) (out []int) {
	for t := max(tiers.SinkTokens, s.h.end-tokens); t < s.h.end; t++ {
		out = append(out, t)
	}
	return out
}

// oracle chooses the tokens with the largest weight, summed over the group.
func (s *sealed) oracle(q []float32, tokens int) []int {
	h, d := s.h, s.h.w.d
	rank := make([]float32, h.end-tiers.SinkTokens)
	for r := 0; r < len(q); r += d {
		scores := h.scores(q[r : r+d])
		total := float32(logSum(scores))
		for i := range rank {
			rank[i] += exp32(scores[i+tiers.SinkTokens] - total)
		}
	}
	out := attention.Top(rank, tokens)
	for i := range out {
		out[i] += tiers.SinkTokens
	}
	return out
}

// questBlock is Quest's page.
const questBlock = 16

// quest chooses blocks of consecutive tokens by the largest score that their
// keys' box allows (Quest, arXiv 2406.10774). Each head's bounds are normalised
// before the group's largest counts, so that no head rules by its scale.
func (s *sealed) quest(q []float32, tokens int) (out []int) {
	h, d := s.h, s.h.w.d
	lo, hi := s.bounds()
	blocks := len(lo) / d
	rank := make([]float32, blocks)
	for i := range rank {
		rank[i] = float32(math.Inf(-1))
	}
	bound := make([]float32, blocks)
	for r := 0; r < len(q); r += d {
		row := q[r : r+d]
		for b := range bound {
			bound[b] = 0
			for j, x := range row {
				bound[b] += max(x*lo[b*d+j], x*hi[b*d+j])
			}
		}
		total := float32(logSum(bound))
		for b := range rank {
			rank[b] = max(rank[b], bound[b]-total)
		}
	}
	for _, b := range attention.Top(rank, tokens/questBlock) {
		for t := range min(questBlock, h.end-tiers.SinkTokens-b*questBlock) {
			out = append(out, tiers.SinkTokens+b*questBlock+t)
		}
	}
	return out
}

// boxes returns the least and the largest of each channel of every block.
func (h *Haystack) boxes() (lo, hi []float32) {
	d := h.w.d
	for t := tiers.SinkTokens; t < h.end; t++ {
		k := h.key(t)
		if (t-tiers.SinkTokens)%questBlock == 0 {
			lo, hi = append(lo, k...), append(hi, k...)
			continue
		}
		l, u := lo[len(lo)-d:], hi[len(hi)-d:]
		for j, x := range k {
			l[j], u[j] = min(l[j], x), max(u[j], x)
		}
	}
	return lo, hi
}

func exp32(x float32) float32 { return float32(math.Exp(float64(x))) }
