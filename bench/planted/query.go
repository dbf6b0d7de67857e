package planted

import (
	"math"
	"math/rand/v2"

	"gonum.org/v1/gonum/mat"

	"kvtier/attention"
)

// Constants of queries, in nats of score.
const (
	targetNats, targetSpread = 9., 3. // of an ordinary query's target above the mean key
	secondNats               = 2.     // of another token that it also resembles
	localNats                = 2.     // of a token at distance 0, from the rotating pairs
	habitNats                = 1.     // sd over keys, of what a head always asks
	lookingOne               = 8      // of so many sampled queries one looks
	lookingNats              = 14.
	mostNats                 = 60. // where looking harder is given up
)

// resembles returns token t's content as a direction of queries, scaled so
// that its key scores 1: [content].
func (h *Haystack) resembles(t int) []float32 {
	x := h.contentOf(t)
	return scaled(x, x)
}

// match returns the direction that tells token t's key from others, scaled so
// that its key scores 1: [content].
func (h *Haystack) match(t int) []float32 {
	x := h.contentOf(t)
	return scaled(h.discriminant(x), x)
}

// discriminant returns the direction in which a looking head compares content x.
func (h *Haystack) discriminant(x []float32) []float32 {
	c := len(x)
	m := make([]float32, c)
	for i := range m {
		m[i] = attention.Dot(h.sharp[i*c:(i+1)*c], x)
	}
	return m
}

// scaled returns m such that x scores 1.
func scaled(m, x []float32) []float32 {
	out := make([]float32, len(m))
	if s := attention.Dot(m, x); s > 0 {
		for i, v := range m {
			out[i] = v / s
		}
	}
	return out
}

// addContent adds a times a content direction to a query [d].
func (h *Haystack) addContent(q []float32, a float64, m []float32) {
	for i, j := range h.w.content {
		q[j] += float32(a) * m[i]
	}
}

// base is what a head of the group asks at a position, wherever it looks: its
// own habit, near tokens, and some likeness to an earlier one.
func (h *Haystack) base(rng *rand.Rand, head, position int) []float32 {
	w := h.w
	q := make([]float32, w.d)
	var n2 float32
	for i := range w.rotated {
		n2 += w.bias[i]*w.bias[i] + w.bias[i+w.d/2]*w.bias[i+w.d/2]
	}
	for i := range w.rotated {
		q[i], q[i+w.d/2] = localNats/n2*w.bias[i], localNats/n2*w.bias[i+w.d/2]
	}
	w.rotate(q, position)
	c := len(w.content)
	h.addContent(q, habitNats, w.habit[head*c:(head+1)*c])
	h.addContent(q, secondNats*math.Abs(rng.NormFloat64()), h.resembles(1+rng.IntN(max(1, position))))
	return q
}

// ordinary is a query for content like some earlier token's.
func (h *Haystack) ordinary(rng *rand.Rand, head, position int) []float32 {
	q := h.base(rng, head, position)
	nats := max(1, targetNats+targetSpread*rng.NormFloat64())
	h.addContent(q, nats, h.resembles(1+rng.IntN(max(1, position))))
	return q
}

// sampled is a query as the metric sees it: an ordinary one or, one in
// lookingOne, one that looks for a single earlier token. Its sink is about as
// strong as usual.
func (h *Haystack) sampled(rng *rand.Rand, head, position int) []float32 {
	var q []float32
	if rng.IntN(lookingOne) == 0 {
		q = h.base(rng, head, position)
		h.addContent(q, lookingNats, h.match(1+rng.IntN(max(1, position))))
	} else {
		q = h.ordinary(rng, head, position)
	}
	h.addSink(q, math.Log(float64(position)+2))
	return q
}

// addSink makes the first token's score rise by nats against all others.
func (h *Haystack) addSink(q []float32, nats float64) {
	for j, s := range h.w.sink {
		q[j] -= float32(nats / (2 * sinkSize) * float64(s))
	}
}

// settleSink gives the first token its share of the softmax, given the scores
// of all tokens without it.
func (h *Haystack) settleSink(q []float32, scores []float32, share float64) {
	body := logSum(scores[1:])
	h.addSink(q, body+math.Log(share/(1-share))-float64(scores[0]))
}

