package planted

import (
	"fmt"
	"math"
	"math/rand/v2"

	"golang.org/x/sync/errgroup"
	"gonum.org/v1/gonum/mat"

	"kvtier/attention"
	"kvtier/compress"
	"kvtier/tiers"
)

// Shape is one KV head and the query heads that share it.
type Shape struct {
	HeadDim int `json:"head_dim"`
	Group   int `json:"group"`
}

// Options of one context and the samples planted in it.
type Options struct {
	Shape  Shape
	Tokens int // at least 4,096
	// Samples of each task, at least 1; aggregation, whose tokens all samples share, has a quarter.
	Samples int
	// Weight is drawn from [WeightLow, WeightHigh]: the share of the dense
	// softmax that falls on what a query looks for.
	WeightLow, WeightHigh float64
	Seed                  uint64
}

// recentTokens is how many of the newest tokens stay exact at least, as in the server.
const recentTokens = 256

// check says what is wrong with the options.
func (o *Options) check() error {
	if err := o.Shape.check(); err != nil {
		return err
	}
	switch {
	case o.Tokens < 2*tiers.SegmentTokens:
		return fmt.Errorf("%d tokens: at least %d are needed for a sealed segment and room to plant", o.Tokens, 2*tiers.SegmentTokens)
	case o.Samples < 1 || o.Samples*50 > o.Tokens/4:
		return fmt.Errorf("%d samples do not fit %d tokens: take 1 to %d", o.Samples, o.Tokens, o.Tokens/200)
	case !(o.WeightLow > 0 && o.WeightLow <= o.WeightHigh && o.WeightHigh <= .9):
		return fmt.Errorf("weights %g to %g: they must lie in (0, .9], in this order", o.WeightLow, o.WeightHigh)
	}
	return nil
}

func (s Shape) check() error {
	switch d := s.HeadDim; {
	case d < 64 || d > compress.MaxHeadDim || d%16 != 0:
		return fmt.Errorf("head dimension %d: it must be a multiple of 16 from 64 to %d", d, compress.MaxHeadDim)
	case s.Group < 1 || s.Group > maxGroup:
		return fmt.Errorf("%d query heads a KV head: 1 to %d are possible", s.Group, maxGroup)
	}
	return nil
}

// Haystack is one KV head's context with its planted tokens. It does not
// change once made.
type Haystack struct {
	opt   Options
	w     *world
	end   int       // tokens [SinkTokens, end) are sealed into planes
	k, v  []float32 // [tokens][d], as bf16 holds them
	kb    []byte    // the same as bf16
	vb    []byte
	sharp []float32 // [content][content]: see sharpen
	plan  *plan
}

// New makes the context and plants the samples of all tasks. Equal options
// give equal contexts.
func New(o Options) (*Haystack, error) {
	if err := o.check(); err != nil {
		return nil, err
	}
	h := newHaystack(o)
	h.plan = newPlan(h)
	h.fill()
	return h, nil
}

// newHaystack returns one that has no plan and no tokens yet.
func newHaystack(o Options) *Haystack {
	n := o.Tokens * o.Shape.HeadDim
	return &Haystack{opt: o, w: newWorld(o.Shape.HeadDim, o.Seed), k: make([]float32, n), v: make([]float32, n), end: sealedOf(o.Tokens)}
}

// sealedOf returns how many of so many tokens are sealed, the first ones' rows among them.
func sealedOf(tokens int) int {
	return max(0, tokens-recentTokens) / tiers.SegmentTokens * tiers.SegmentTokens
}

// fill makes all tokens.
func (h *Haystack) fill() {
	var g errgroup.Group
	g.SetLimit(workers)
	for lo := 0; lo < h.opt.Tokens; lo += tiers.SegmentTokens {
		g.Go(func() error { h.write(lo, min(lo+tiers.SegmentTokens, h.opt.Tokens)); return nil })
	}
	_ = g.Wait() // it cannot fail
	h.kb = round(h.k)
	h.sharp = h.sharpen()
	h.plan.values(h)
	h.vb = round(h.v)
}

// workers is how many cores a run uses.
const workers = 2

