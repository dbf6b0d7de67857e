package synth

import (
	"cmp"
	"fmt"
	"math"
	"slices"

	"gonum.org/v1/gonum/mat"

	"kvtier/attention"
	"kvtier/compress"
	"kvtier/tiers"
)

// Rows are what one KV head holds, and what its group asks at the last positions.
type Rows struct {
	D, Group int
	K, V     []float32 // [tokens][D]
	Q        []float32 // [steps][Group][D], scaled; the last one is asked at the last token
}

// Head returns what one KV head of a layer holds of the context, and what its group asks at the last so many positions.
func (m *Model) Head(layer, head, steps int) *Rows {
	r, d, b := &Rows{D: m.HeadDim, Group: m.Group}, m.HeadDim, compress.BF16.Size()
	for lo := 0; lo < m.Tokens; lo += BlockTokens {
		block := m.Block(lo / BlockTokens)
		k, v := make([]byte, BlockTokens*m.RowBytes()), make([]byte, BlockTokens*m.RowBytes())
		m.Rows(k, v, layer, lo, lo+BlockTokens, m.Hidden(block, layer))
		for t := range min(BlockTokens, m.Tokens-lo) {
			at, row := t*m.RowBytes()+head*d*b, make([]float32, d)
			compress.ToFloat32(row, k[at:at+d*b], compress.BF16)
			r.K = append(r.K, row...)
			compress.ToFloat32(row, v[at:at+d*b], compress.BF16)
			r.V = append(r.V, row...)
			if lo+t >= m.Tokens-steps {
				q := m.Query(block, t, layer)
				r.Q = append(r.Q, q[head*m.Group*d:(head+1)*m.Group*d]...)
			}
		}
	}
	return r
}

// Shape is what matters of a head to whoever selects: of one query head, but for what keys and values are like.
type Shape struct {
	Profile
	Body       float64    // share of the attention that all other tokens get
	Half, Most float64    // share of these tokens that get half, and .9, of that: medians
	Top        float64    // share of it that the strongest gets: median
	Spread     float64    // of their scores, in nats
	Again      [3]float64 // share of a step's strongest fiftieth that was so in the step before, in 16 and in 64 before
	// Of the KV head.
	Directions  float64 // in which keys vary: participation ratio of their covariance
	Channels    float64 // sd of the log of their channels' spreads
	Constant    float64 // the largest mean of a channel, in mean spreads
	Following   float64 // share of the values' variance that follows keys linearly
	CommonValue float64 // norm of the mean value, in spreads of values
}

const (
	lookSteps = 64 // steps that are looked at
	backSteps = 64 // steps before them
	fiftieth  = 50
)

// Measure measures every query head of a group. It takes at least 128 steps and 4,096 tokens.
func Measure(r *Rows) ([]Shape, error) {
	tokens, steps := len(r.K)/r.D, len(r.Q)/r.D/r.Group
	if tokens < 4096 || steps < lookSteps+backSteps {
		return nil, fmt.Errorf("%d tokens and %d queries: at least 4,096 and %d are needed", tokens, steps, lookSteps+backSteps)
	}
	of := r.keys(tokens)
	out := make([]Shape, r.Group)
	for g := range out {
		out[g] = of
		r.head(&out[g], g, tokens, steps)
	}
	return out, nil
}

// keys measures keys and values of the body.
func (r *Rows) keys(tokens int) (s Shape) {
	lo, hi, d := tiers.SinkTokens, tokens-newest, r.D
	n := float64(hi - lo)
	mean, meanV := make([]float64, d), make([]float64, d)
	for t := lo; t < hi; t++ {
		for i := range d {
			mean[i] += float64(r.K[t*d+i]) / n
			meanV[i] += float64(r.V[t*d+i]) / n
		}
	}
	k, v := mat.NewDense(hi-lo, d, nil), mat.NewDense(hi-lo, d, nil)
	for t := lo; t < hi; t++ {
		for i := range d {
			k.Set(t-lo, i, float64(r.K[t*d+i])-mean[i])
			v.Set(t-lo, i, float64(r.V[t*d+i])-meanV[i])
		}
	}
	var kk, kv mat.Dense
	kk.Mul(k.T(), k)
	kv.Mul(k.T(), v)
	var trace, square, sds, logs, logs2, big, live float64
	for i := range d {
		trace += kk.At(i, i)
		for j := range d {
			square += kk.At(i, j) * kk.At(i, j)
		}
		sd := math.Sqrt(kk.At(i, i) / n)
		sds += sd / float64(d)
		big = max(big, math.Abs(mean[i]))
		if sd > 1e-6 {
			live, logs, logs2 = live+1, logs+math.Log(sd), logs2+math.Log(sd)*math.Log(sd)
		}
	}
	s.Directions, s.Constant = trace*trace/square, big/sds
	s.Channels = math.Sqrt(max(0, logs2/live-logs/live*logs/live))
	var total, norm float64
	for _, x := range v.RawMatrix().Data {
		total += x * x
	}
	for _, x := range meanV {
		norm += x * x
	}
	s.CommonValue = math.Sqrt(norm / (total / n))
	for i := range d {
		kk.Set(i, i, kk.At(i, i)+1e-9*trace)
	}
	var map_ mat.Dense
	if map_.Solve(&kk, &kv) == nil {
		var explained float64
		for i := range d {
			for j := range d {
				explained += map_.At(i, j) * kv.At(i, j)
			}
		}
		s.Following = explained / total
	}
	return s
}