// aim returns base + fixed + s*slope such that the wanted share of the softmax
// falls on members and the sink has its own, and the s that does it. The
// largest share that can be had is taken if the wanted one cannot.
func (h *Haystack) aim(base, fixed, slope []float32, members []int, share, sink float64) (q []float32, s float64) {
	zero := append([]float32(nil), base...)
	h.addContent(zero, 1, fixed)
	one := make([]float32, h.w.d)
	h.addContent(one, 1, slope)
	u0, u1 := h.scores(zero), h.scores(one)
	u := make([]float32, len(u0))
	at := func(s float64) float64 {
		for t := range u {
			u[t] = u0[t] + float32(s)*u1[t]
		}
		all, part := logSum(u[1:]), math.Inf(-1)
		for _, m := range members {
			part = logAdd(part, float64(u[m]))
		}
		return math.Exp(part - all)
	}
	s = solve(at, share/(1-sink))
	at(s)
	h.addContent(zero, s, slope)
	h.settleSink(zero, u, sink)
	return zero, s
}

// solve finds where f, a share that rises from small s on, reaches want first;
// else where it is largest.
func solve(f func(float64) float64, want float64) float64 {
	const step, enough = 2., .003
	odds := func(y float64) float64 { return math.Log(max(y, 1e-12)/max(1-y, 1e-12)) - math.Log(want/(1-want)) }
	best, bestAt := -1., 0.
	lo, below := 0., odds(f(0))
	for hi := step; hi <= mostNats; hi += step {
		y := f(hi)
		if y > best {
			best, bestAt = y, hi
		}
		above := odds(y)
		if above < 0 {
			lo, below = hi, above
			continue
		}
		for range 20 { // log odds are almost straight in s: false position is soon there
			mid := lo + (hi-lo)*min(.95, max(.05, below/(below-above)))
			y := odds(f(mid))
			if math.Abs(y) < enough {
				return mid
			}
			if y < 0 {
				lo, below = mid, y
			} else {
				hi, above = mid, y
			}
		}
		return hi
	}
	return bestAt
}

// look is a query at the last position that looks for peaks, which get equal
// scores and together the wanted share.
func (h *Haystack) look(rng *rand.Rand, head int, peaks []int, share, sink float64) []float32 {
	base := h.base(rng, head, h.opt.Tokens-1)
	n := len(peaks)
	m := make([][]float32, n)
	gram, ones, b := mat.NewDense(n, n, nil), mat.NewVecDense(n, nil), mat.NewVecDense(n, nil)
	for i, p := range peaks {
		m[i] = h.match(p)
		ones.SetVec(i, 1)
		b.SetVec(i, float64(attention.Dot(base, h.key(p))))
	}
	for i, p := range peaks {
		for j := range peaks {
			gram.Set(i, j, float64(attention.Dot(h.contentOf(p), m[j])))
		}
	}
	var slope, fixed mat.VecDense
	if slope.SolveVec(gram, ones) != nil || fixed.SolveVec(gram, b) != nil {
		slope.CloneFromVec(ones) // peaks that are the same token but for rounding
		fixed.ScaleVec(0, ones)
	}
	c := len(h.w.content)
	dir, off := make([]float32, c), make([]float32, c)
	for i := range m {
		for j, x := range m[i] {
			dir[j] += float32(slope.AtVec(i)) * x
			off[j] -= float32(fixed.AtVec(i)) * x
		}
	}
	q, _ := h.aim(base, off, dir, peaks, share, sink)
	return q
}

// scores are the scores of all tokens: [tokens].
func (h *Haystack) scores(q []float32) []float32 {
	out := make([]float32, h.opt.Tokens)
	for t := range out {
		out[t] = attention.Dot(q, h.key(t))
	}
	return out
}

func logSum(x []float32) float64 {
	hi := float32(math.Inf(-1))
	for _, v := range x {
		hi = max(hi, v)
	}
	var sum float64
	for _, v := range x {
		if v > hi-40 { // e^-40 of the largest changes nothing, times any number of tokens
			sum += math.Exp(float64(v - hi))
		}
	}
	return float64(hi) + math.Log(sum)
}

func logAdd(a, b float64) float64 {
	if a < b {
		a, b = b, a
	}
	if math.IsInf(b, -1) {
		return a
	}
	return a + math.Log1p(math.Exp(b-a))
}
