package planted

import (
	"math"
	"math/rand/v2"
	"slices"

	"kvtier/attention"
	"kvtier/tiers"
)

// Task is a kind of question.
type Task string

// The tasks; doc.go says what each of them asks.
const (
	Single     Task = "single"
	MultiKey   Task = "multikey"
	MultiValue Task = "multivalue"
	MultiQuery Task = "multiquery"
	Chain      Task = "chain"
	CWE        Task = "cwe"
	FWE        Task = "fwe"
	Ordinary   Task = "ordinary"
)

// Tasks lists all tasks in the order of reports.
var Tasks = []Task{Single, MultiKey, MultiValue, MultiQuery, Chain, CWE, FWE, Ordinary}

const (
	distractors     = 16
	distractorLow   = .5 // correlation of a distractor's type with the needle's
	distractorHigh  = .9
	peaksOfValues   = 4
	hops            = 4
	distinct        = 1.15
	decoys          = 64  // codewords that nobody planted, which every answer could be taken for
	aggregatedShare = .05 // of the context's tokens, a task
	markerShare     = .5  // of an aggregated type's variance: what all classes share
	codeShare       = .9  // of a planted value's squared norm; the rest is noise
)

// plant is a planted token.
type plant struct {
	kind  []float32 // [content], its type
	value []float32 // [d], unit: what its value says
}

// sample is one question with what it looks for.
type sample struct {
	task Task
	// peaks holds the positions that are looked for: by hop in a chain, by row
	// in multiquery, else one entry. codes are their codewords.
	peaks [][]int
	codes [][]int
	// rivals are the codewords of distractors.
	rivals []int
	// weight is the wanted share of the softmax, by entry of peaks; sink that of the first token.
	weight []float64
	sink   []float64
	row    int      // the row of the group that looks; in multiquery all do
	class  *classes // of aggregation
	seed   uint64   // of what else its queries hold
}

// classes are the tokens of one aggregation task.
type classes struct {
	task    Task
	marker  []float32   // [content]: what a query for all of them looks for
	kinds   [][]float32 // by class
	members []int       // positions
	codes   []float32   // [classes][d], orthonormal
	answer  []int       // the wanted classes
	first   int         // rank at which the answer begins
}

// plan is what is planted where.
type plan struct {
	at      map[int]*plant
	samples []*sample
	codes   []float32 // [codes][d], unit: the codebook of all but aggregation
	lift    []float32 // [d][d], orthogonal: turns the direction of a hop's query into a value
	rng     *rand.Rand
}

func newPlan(h *Haystack) *plan {
	p := &plan{at: make(map[int]*plant), rng: rand.New(rand.NewPCG(h.opt.Seed, 2<<32|uint64(h.w.d)))}
	for _, x := range orthogonal(p.rng, h.w.d, nil) {
		p.lift = append(p.lift, float32(x))
	}
	for i := range h.opt.Samples {
		for _, t := range []Task{Single, MultiKey, MultiValue, MultiQuery, Chain} {
			p.add(h, p.sample(h, t, i))
		}
	}
	cwe, fwe := p.commonWords(h), p.frequentWords(h)
	for i := range max(1, h.opt.Samples/4) {
		for _, c := range []*classes{cwe, fwe} {
			s := p.sample(h, c.task, i)
			s.class, s.peaks = c, [][]int{c.members}
			p.weigh(h, s)
			p.samples = append(p.samples, s)
		}
		s := p.sample(h, Ordinary, i)
		s.peaks = nil
		p.samples = append(p.samples, s)
	}
	for range decoys {
		p.code(h.w)
	}
	return p
}

