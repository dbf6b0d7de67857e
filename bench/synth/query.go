package synth

import (
	"math"
	"math/rand/v2"

	"kvtier/attention"
	"kvtier/attention/kernels"
)

// What a query's scores are made of: shares of their variance, which sum to 1.
const (
	habitShare   = .42 // what the head always asks for
	subjectShare = .38 // what the topic at hand means to it
	cueShare     = .17 // what the word at hand means to it
	whimShare    = .03 // of the position alone
)

// asker is a query head.
type asker struct {
	profile  Profile
	habit    []float32 // [d], of unit spread
	subjects []int     // [topics]: the topic that it looks for at each
	cues     []int     // [vocabulary]: the word that it looks for at each
	sharp    float64   // the spread of its scores
	near     float64   // nats of a token at distance 0 above those far away
	level    float64   // nats of the first token above the mean of all others
}

func (m *Model) newAsker(h *head, rng *rand.Rand, first bool) asker {
	a := asker{profile: drawProfile(rng, first), subjects: rng.Perm(topics), cues: rng.Perm(vocabulary)}
	a.habit = h.seek(randn(rng, latents, 1), m)
	a.sharp = a.profile.Peak / peakSpreads
	return a
}

// seek returns the direction of queries that look for tokens of hidden state z, such that the scores of all
// tokens spread by 1: [d].
func (h *head) seek(z []float32, m *Model) []float32 {
	d := m.HeadDim
	q := make([]float32, d)
	for j := range keyLatents {
		kernels.Axpy(q, z[j], h.key[j*d:(j+1)*d])
	}
	for i := range q {
		if m.turns(i) {
			q[i] = 0
		}
	}
	h.level(q)
	return q
}

// level scales a direction such that the scores of all tokens spread by 1.
func (h *head) level(q []float32) {
	d := len(q)
	var variance float64
	for j := range keyLatents {
		x := float64(attention.Dot(q, h.key[j*d:(j+1)*d]))
		variance += x * x
	}
	s := float32(1 / math.Sqrt(max(variance, 1e-30)))
	for i := range q {
		q[i] *= s
	}
}

// Query returns what a layer's query heads ask at token t of a block: [kvHeads][group][headDim], scaled, so that a
// score is a plain dot product.
func (m *Model) Query(b *Block, t, layer int) []float32 {
	position, d := b.First+t, m.HeadDim
	rng := rand.New(rand.NewPCG(m.seed, 4<<32|uint64(position*m.Layers+layer)))
	sin, cos := m.angles(position, position+1)
	out := make([]float32, 0, m.KVHeads*m.Group*d)
	for head := range m.KVHeads {
		h := &m.heads[layer*m.KVHeads+head]
		for g := range h.asks {
			q := h.ask(&h.asks[g], m, b, t, rng)
			h.divide(q, &h.asks[g], m)
			m.turn(q, sin, cos)
			out = append(out, q...)
		}
	}
	return out
}

// ask returns what one head asks by content, before it turns.
func (h *head) ask(a *asker, m *Model, b *Block, t int, rng *rand.Rand) []float32 {
	subject, cue := a.subjects[b.topic[t]], a.cues[b.word[t]]
	q := make([]float32, m.HeadDim)
	kernels.Axpy(q, float32(math.Sqrt(habitShare)), a.habit)
	kernels.Axpy(q, float32(math.Sqrt(subjectShare)), h.seek(m.text.topics[subject*latents:], m))
	kernels.Axpy(q, float32(math.Sqrt(cueShare)), h.seek(m.text.words[cue*latents:], m))
	kernels.Axpy(q, float32(math.Sqrt(whimShare)), h.seek(randn(rng, latents, 1), m))
	h.level(q)
	for i := range q {
		q[i] *= float32(a.sharp)
	}
	return q
}

// divide gives the first and the newest tokens their shares of the attention.
func (h *head) divide(q []float32, a *asker, m *Model) {
	// Near tokens score higher by the pairs that turn, whose constant they share.
	for i, x := range h.bias {
		if m.turns(i) {
			q[i] += float32(a.near) / h.turning * x
		}
	}
	// The first token lacks the constant that all others have.
	kernels.Axpy(q, float32(-a.level/(2*sinkSize)), h.sink)
}

const (
	newest     = 256  // tokens that Profile.Recent is about
	least      = .002 // share
	settleAt   = 8    // positions at which heads are measured to settle their shares
	mostNear   = 40   // nats
	nearRounds = 24   // of bisection
)

// settle finds what gives the first and the newest tokens their shares at the end of a context of so many tokens, by what
// the heads of a group ask in a block whose keys are given, before they turn: [BlockTokens][d].
func (h *head) settle(m *Model, b *Block, keys []float32, rng *rand.Rand) {
	var kernel [newest]float64 // by distance: what is left of near
	for back := range kernel {
		for _, f := range m.freq {
			kernel[back] += math.Cos(f*float64(back)) / float64(len(m.freq))
		}
	}
	d, n := m.HeadDim, max(1, float64(m.Tokens-newest))
	for g := range h.asks {
		a := &h.asks[g]
		p := a.profile
		rest := max(1-p.Sink-p.Recent, least)
		body := math.Log(n) + bodyLog(a.sharp, n)
		a.level = math.Log(max(p.Sink, least)/rest) + body
		var scores [settleAt][newest]float64
		for i := range scores {
			t := BlockTokens - 1 - i*newest/2
			q := h.ask(a, m, b, t, rng)
			for back := range newest {
				scores[i][back] = float64(attention.Dot(q, keys[(t-back)*d:][:d]))
			}
		}
		want := max(p.Recent, least) / (max(p.Recent, least) + rest)
		share := func(near float64) (mean float64) {
			for i := range scores {
				sum := 0.
				for back, s := range scores[i] {
					sum += math.Exp(s + near*kernel[back] - body)
				}
				mean += sum / (1 + sum) / settleAt
			}
			return mean
		}
		lo, hi := -float64(mostNear), float64(mostNear)
		for range nearRounds {
			if mid := (lo + hi) / 2; share(mid) < want {
				lo = mid
			} else {
				hi = mid
			}
		}
		a.near = hi
	}
}

// bodyLog is the log of the mean of exp(x) over n normal x of spread s: half the variance, as long as
// so many tokens have the few that rule the sum.
func bodyLog(s, n float64) float64 {
	if most := math.Sqrt(2 * math.Log(n)); s > most {
		return s*most - math.Log(n)
	}
	return s * s / 2
}

// peakSpreads is how many spreads the highest score lies above the mean, in made texts as long as those that were measured. Of
// real heads it is 2.7 to 4.4: it is the high scores that matter, so peaks are made alike and spreads are not.
const peakSpreads = 4.3
