package synth

import (
	"fmt"
	"math"
	"math/rand/v2"

	"kvtier/attention"
	"kvtier/attention/kernels"
	"kvtier/compress"
)

// Geometry of a model, and of the context that it is asked about.
type Geometry struct {
	Tokens          int // the context's length, for which heads divide their attention
	Layers, KVHeads int
	Group           int // query heads a KV head
	HeadDim         int // a multiple of 16 from 64 to 256
}

func (g Geometry) check() error {
	switch {
	case g.Tokens < BlockTokens:
		return fmt.Errorf("%d tokens: a context has at least %d", g.Tokens, BlockTokens)
	case g.Layers < 1 || g.Layers > 256 || g.KVHeads < 1 || g.KVHeads > 128 || g.Group < 1 || g.Group > 16:
		return fmt.Errorf("%d layers, %d KV heads, %d query heads each: 1 to 256, to 128 and to 16 are possible", g.Layers, g.KVHeads, g.Group)
	case g.HeadDim < 64 || g.HeadDim > compress.MaxHeadDim || g.HeadDim%16 != 0:
		return fmt.Errorf("head dimension %d: it must be a multiple of 16 from 64 to %d", g.HeadDim, compress.MaxHeadDim)
	}
	return nil
}

// Of a token's hidden state, the latents [0, keyLatents) make its keys and [sharedFrom, latents) its values.
const (
	latents    = 192
	keyLatents = 128
	sharedFrom = 64
)

// Constants of keys and values.
const (
	spectrumSlope = .8  // what latent j adds to keys has the variance (1+j)^-slope
	channelSpread = .4  // sd of the log of a channel's size
	rotatedShare  = .25 // of the channel pairs turn
	longestTurn   = 3e4 // tokens, of the slowest pair
	shortestTurn  = 600 // tokens, of the fastest
	sinkChannels  = 4   // channels with a large constant
	sinkSize      = 8.  // norm of that constant
	turningSize   = 2.  // size of the constant of the pairs that turn, against their spread
	valueMean     = .4  // size of the values' common mean against their spread
	sinkValue     = .02 // size of the first token's value against others'
)

// Model makes rows and queries. It does not change; its methods are safe for concurrent use.
type Model struct {
	Geometry
	seed    uint64
	text    *text
	rotated int       // pairs (i, i+d/2), i < rotated, turn
	freq    []float64 // [rotated], radians a token
	heads   []head    // [layers][kvHeads]
}

// head is what one KV head and its group of query heads are made of.
type head struct {
	key     []float32 // [keyLatents][d]
	value   []float32 // [latents-sharedFrom][d]
	bias    []float32 // [d], of keys, before they turn
	sink    []float32 // [d], unit: the direction of the constant
	turning float32   // squared norm of the bias of channels that turn
	mean    []float32 // [d], of values
	asks    []asker   // [group]
}

// New makes a model. Equal arguments give equal models.
func New(g Geometry, seed uint64) (*Model, error) {
	if err := g.check(); err != nil {
		return nil, err
	}
	m := &Model{Geometry: g, seed: seed, text: newText(seed), rotated: int(rotatedShare * float64(g.HeadDim/2))}
	for i := range m.rotated {
		turn := shortestTurn * math.Pow(longestTurn/shortestTurn, float64(i)/float64(max(1, m.rotated-1)))
		m.freq = append(m.freq, 2*math.Pi/turn)
	}
	b := m.Block(0)
	x, keys := m.Hidden(b, 0), make([]float32, BlockTokens*g.HeadDim)
	for i := range g.Layers * g.KVHeads {
		rng := rand.New(rand.NewPCG(m.seed, 1<<32|uint64(i)))
		h := m.newHead(rng, i < g.KVHeads)
		kernels.MatMul(keys, x, latents, 1, h.key, BlockTokens, keyLatents, g.HeadDim)
		h.settle(m, b, keys, rng)
		m.heads = append(m.heads, h)
	}
	return m, nil
}

