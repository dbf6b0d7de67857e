package attention

import (
	"math"

	"kvtier/attention/kernels"
)

const (
	// blockTokens is how many tokens' scores are held at once, and blockRows how
	// many query rows share a read of keys and values.
	blockTokens = 64
	blockRows   = 16
)

// Attend takes n tokens with keys k [n][d] and values v [n][d] into the
// partials of the query rows q [len(ps)][d]. Row r sees the first visible[r]
// tokens; a nil visible means all. Values are finite.
func Attend(ps []Partial, q, k, v []float32, d int, softcap float32, visible []int) {
	attend(ps, q, &tokenRows{k: k, v: v, d: d}, len(k)/d, softcap, visible)
}

// AttendBF16 is Attend of tokens whose keys and values are bfloat16, little-endian; row r sees all of them.
func AttendBF16(ps []Partial, q []float32, k, v []byte, d int, softcap float32) {
	attend(ps, q, &tokenRows{bf16K: k, bf16V: v, d: d}, len(k)/(2*d), softcap, nil)
}

// tokenRows are tokens' keys and values, as floats or bfloat16.
type tokenRows struct {
	k, v         []float32
	bf16K, bf16V []byte
	d            int
}

// dots writes the products of q and the keys of tokens [at, end), and axpys adds their values.
func (x *tokenRows) dots(scores, q []float32, at, end int) {
	if x.bf16K != nil {
		kernels.DotsBF16(scores, blockTokens, q, x.bf16K[2*at*x.d:], end-at, x.d, x.d)
		return
	}
	kernels.Dots(scores, blockTokens, q, x.k[at*x.d:end*x.d], x.d)
}

func (x *tokenRows) axpys(out [][]float32, weights []float32, at, end int) {
	if x.bf16V != nil {
		kernels.AxpysBF16(out, weights, blockTokens, x.bf16V[2*at*x.d:], end-at, x.d, x.d)
		return
	}
	kernels.Axpys(out, weights, blockTokens, x.v[at*x.d:end*x.d], x.d, x.d)
}

func attend(ps []Partial, q []float32, tokens *tokenRows, n int, softcap float32, visible []int) {
	d := tokens.d
	var scores [blockRows * blockTokens]float32
	var sums [blockRows][]float32
	for len(ps) > 0 {
		rows := min(blockRows, len(ps))
		out := AppendSums(sums[:0], ps[:rows])
		for at := 0; at < n; at += blockTokens {
			end := min(at+blockTokens, n)
			tokens.dots(scores[:], q[:rows*d], at, end)
			for r := range rows {
				row := scores[r*blockTokens:][:end-at]
				SoftcapAll(row, softcap)
				if visible != nil {
					mask(row, visible[r]-at)
				}
			}
			Weigh(ps[:rows], scores[:], blockTokens, end-at)
			tokens.axpys(out, scores[:], at, end)
		}
		ps, q = ps[rows:], q[rows*d:]
		if visible != nil {
			visible = visible[rows:]
		}
	}
}

// Weigh takes the weights of n tokens into ps: scores is [len(ps)][n], a row
// beginning every stride scores. It leaves the weights there; it is for the
// caller to add the tokens' values, so weighted, to the partials' sums. A score that
// is no number weighs nothing.
func Weigh(ps []Partial, scores []float32, stride, n int) {
	for r := range ps {
		p, row := &ps[r], scores[r*stride:][:n]
		if hi := kernels.Largest(row, p.Max); hi > p.Max {
			p.rescale(hi)
		}
		p.Sum += float64(kernels.Weights(row, row, p.Max))
	}
}

// AppendSums appends the sums of weighted values [d] of ps, for kernels to add to.
func AppendSums(rows [][]float32, ps []Partial) [][]float32 {
	for i := range ps {
		rows = append(rows, ps[i].Out)
	}
	return rows
}

// SoftcapAll is Softcap of each score.
func SoftcapAll(scores []float32, softcap float32) {
	if softcap == 0 {
		return
	}
	for t, s := range scores {
		scores[t] = Softcap(s, softcap)
	}
}

// mask hides all scores but the first n.
func mask(scores []float32, n int) {
	for t := max(0, n); t < len(scores); t++ {
		scores[t] = float32(math.Inf(-1))
	}
}

// orderedBlock is how many tokens are taken by all rows, or all passes, one after the other: they stay in the first-level cache.
const orderedBlock = 32

// AttendInOrder is Attend of all tokens, without a cap, a row's sums in the order of tokens: the
// result has the same bits whatever kernels there are, so that what is stored may depend on it.
func AttendInOrder(ps []Partial, q, k, v []float32, d int) {
	n := len(k) / d
	scores, tokens := make([]float32, len(ps)*n), make([]int, n)
	for t := range tokens {
		tokens[t] = t
	}
	for lo := 0; lo < n; lo += orderedBlock {
		hi := min(lo+orderedBlock, n)
		for r := range ps {
			kernels.GatherDots(scores[r*n+lo:r*n+hi], k, tokens[lo:hi], q[r*d:(r+1)*d])
		}
	}
	for r := range ps {
		ps[r].weighInOrder(scores[r*n : (r+1)*n])
	}
	for lo := 0; lo < n; lo += orderedBlock {
		hi := min(lo+orderedBlock, n)
		for r := range ps {
			kernels.GatherAxpy(ps[r].Out, scores[r*n+lo:r*n+hi], v, tokens[lo:hi])
		}
	}
}

// weighInOrder makes weights of scores and adds them to the sum.
func (p *Partial) weighInOrder(scores []float32) {
	hi := p.Max
	for _, s := range scores {
		hi = max(hi, s)
	}
	if hi > p.Max {
		p.rescale(hi)
	}
	if math.IsInf(float64(p.Max), -1) {
		clear(scores) // every token is masked
		return
	}
	for t, s := range scores {
		w := exp32(s - p.Max)
		if !(w > 0) {
			w = 0 // so far below, or no number
		}
		p.Sum += float64(w)
		scores[t] = w
	}
}

// RelativeError returns |a - b| / |b|; 0 if both are zero.
func RelativeError(a, b []float32) float32 {
	var diff, norm float64
	for i := range b {
		e := float64(a[i]) - float64(b[i])
		diff += e * e
		norm += float64(b[i]) * float64(b[i])
	}
	switch {
	case diff == 0:
		return 0
	case norm == 0:
		return 1
	}
	return float32(math.Sqrt(diff / norm))
}
