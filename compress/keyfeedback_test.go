package compress

import (
	"math"
	"math/rand/v2"
	"testing"
)

// queryMoment is E[q q'] of queries of d channels that point in a few directions more than in others.
func queryMoment(rng *rand.Rand, d int) []float32 {
	m := make([]float32, d*d)
	for range 8 {
		q := make([]float64, d)
		for i := range q {
			q[i] = rng.NormFloat64()
		}
		for i := range d {
			for j := range d {
				m[i*d+j] += float32(q[i] * q[j])
			}
		}
	}
	return m
}

// Feedback is one factor of the moment: what an error adds to scores is a sum of squares, each of
// which the rounding of one channel decides.
func TestKeyFeedbackIsAFactor(t *testing.T) {
	for _, d := range []int{16, 48, 128} {
		rng := rand.New(rand.NewPCG(3, uint64(d)))
		moment, o := queryMoment(rng, d), anyOrder(d)
		rng.Shuffle(d, func(i, j int) { o.Channels[i], o.Channels[j] = o.Channels[j], o.Channels[i] })
		f := FitKeyFeedback(moment, o, 0)
		// M' D M = moment + floor, M being the transpose of f with ones on its diagonal: solve for D from the last channel on, and compare.
		m := func(j, i int) float64 {
			switch {
			case i == j:
				return 1
			case i < j:
				return float64(f[i*d+j])
			}
			return 0
		}
		var floor float64
		for i := range d {
			floor += feedbackFloor * float64(moment[i*d+i]) / float64(d)
		}
		want := func(i, j int) float64 {
			w := float64(moment[int(o.Channels[i])*d+int(o.Channels[j])])
			if i == j {
				w += floor
			}
			return w
		}
		diagonal := make([]float64, d)
		for j := d - 1; j >= 0; j-- {
			diagonal[j] = want(j, j)
			for k := j + 1; k < d; k++ {
				diagonal[j] -= m(k, j) * m(k, j) * diagonal[k]
			}
			if !(diagonal[j] > 0) {
				t.Fatalf("d %d: channel %d has the weight %v", d, j, diagonal[j])
			}
		}
		for i := range d {
			for j := range d {
				var got float64
				for k := range d {
					got += m(k, i) * diagonal[k] * m(k, j)
				}
				if math.Abs(got-want(i, j)) > 1e-4*floor*float64(d) {
					t.Fatalf("d %d: element %d, %d is %v, not %v", d, i, j, got, want(i, j))
				}
			}
		}
	}
}

// With feedback scores err less: that is what it is for.
func TestKeyFeedbackLowersScoreNoise(t *testing.T) {
	for _, d := range []int{16, 64, 128} {
		rng := rand.New(rand.NewPCG(4, uint64(d)))
		const n = 200
		x := make([]float32, n*d)
		for i := range x {
			x[i] = float32(rng.NormFloat64() * float64(1+i%d%7))
		}
		moment, o := queryMoment(rng, d), anyOrder(d)
		for i := range o.Channels {
			o.Channels[i] = uint8(i)
		}
		s := FitKeySteps(x, d, KeyExp(x))
		noise := func(f KeyFeedback) (sum float64) {
			codes, e := make([]uint8, n*d), make([]float64, d)
			KeyCodes(codes, x, d, s, f)
			for at := 0; at < n*d; at += d {
				for j := range e {
					e[j] = float64(s.Lo[j]+(float32(codes[at+j])+.5)*s.Step[j]) - float64(x[at+j])
				}
				for i := range e {
					for j := range e {
						sum += e[i] * float64(moment[i*d+j]) * e[j]
					}
				}
			}
			return sum
		}
		without, with := noise(nil), noise(FitKeyFeedback(moment, o, 0))
		if !(with < .6*without) {
			t.Errorf("d %d: the noise of scores is %v with feedback and %v without", d, with, without)
		}
	}
}

func TestNoKeyFeedback(t *testing.T) {
	o := anyOrder(16)
	if f := FitKeyFeedback(make([]float32, 256), o, 0); f != nil {
		t.Error("feedback of no queries")
	}
	if f := FitKeyFeedback(queryMoment(rand.New(rand.NewPCG(1, 1)), 16), o, maxFeedbackExp+1); f != nil {
		t.Error("feedback of keys whose errors are not finite")
	}
}
