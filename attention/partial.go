package attention

import (
	"math"

	"kvtier/attention/kernels"
)

// Partial is the attention of one query head over some tokens: a running
// softmax. Partials over disjoint tokens merge exactly, in any order up to
// rounding (Milakov and Gimelshein, arXiv 1805.02867; FlashDecoding's merge).
// Attention with no tokens is Max = -Inf, Sum = 0.
type Partial struct {
	Max float32   // largest score so far
	Sum float64   // sum of exp(score - Max)
	Out []float32 // [d], sum of exp(score - Max) * v
}

// NewPartials returns n empty partials of dimension d.
func NewPartials(n, d int) []Partial {
	out := make([]float32, n*d)
	ps := make([]Partial, n)
	for i := range ps {
		ps[i] = Partial{Max: float32(math.Inf(-1)), Out: out[i*d : (i+1)*d : (i+1)*d]}
	}
	return ps
}

// ClonePartials returns independent copies.
func ClonePartials(ps []Partial) []Partial {
	out := make([]Partial, len(ps))
	for i, p := range ps {
		p.Out = append([]float32(nil), p.Out...)
		out[i] = p
	}
	return out
}

// Add takes in weight exp(score) at value v [d]. With the log of a summed mass
// as score and a mean as v it takes in many tokens at once.
func (p *Partial) Add(score float32, v []float32) {
	w := p.weight(score)
	if w == 0 {
		return
	}
	p.Sum += float64(w)
	Axpy(p.Out, w, v)
}

// AddMass takes in weight exp(score) without a value: a learned attention sink.
func (p *Partial) AddMass(score float32) { p.Sum += float64(p.weight(score)) }

// Shift moves the output by exp(score) v, without taking in any weight.
func (p *Partial) Shift(score float32, v []float32) { Axpy(p.Out, p.weight(score), v) }

// weight returns exp(score - Max), after raising Max if score is above it.
func (p *Partial) weight(score float32) float32 {
	if score > p.Max {
		p.rescale(score)
	}
	if math.IsInf(float64(score), -1) {
		return 0 // -Inf - -Inf is no number
	}
	return exp32(score - p.Max)
}

func (p *Partial) rescale(newMax float32) {
	f := exp32(p.Max - newMax) // 0 from an empty partial: exp(-Inf)
	p.Sum *= float64(f)
	for i := range p.Out {
		p.Out[i] *= f
	}
	p.Max = newMax
}

// Merge takes in the tokens of o, which must be disjoint from those of p.
func (p *Partial) Merge(o *Partial) {
	if o.Sum == 0 {
		return
	}
	if o.Max > p.Max {
		p.rescale(o.Max)
	}
	f := exp32(o.Max - p.Max)
	p.Sum += float64(f) * o.Sum
	Axpy(p.Out, f, o.Out)
}

// LSE returns the natural log of the summed weights; -Inf if there are none.
func (p *Partial) LSE() float32 { return float32(float64(p.Max) + math.Log(p.Sum)) }

// Output writes the attention output, the weighted mean of values [d]; zeros
// if there are no tokens.
func (p *Partial) Output(dst []float32) {
	f := float32(0)
	if p.Sum > 0 {
		f = float32(1 / p.Sum)
	}
	for i, v := range p.Out {
		dst[i] = v * f
	}
}

// FromOutput makes a partial of an attention output and its log-sum-exp, as a
// worker hands them over.
func FromOutput(out []float32, lse float32) Partial {
	p := Partial{Max: lse, Sum: 1, Out: append([]float32(nil), out...)}
	if math.IsInf(float64(lse), -1) {
		p.Sum = 0
		clear(p.Out)
	}
	return p
}

// Softcap returns cap*tanh(score/cap), or score if cap is 0 (Gemma 2 report, section 2).
func Softcap(score, cap float32) float32 {
	if cap == 0 {
		return score
	}
	return cap * float32(math.Tanh(float64(score/cap)))
}

// Dot returns the dot product of two vectors of equal length.
func Dot(a, b []float32) float32 { return kernels.Dot(a, b) }

// Axpy is y += a*x, of vectors of equal length.
func Axpy(y []float32, a float32, x []float32) { kernels.Axpy(y, a, x) }

func exp32(x float32) float32 { return float32(math.Exp(float64(x))) }
