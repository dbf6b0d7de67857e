package quality

import (
	"math"

	"kvtier/attention"
	"kvtier/compress"
	"kvtier/tiers"
)

// blockTokens is the length of the comparators' blocks of consecutive tokens.
const blockTokens = 16

// tokenBytes is what a token has at 4 bits.
func (h *headContext) tokenBytes() float64 {
	return float64(2*compress.ValueRowBytes(h.d.Dim) + compress.ValueScaleBytes)
}

// sealedTokens is how many tokens are sealed: those at 16 to end.
func (h *headContext) sealedTokens() int { return h.end - tiers.SinkTokens }

// oracle reads the tokens of the largest true weight, summed over the group's
// heads, and is told them for nothing.
func oracle(h *headContext, x *question, bytes float64) []int {
	rank := make([]float32, h.sealedTokens())
	for i := range rank {
		for r := range x.rows {
			rank[i] += float32(x.weight[r][i+tiers.SinkTokens])
		}
	}
	chosen := attention.Top(rank, int(bytes/h.tokenBytes()))
	for i := range chosen {
		chosen[i] += tiers.SinkTokens
	}
	return chosen
}

// streaming reads the newest sealed tokens (StreamingLLM, Xiao et al., 2023:
// sinks and a window).
func streaming(h *headContext, _ *question, bytes float64) []int {
	n := min(int(bytes/h.tokenBytes()), h.sealedTokens())
	out := make([]int, 0, n)
	for t := h.end - n; t < h.end; t++ {
		out = append(out, t)
	}
	return out
}

// quest reads the blocks of 16 consecutive tokens with the largest upper bound
// of a score, from each channel's least and largest key (Quest, Tang et al.,
// 2024, algorithm 1), here of 8 bits a bound. Rows of a group are compared by
// the largest share of a head's softmax over bounds.
func quest(h *headContext, x *question, bytes float64) []int {
	d := h.d.Dim
	b := h.blockSummaries()
	return h.blocks(x, bytes, 2*float64(d), func(q []float32, i int) (s float32) {
		least, most := b.least[i*d:(i+1)*d], b.most[i*d:(i+1)*d]
		for j, x := range q {
			s += max(x*least[j], x*most[j])
		}
		return s
	})
}

// blockMeans reads the blocks of 16 consecutive tokens with the largest score
// of their mean key, 8 bits a channel.
func blockMeans(h *headContext, x *question, bytes float64) []int {
	d := h.d.Dim
	b := h.blockSummaries()
	return h.blocks(x, bytes, float64(d), func(q []float32, i int) float32 {
		return attention.Dot(q, b.mean[i*d:(i+1)*d])
	})
}

// summaries are what comparators know of blocks of consecutive tokens: [blocks][dim] each.
type summaries struct{ least, most, mean []float32 }

func (h *headContext) blockSummaries() *summaries {
	if h.sums != nil {
		return h.sums
	}
	d := h.d.Dim
	h.sums = &summaries{}
	for i := range h.numBlocks() {
		lo, hi := h.block(i)
		k := h.k[lo*d : hi*d]
		least, most := append([]float32(nil), k[:d]...), append([]float32(nil), k[:d]...)
		for j, v := range k {
			least[j%d], most[j%d] = min(least[j%d], v), max(most[j%d], v)
		}
		h.sums.least, h.sums.most = append(h.sums.least, least...), append(h.sums.most, most...)
		h.sums.mean = append(h.sums.mean, attention.Mean(k, d)...)
	}
	return h.sums
}

func (h *headContext) numBlocks() int { return (h.sealedTokens() + blockTokens - 1) / blockTokens }

func (h *headContext) block(i int) (lo, hi int) {
	lo = tiers.SinkTokens + i*blockTokens
	return lo, min(lo+blockTokens, h.end)
}

// blocks ranks blocks by the group's largest share and reads the best ones for
// what is left of the bytes after every block's summary.
func (h *headContext) blocks(x *question, bytes, summary float64, score func(q []float32, block int) float32) []int {
	d, n := h.d.Dim, h.numBlocks()
	rank, scores := make([]float32, n), make([]float32, n)
	for r := range x.rows {
		most := float32(math.Inf(-1))
		for b := range scores {
			scores[b] = score(x.q[r*d:(r+1)*d], b)
			most = max(most, scores[b])
		}
		var sum float64
		for _, s := range scores {
			sum += math.Exp(float64(s - most))
		}
		for b, s := range scores {
			rank[b] = max(rank[b], float32(math.Exp(float64(s-most))/sum))
		}
	}
	left := bytes - float64(n)*summary
	var out []int
	for _, b := range attention.Top(rank, int(max(0, left)/(blockTokens*h.tokenBytes()))) {
		lo, hi := h.block(b)
		for t := lo; t < hi; t++ {
			out = append(out, t)
		}
	}
	return out
}