func (m *Model) newHead(rng *rand.Rand, first bool) head {
	d := m.HeadDim
	h := head{key: make([]float32, keyLatents*d), bias: make([]float32, d), sink: make([]float32, d),
		value: randn(rng, (latents-sharedFrom)*d, 1/math.Sqrt(latents-sharedFrom)), mean: randn(rng, d, valueMean)}
	variance := make([]float64, keyLatents)
	sum := 0.
	for j := range variance {
		variance[j] = math.Pow(1+float64(j), -spectrumSlope)
		sum += variance[j]
	}
	size := make([]float64, d)
	for i := range size {
		size[i] = math.Exp(channelSpread * rng.NormFloat64())
	}
	for j, latent := range rng.Perm(keyLatents) { // every head has favourites of its own
		for i := range d {
			h.key[latent*d+i] = float32(size[i] * math.Sqrt(variance[j]/sum) * rng.NormFloat64())
		}
	}
	var content []int
	for i := range d {
		if m.turns(i) {
			h.bias[i] = turningSize * float32(rng.NormFloat64())
			h.turning += h.bias[i] * h.bias[i]
		} else {
			content = append(content, i)
		}
	}
	for _, at := range rng.Perm(len(content))[:sinkChannels] {
		h.sink[content[at]] = float32(math.Copysign(1/math.Sqrt(sinkChannels), rng.NormFloat64()))
	}
	h.clearOf(h.sink)
	for i, s := range h.sink {
		h.bias[i] += sinkSize * s
	}
	for range m.Group {
		h.asks = append(h.asks, m.newAsker(&h, rng, first))
	}
	return h
}

// clearOf makes the keys' content orthogonal to a direction, so that a query can weigh that alone.
func (h *head) clearOf(dir []float32) {
	d := len(dir)
	for j := range keyLatents {
		row := h.key[j*d : (j+1)*d]
		kernels.Axpy(row, -attention.Dot(row, dir), dir)
	}
}

// turns says whether channel i turns with the position.
func (m *Model) turns(i int) bool { return i%(m.HeadDim/2) < m.rotated }

// RowBytes is what k, or v, of one token of a layer takes.
func (m *Model) RowBytes() int { return m.KVHeads * m.HeadDim * compress.BF16.Size() }

// Rows writes keys and values of tokens [lo, hi) of a layer, as they follow from its hidden states x, to k and v:
// bfloat16 [hi-lo][kvHeads][headDim].
func (m *Model) Rows(k, v []byte, layer, lo, hi int, x []float32) {
	d, n := m.HeadDim, hi-lo
	keys, values := make([]float32, n*d), make([]float32, n*d)
	sin, cos := m.angles(lo, hi)
	for head := range m.KVHeads {
		h := &m.heads[layer*m.KVHeads+head]
		kernels.MatMul(keys, x, latents, 1, h.key, n, keyLatents, d)
		kernels.MatMul(values, x[sharedFrom:], latents, 1, h.value, n, latents-sharedFrom, d)
		for t := range n {
			key, value := keys[t*d:(t+1)*d], values[t*d:(t+1)*d]
			h.place(key, value, lo+t == 0)
			m.turn(key, sin[t*m.rotated:], cos[t*m.rotated:])
			at := (t*m.KVHeads + head) * d * compress.BF16.Size()
			compress.FromFloat32(k[at:], key, compress.BF16)
			compress.FromFloat32(v[at:], value, compress.BF16)
		}
	}
}

// place adds what all keys and values have in common; the first token is the sink.
func (h *head) place(key, value []float32, first bool) {
	if first {
		for i := range key {
			key[i], value[i] = h.bias[i]-2*sinkSize*h.sink[i], value[i]*sinkValue
		}
		return
	}
	kernels.Axpy(key, 1, h.bias)
	kernels.Axpy(value, 1, h.mean)
}

// angles returns sines and cosines of all pairs that turn, of positions [lo, hi).
func (m *Model) angles(lo, hi int) (sin, cos []float32) {
	sin, cos = make([]float32, 0, (hi-lo)*m.rotated), make([]float32, 0, (hi-lo)*m.rotated)
	for t := lo; t < hi; t++ {
		for _, f := range m.freq {
			s, c := math.Sincos(f * float64(t))
			sin, cos = append(sin, float32(s)), append(cos, float32(c))
		}
	}
	return sin, cos
}

func (m *Model) turn(x, sin, cos []float32) {
	half := m.HeadDim / 2
	for i := range m.rotated {
		a, b := x[i], x[i+half]
		x[i], x[i+half] = a*cos[i]-b*sin[i], a*sin[i]+b*cos[i]
	}
}

func randn(rng *rand.Rand, n int, scale float64) []float32 {
	x := make([]float32, n)
	for i := range x {
		x[i] = float32(scale * rng.NormFloat64())
	}
	return x
}