// sample makes a sample's positions and plants its types.
func (p *plan) sample(h *Haystack, t Task, i int) *sample {
	s := &sample{task: t, row: i % h.opt.Shape.Group, seed: p.rng.Uint64()}
	kind := func() []float32 { return p.kind(len(h.w.content)) }
	switch t {
	case Single:
		depth := (float64(i) + .5) / float64(h.opt.Samples)
		at := tiers.SinkTokens + int(depth*float64(h.end-tiers.SinkTokens))
		for p.at[at] != nil {
			at++
		}
		p.at[at] = &plant{kind: kind()}
		s.peaks = [][]int{{at}}
	case MultiKey:
		needle := kind()
		s.peaks = [][]int{{p.place(h, needle)}}
		for range distractors {
			s.rivals = append(s.rivals, p.distract(h, needle))
		}
	case MultiValue:
		k, peaks := kind(), []int(nil)
		for range peaksOfValues {
			peaks = append(peaks, p.place(h, k))
		}
		s.peaks = [][]int{peaks}
	case MultiQuery:
		for range h.opt.Shape.Group {
			s.peaks = append(s.peaks, []int{p.place(h, kind())})
		}
	case Chain:
		for range hops {
			s.peaks = append(s.peaks, []int{p.place(h, kind())})
		}
	}
	return s
}

// kind draws a rare type, a little more distinct than most: the keys that
// real queries single out lie 1.06 times as far from the mean as the median key.
func (p *plan) kind(content int) []float32 {
	k := unitRows(p.rng, 1, content)
	for i := range k {
		k[i] *= distinct * float32(math.Sqrt(float64(content)))
	}
	return k
}

// place plants a type at a free place of the sealed zone.
func (p *plan) place(h *Haystack, kind []float32) int {
	for {
		at := tiers.SinkTokens + p.rng.IntN(h.end-tiers.SinkTokens)
		if p.at[at] == nil {
			p.at[at] = &plant{kind: kind}
			return at
		}
	}
}

// distract plants a type that correlates with the needle's, with a value of
// its own, and returns the codeword.
func (p *plan) distract(h *Haystack, needle []float32) (code int) {
	r := distractorLow + (distractorHigh-distractorLow)*p.rng.Float64()
	kind := randn(p.rng, len(needle), math.Sqrt(1-r*r))
	for i := range kind {
		kind[i] += float32(r) * needle[i]
	}
	code = len(p.codes) / h.w.d
	p.at[p.place(h, kind)].value = p.code(h.w)
	return code
}

// add gives a sample's tokens their codewords and weights.
func (p *plan) add(h *Haystack, s *sample) {
	for _, peaks := range s.peaks {
		var codes []int
		for _, at := range peaks {
			value := p.code(h.w, codes...)
			codes = append(codes, len(p.codes)/h.w.d-1)
			p.at[at].value = value
		}
		s.codes = append(s.codes, codes)
	}
	p.weigh(h, s)
	p.samples = append(p.samples, s)
}

func (p *plan) weigh(h *Haystack, s *sample) {
	for range s.peaks {
		w := h.opt.WeightLow + (h.opt.WeightHigh-h.opt.WeightLow)*p.rng.Float64()
		s.weight = append(s.weight, w)
		s.sink = append(s.sink, (1-w)*(.2+.3*p.rng.Float64()))
	}
}

// code draws a codeword and enters it in the codebook. It is orthogonal to
// what all values have in common and to others that are wanted beside it.
func (p *plan) code(w *world, others ...int) []float32 {
	c := w.withoutMean(unitRows(p.rng, 1, w.d))
	for _, o := range others {
		other := p.codes[o*w.d : (o+1)*w.d]
		dot := attention.Dot(c, other)
		for j := range c {
			c[j] -= dot * other[j]
		}
	}
	unit(c)
	p.codes = append(p.codes, c...)
	return c
}

func (p *plan) commonWords(h *Haystack) *classes {
	const common, rare = 10, 30
	c := p.newClasses(h, CWE, common+rare)
	frequency := make([]float64, common+rare)
	for i := range frequency {
		frequency[i] = 3
		if i < common {
			frequency[i] = 30
			c.answer = append(c.answer, i)
		}
	}
	p.spread(h, c, frequency)
	return c
}