// head measures one query head.
func (r *Rows) head(s *Shape, g, tokens, steps int) {
	d := r.D
	var half, most, top, peak, spread []float64
	chosen := make([][]int, 0, lookSteps+backSteps)
	for at := steps - lookSteps - backSteps; at < steps; at++ {
		position := tokens - steps + at
		w := make([]float64, position+1)
		q := r.Q[(at*r.Group+g)*d:][:d]
		highest := math.Inf(-1)
		for t := range w {
			w[t] = float64(attention.Dot(q, r.K[t*d:(t+1)*d]))
			highest = max(highest, w[t])
		}
		end := position + 1 - newest
		mean, sd, largest := moments(w[tiers.SinkTokens:end])
		var sum float64
		for t := range w {
			w[t] = math.Exp(w[t] - highest)
			sum += w[t]
		}
		body := w[tiers.SinkTokens:end]
		mass := total(body)
		chosen = append(chosen, strongest(body, len(body)/fiftieth))
		if at < steps-lookSteps {
			continue
		}
		s.Sink += total(w[:tiers.SinkTokens]) / sum / lookSteps
		s.Recent += total(w[end:]) / sum / lookSteps
		s.Body += mass / sum / lookSteps
		spread, peak = append(spread, sd), append(peak, largest-mean)
		h, m, one := concentration(body, mass)
		half, most, top = append(half, h), append(most, m), append(top, one)
	}
	s.Spread, s.Peak, s.Half, s.Most, s.Top = average(spread), average(peak), median(half), median(most), median(top)
	for i, back := range []int{1, 16, 64} {
		s.Again[i] = again(chosen, back)
	}
}

func moments(x []float64) (mean, sd, largest float64) {
	largest = math.Inf(-1)
	for _, v := range x {
		mean += v / float64(len(x))
		largest = max(largest, v)
	}
	for _, v := range x {
		sd += (v - mean) * (v - mean) / float64(len(x))
	}
	return mean, math.Sqrt(sd), largest
}

// concentration returns which share of weights, the largest, make half and .9 of their sum, and the largest's own.
func concentration(w []float64, sum float64) (half, most, top float64) {
	order := slices.Clone(w)
	slices.SortFunc(order, func(a, b float64) int { return cmp.Compare(b, a) })
	var have float64
	for i, x := range order {
		if have += x; half == 0 && have >= .5*sum {
			half = float64(i+1) / float64(len(w))
		}
		if have >= .9*sum {
			most = float64(i+1) / float64(len(w))
			break
		}
	}
	return half, most, order[0] / sum
}

// strongest returns the indices of the n largest.
func strongest(w []float64, n int) []int {
	at := make([]int, len(w))
	for i := range at {
		at[i] = i
	}
	slices.SortFunc(at, func(a, b int) int { return cmp.Compare(w[b], w[a]) })
	return at[:n]
}

// again is the share of the last steps' choices that were made in so many steps before.
func again(chosen [][]int, back int) (share float64) {
	for at := backSteps; at < len(chosen); at++ {
		before := map[int]bool{}
		for _, c := range chosen[at-back : at] {
			for _, t := range c {
				before[t] = true
			}
		}
		n := 0.
		for _, t := range chosen[at] {
			if before[t] {
				n++
			}
		}
		share += n / float64(len(chosen[at])) / float64(len(chosen)-backSteps)
	}
	return share
}

func total(x []float64) (sum float64) {
	for _, v := range x {
		sum += v
	}
	return sum
}

func average(x []float64) float64 { return total(x) / float64(len(x)) }

func median(x []float64) float64 {
	slices.Sort(x)
	return x[len(x)/2]
}
