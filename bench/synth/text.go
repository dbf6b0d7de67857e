package synth

import (
	"math"
	"math/rand/v2"
	"sort"
)

// What a token's hidden state is made of: shares of its variance, which sum to 1.
const (
	wordShare  = .40 // what word it is
	topicShare = .22 // what the text is about
	driftShare = .15 // what was said just before
	ownShare   = .23 // of the layer alone
)

const (
	vocabulary  = 4096
	topics      = 64
	topicTokens = 300 // mean length of a topic's run
	driftKeeps  = .95 // a token
	// BlockTokens is how many tokens follow from one seed: blocks start afresh.
	BlockTokens = 2048
)

// text is what all layers read.
type text struct {
	seed   uint64
	words  []float32 // [vocabulary][latents], of unit variance
	topics []float32 // [topics][latents]
	zipf   []float64 // [vocabulary], cumulative
}

func newText(seed uint64) *text {
	rng := rand.New(rand.NewPCG(seed, 0))
	t := &text{seed: seed, words: randn(rng, vocabulary*latents, 1), topics: randn(rng, topics*latents, 1)}
	sum := 0.
	for i := range vocabulary {
		sum += 1 / (float64(i) + 2.7) // Mandelbrot's shift: the first words are not that frequent
		t.zipf = append(t.zipf, sum)
	}
	return t
}

// Block is BlockTokens of the text, from a multiple of that on.
type Block struct {
	First  int       // position of its first token
	word   []int     // [BlockTokens]
	topic  []int     // [BlockTokens]
	common []float32 // [BlockTokens][latents]: what all layers' hidden states share
}

// Block returns the block that begins at token number x BlockTokens.
func (m *Model) Block(number int) *Block {
	t := m.text
	rng := rand.New(rand.NewPCG(t.seed, 2<<32|uint64(number)))
	b := &Block{First: number * BlockTokens, common: make([]float32, BlockTokens*latents)}
	drift := randn(rng, latents, 1)
	topic := rng.IntN(topics)
	fresh := math.Sqrt(1 - driftKeeps*driftKeeps)
	for i := range BlockTokens {
		if rng.IntN(topicTokens) == 0 {
			topic = rng.IntN(topics)
		}
		word := min(sort.SearchFloat64s(t.zipf, rng.Float64()*t.zipf[vocabulary-1]), vocabulary-1)
		b.word, b.topic = append(b.word, word), append(b.topic, topic)
		x, w, about := b.common[i*latents:][:latents], t.words[word*latents:], t.topics[topic*latents:]
		for j := range x {
			drift[j] = driftKeeps*drift[j] + float32(fresh*rng.NormFloat64())
			x[j] = sqrtWord*w[j] + sqrtTopic*about[j] + sqrtDrift*drift[j]
		}
	}
	return b
}

var (
	sqrtWord  = float32(math.Sqrt(wordShare))
	sqrtTopic = float32(math.Sqrt(topicShare))
	sqrtDrift = float32(math.Sqrt(driftShare))
	sqrtOwn   = float32(math.Sqrt(ownShare))
)

// Hidden returns a layer's hidden states of the block's tokens, for Rows: [BlockTokens][latents].
func (m *Model) Hidden(b *Block, layer int) []float32 {
	rng := rand.New(rand.NewPCG(m.seed, 3<<32|uint64(b.First/BlockTokens*m.Layers+layer)))
	x := make([]float32, len(b.common))
	for i, c := range b.common {
		x[i] = c + sqrtOwn*float32(rng.NormFloat64())
	}
	return x
}

// HiddenAt returns the part of hidden states x of a block's tokens that begins with token t of it.
func HiddenAt(x []float32, t int) []float32 { return x[t*latents:] }

// Words returns the words of tokens [lo, hi) of a block, as token ids.
func (b *Block) Words(lo, hi int) (ids []uint64) {
	for _, w := range b.word[lo:hi] {
		ids = append(ids, uint64(w))
	}
	return ids
}