func (p *plan) frequentWords(h *Haystack) *classes {
	frequency := make([]float64, 20)
	for i := range frequency {
		frequency[i] = math.Pow(float64(i+1), -2)
	}
	c := p.newClasses(h, FWE, len(frequency))
	c.first, c.answer = 1, []int{1, 2, 3}
	p.spread(h, c, frequency)
	return c
}

func (p *plan) newClasses(h *Haystack, t Task, n int) *classes {
	c := &classes{task: t, marker: randn(p.rng, len(h.w.content), 1)}
	// The first row is the values' common mean, so that the codes are orthogonal to it.
	for _, x := range orthogonal(p.rng, h.w.d, h.w.valueMean)[h.w.d : (n+1)*h.w.d] {
		c.codes = append(c.codes, float32(x))
	}
	for range n {
		kind := randn(p.rng, len(c.marker), math.Sqrt(1-markerShare))
		for i := range kind {
			kind[i] += float32(math.Sqrt(markerShare)) * c.marker[i]
		}
		c.kinds = append(c.kinds, kind)
	}
	return c
}

// spread plants tokens of all classes by frequency.
func (p *plan) spread(h *Haystack, c *classes, frequency []float64) {
	var sum float64
	for _, f := range frequency {
		sum += f
	}
	for i, f := range frequency {
		for range max(1, int(math.Round(f/sum*aggregatedShare*float64(h.opt.Tokens)))) {
			at := p.place(h, c.kinds[i])
			p.at[at].value = c.codes[i*h.w.d : (i+1)*h.w.d]
			c.members = append(c.members, at)
		}
	}
	slices.Sort(c.members)
}

// values writes the values of what is planted. A chain's value is the direction
// of the next hop's query, which is known once keys are.
func (p *plan) values(h *Haystack) {
	d := h.w.d
	for _, s := range p.samples {
		for i := 0; s.task == Chain && i+1 < hops; i++ {
			m := h.match(s.peaks[i+1][0])
			unit(m)
			code := p.codes[s.codes[i][0]*d : (s.codes[i][0]+1)*d]
			p.toValue(code, m)
			p.at[s.peaks[i][0]].value = code
		}
	}
	norm := math.Sqrt(float64(d) * (1 + valueMean*valueMean))
	// In the order of positions, so that equal seeds give equal noise.
	for t := range h.opt.Tokens {
		x := p.at[t]
		if x == nil {
			continue
		}
		v := h.value(t)
		for j := range v {
			noise := math.Sqrt((1-codeShare)/float64(d)) * p.rng.NormFloat64()
			v[j] = float32(norm * (math.Sqrt(codeShare)*float64(x.value[j]) + noise))
		}
	}
}

// toValue turns a direction of content into one of values: [content] to [d].
func (p *plan) toValue(dst, m []float32) {
	d := len(dst)
	for j := range dst {
		dst[j] = 0
		for i, x := range m {
			dst[j] += p.lift[i*d+j] * x
		}
	}
}

// toContent is its inverse, but for what all values have in common: [d] to [content], unit.
func (p *plan) toContent(w *world, value []float32) []float32 {
	d := w.d
	value = w.withoutMean(value)
	out := make([]float32, len(w.content))
	for i := range out {
		for j, x := range value {
			out[i] += p.lift[i*d+j] * x
		}
	}
	unit(out)
	return out
}

func unitRows(rng *rand.Rand, n, d int) []float32 {
	x := randn(rng, n*d, 1)
	for i := range n {
		unit(x[i*d : (i+1)*d])
	}
	return x
}

func unit(x []float32) {
	var n float64
	for _, v := range x {
		n += float64(v) * float64(v)
	}
	if n > 0 {
		for i := range x {
			x[i] /= float32(math.Sqrt(n))
		}
	}
}
