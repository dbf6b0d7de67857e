package planted

import (
	"math"

	"kvtier/tiers"
)

// strongWeights are the weights above which a token counts as strong.
var strongWeights = [2]float64{.1, .03}

// truth is one row's dense attention in float64 over the unquantised rows.
type truth struct {
	out    []float64
	lse    float64
	peaks  []float64 // weights of the tokens asked about
	strong []strong  // sealed tokens above the lowest of strongWeights
}

// strong is a token with a large weight of its own.
type strong struct {
	position int
	weight   float64
}

// dense attends to all tokens.
func (h *Haystack) dense(q []float32, peaks []int) *truth {
	d := h.w.d
	scores := make([]float64, h.opt.Tokens)
	hi := math.Inf(-1)
	for t := range scores {
		var s0, s1 float64
		k := h.key(t)
		for j := 0; j < d; j += 2 {
			s0 += float64(q[j]) * float64(k[j])
			s1 += float64(q[j+1]) * float64(k[j+1])
		}
		scores[t] = s0 + s1
		hi = max(hi, scores[t])
	}
	out := &truth{out: make([]float64, d)}
	var sum float64
	for t, s := range scores {
		p := math.Exp(s - hi)
		scores[t] = p
		sum += p
		for j, v := range h.value(t) {
			out.out[j] += p * float64(v)
		}
	}
	for j := range out.out {
		out.out[j] /= sum
	}
	out.lse = hi + math.Log(sum)
	for _, t := range peaks {
		out.peaks = append(out.peaks, scores[t]/sum)
	}
	for t := tiers.SinkTokens; t < h.end; t++ {
		if w := scores[t] / sum; w > strongWeights[1] {
			out.strong = append(out.strong, strong{t, w})
		}
	}
	return out
}

func narrow(x []float64) []float32 {
	out := make([]float32, len(x))
	for i, v := range x {
		out[i] = float32(v)
	}
	return out
}