// write makes tokens [lo, hi), which follow from the seed and lo alone.
func (h *Haystack) write(lo, hi int) {
	w := h.w
	rng := rand.New(rand.NewPCG(h.opt.Seed, 1<<32|uint64(lo)))
	c := len(w.content)
	z, drift := make([]float32, c), randn(rng, c, 1)
	topic := rng.IntN(topics)
	for t := lo; t < hi; t++ {
		if rng.IntN(topicTokens) == 0 {
			topic = rng.IntN(topics)
		}
		word := w.word(rng)
		kind, about := w.types[word*c:(word+1)*c], w.topics[topic*c:(topic+1)*c]
		share := math.Sqrt(typeShare)
		if p := h.plan.at[t]; p != nil { // its sentence is about nothing else
			kind, about, share = p.kind, make([]float32, c), math.Sqrt(typeShare+topicShare)
		}
		for i := range z {
			drift[i] = driftKeeps*drift[i] + float32(math.Sqrt(1-driftKeeps*driftKeeps)*rng.NormFloat64())
			z[i] = float32(math.Sqrt(topicShare))*about[i] + float32(share)*kind[i] +
				float32(math.Sqrt(driftShare))*drift[i] + float32(math.Sqrt(ownShare)*rng.NormFloat64())
		}
		h.writeKey(t, z, rng)
		h.writeValue(t, z, word, rng)
	}
}

func (h *Haystack) writeKey(t int, z []float32, rng *rand.Rand) {
	w, k := h.w, h.k[t*h.w.d:(t+1)*h.w.d]
	copy(k, w.bias)
	if t == 0 { // the sink: other content, and the constant with its sign turned
		for j, s := range w.sink {
			k[j] = -sinkSize * s
		}
	}
	c := len(w.content)
	for i, j := range w.content {
		k[j] += attention.Dot(w.mix[i*c:(i+1)*c], z)
	}
	for i := range w.rotated {
		k[i] += float32(rng.NormFloat64())
		k[i+w.d/2] += float32(rng.NormFloat64())
	}
	w.rotate(k, t)
}

func (h *Haystack) writeValue(t int, z []float32, word int, rng *rand.Rand) {
	w, v := h.w, h.v[t*h.w.d:(t+1)*h.w.d]
	c := len(w.content)
	rest := math.Sqrt((1 - valueFollowing*valueFollowing) / 2)
	for j := range v {
		v[j] = w.valueMean[j] + valueFollowing*attention.Dot(w.follow[j*c:(j+1)*c], z) +
			float32(rest*(float64(w.typeValue[word*w.d+j])+rng.NormFloat64()))
		if t == 0 {
			v[j] *= .02 // a sink says nothing
		}
	}
}

// round rounds x to bf16 in place and returns it as such.
func round(x []float32) []byte {
	b := make([]byte, len(x)*compress.BF16.Size())
	compress.FromFloat32(b, x, compress.BF16)
	compress.ToFloat32(x, b, compress.BF16)
	return b
}

// sharpen returns S^-sharpness, S being the covariance of the keys' content: what a
// looking head does to a content before it compares.
func (h *Haystack) sharpen() []float32 {
	c := len(h.w.content)
	step := max(1, h.opt.Tokens/8192)
	s, x := mat.NewSymDense(c, nil), mat.NewVecDense(c, nil)
	n := 0.
	for t := 1; t < h.opt.Tokens; t += step {
		for i, v := range h.contentOf(t) {
			x.SetVec(i, float64(v))
		}
		s.SymRankOne(s, 1, x)
		n++
	}
	out := make([]float32, c*c)
	var es mat.EigenSym
	if !es.Factorize(s, true) {
		return out // it converges on what is finite and symmetric
	}
	ev := es.Values(nil)
	ridge := 0.
	for _, e := range ev {
		ridge += sharpenRidge * e / float64(c)
	}
	var u mat.Dense
	es.VectorsTo(&u)
	for k, e := range ev {
		f := math.Pow(n/(max(e, 0)+ridge), sharpness)
		for i := range c {
			for j := range c {
				out[i*c+j] += float32(f * u.At(i, k) * u.At(j, k))
			}
		}
	}
	return out
}

// contentOf is what token t's key says besides the constant: [content].
func (h *Haystack) contentOf(t int) []float32 {
	out := make([]float32, len(h.w.content))
	for i, j := range h.w.content {
		out[i] = h.k[t*h.w.d+j] - h.w.bias[j]
	}
	return out
}

// key returns token t's key.
func (h *Haystack) key(t int) []float32 { return h.k[t*h.w.d : (t+1)*h.w.d] }

// value returns token t's value.
func (h *Haystack) value(t int) []float32 { return h.v[t*h.w.d : (t+1)*h.w.d] }
