package planted

import (
	"math"
	"math/rand/v2"

	"gonum.org/v1/gonum/mat"

	"kvtier/attention"
)

// Constants of the synthetic context. Shares are of a content's variance and sum to 1.
const (
	typeShare  = .40 // what token it is
	topicShare = .22 // what the text is about
	driftShare = .15 // what was said just before
	ownShare   = .23

	vocabulary     = 4096
	topics         = 64
	topicTokens    = 300 // mean length of a topic's run
	driftKeeps     = .95 // per token
	spectrumSlope  = .8  // eigenvalue j of content is (1+j)^-slope
	channelSpread  = .4  // sd of the log of a channel's size
	rotatedShare   = .25 // of the channel pairs
	ropeBase       = 1e6
	sinkChannels   = 4   // channels with a large constant
	sinkSize       = 8.  // norm of that constant
	valueFollowing = .5  // correlation of values with keys
	maxGroup       = 16  // query heads a KV head
	valueMean      = .4  // size of the values' common mean against their spread
	sharpness      = .33 // of a looking head, from 0 (it compares as keys lie) to 1 (Fisher's discriminant)
	sharpenRidge   = .02 // of the mean eigenvalue: a head does not resolve what hardly varies
)

// world is what all contexts of one seed and shape share: as it were, the
// weights of the model.
type world struct {
	d, rotated int       // head dimension; pairs (i, i+d/2), i < rotated, turn
	freq       []float64 // [rotated], radians a token
	content    []int     // channels that carry content
	mix        []float32 // [len(content)][len(content)]: content's factor
	sink       []float32 // [d], unit: the constant's direction
	bias       []float32 // [d], mean key before rotation
	types      []float32 // [vocabulary][content], unit variance
	topics     []float32 // [topics][content]
	habit      []float32 // [maxGroup][content]: what each head always asks, of sd 1 over keys
	follow     []float32 // [d][content]: what of the content values follow
	typeValue  []float32 // [vocabulary][d]
	valueMean  []float32 // [d]
	zipf       []float64 // [vocabulary], cumulative
}

func newWorld(d int, seed uint64) *world {
	rng := rand.New(rand.NewPCG(seed, uint64(d)))
	w := &world{d: d, rotated: int(rotatedShare * float64(d/2))}
	for i := range w.rotated {
		w.freq = append(w.freq, math.Pow(ropeBase, -2*float64(i)/float64(d)))
	}
	for j := range d {
		if j%(d/2) >= w.rotated {
			w.content = append(w.content, j)
		}
	}
	c := len(w.content)
	w.makeMix(rng)
	w.makeBias(rng)
	w.types, w.topics = randn(rng, vocabulary*c, 1), randn(rng, topics*c, 1)
	w.makeHabits(rng)
	w.follow = randn(rng, d*c, 1/math.Sqrt(float64(c)))
	w.typeValue, w.valueMean = randn(rng, vocabulary*d, 1), randn(rng, d, valueMean)
	sum := 0.
	for i := range vocabulary {
		sum += 1 / (float64(i) + 2.7) // Mandelbrot's shift: the first words are not that frequent
		w.zipf = append(w.zipf, sum)
	}
	return w
}

// makeMix draws content's factor: an orthogonal basis with decaying variances,
// over channels of different size. The mean variance of a channel is about 1.
func (w *world) makeMix(rng *rand.Rand) {
	c := len(w.content)
	u := orthogonal(rng, c, nil)
	variance, sum := make([]float64, c), 0.
	for j := range variance {
		variance[j] = math.Pow(1+float64(j), -spectrumSlope)
		sum += variance[j]
	}
	w.mix = make([]float32, c*c)
	for i := range c {
		size := math.Exp(channelSpread * rng.NormFloat64())
		for j := range c {
			w.mix[i*c+j] = float32(size * u[i*c+j] * math.Sqrt(variance[j]/sum*float64(c)))
		}
	}
}

// makeBias draws the constant channels, which the sink lacks, and the mean of
// the rotating pairs, which makes near tokens score higher. Content is kept
// orthogonal to the constant, so that a query can weigh the sink alone.
func (w *world) makeBias(rng *rand.Rand) {
	w.sink, w.bias = make([]float32, w.d), make([]float32, w.d)
	c := len(w.content)
	dir := make([]float32, c)
	for _, i := range rng.Perm(c)[:sinkChannels] {
		dir[i] = float32(math.Copysign(1/math.Sqrt(sinkChannels), rng.NormFloat64()))
	}
	for i, j := range w.content {
		w.sink[j] = dir[i]
		w.bias[j] = sinkSize * dir[i]
	}
	for j := range c { // column by column
		var dot float32
		for i := range c {
			dot += dir[i] * w.mix[i*c+j]
		}
		for i := range c {
			w.mix[i*c+j] -= dot * dir[i]
		}
	}
	for i := range w.rotated {
		w.bias[i], w.bias[i+w.d/2] = float32(rng.NormFloat64()), float32(rng.NormFloat64())
	}
}

// makeHabits draws a direction for each head, of which those with much variance have more.
func (w *world) makeHabits(rng *rand.Rand) {
	c := len(w.content)
	for range maxGroup {
		z := randn(rng, c, 1)
		x := make([]float32, c)
		for i := range x {
			x[i] = attention.Dot(w.mix[i*c:(i+1)*c], z)
		}
		var variance float64 // of x over keys, whose content is mix times unit variance
		for j := range c {
			var p float64
			for i := range x {
				p += float64(x[i] * w.mix[i*c+j])
			}
			variance += p * p
		}
		for _, v := range x {
			w.habit = append(w.habit, v/float32(math.Sqrt(variance)))
		}
	}
}

// rotate turns x [d] to a position.
func (w *world) rotate(x []float32, position int) {
	for i, f := range w.freq {
		sin, cos := math.Sincos(f * float64(position))
		a, b := float64(x[i]), float64(x[i+w.d/2])
		x[i], x[i+w.d/2] = float32(a*cos-b*sin), float32(a*sin+b*cos)
	}
}

// word draws a token type.
func (w *world) word(rng *rand.Rand) int {
	x := rng.Float64() * w.zipf[vocabulary-1]
	lo, hi := 0, vocabulary-1
	for lo < hi {
		if m := (lo + hi) / 2; w.zipf[m] < x {
			lo = m + 1
		} else {
			hi = m
		}
	}
	return lo
}

// orthogonal returns a random orthogonal matrix [n][n], row-major, whose first
// row has the direction of first, if that is not nil.
func orthogonal(rng *rand.Rand, n int, first []float32) []float64 {
	a := mat.NewDense(n, n, nil)
	for i := range n {
		for j := range n {
			a.Set(i, j, rng.NormFloat64())
		}
	}
	for i, v := range first {
		a.Set(i, 0, float64(v))
	}
	var qr mat.QR
	qr.Factorize(a)
	var q mat.Dense
	qr.QTo(&q)
	var rows mat.Dense
	rows.CloneFrom(q.T())
	return rows.RawMatrix().Data
}

func randn(rng *rand.Rand, n int, scale float64) []float32 {
	x := make([]float32, n)
	for i := range x {
		x[i] = float32(scale * rng.NormFloat64())
	}
	return x
}
