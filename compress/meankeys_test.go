package compress

import (
	"errors"
	"math"
	"testing"

	"pgregory.net/rapid"

	"kvtier/attention/kernels"
)

// What is stored of mean keys is read within half a bin of 16, and scored and summed as it is read.
func TestMeanKeys(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		x, n, d := drawRows(t, 40)
		exp := KeyExp(x)
		b := AppendMeanKeys([]byte("before"), x, d, exp)[6:]
		var m MeanKeys
		if err := m.Parse(b, n, d, exp); err != nil || m.Len() != n {
			t.Fatalf("%d mean keys of %d: %v", m.Len(), n, err)
		}
		places := MeanKeyPlaces(n)
		rows := make([]float32, places*d)
		steps := NewKeySteps(d)
		if err := errors.Join(m.Rows(rows), m.ReadSteps(steps)); err != nil {
			t.Fatal(err)
		}
		for i, want := range x {
			w := float64(steps.Step[i%d])
			near(t, "mean key", float64(rows[i]), float64(want), 8*w, math.Abs(float64(want))+math.Abs(float64(steps.Lo[i%d])))
		}
		q := make([]float32, 2*d)
		for i := range q {
			q[i] = float32(i%7-3) / float32(math.Ldexp(1, exp+15))
		}
		scores := make([]float32, 2*places)
		if err := m.Scores(scores, places, q, kernels.KeyQuery{Words: make([]int16, 2*d), Scale: make([]float32, 4)}); err != nil {
			t.Fatal(err)
		}
		for r := range 2 {
			for i := range n {
				var want, size, most float64
				for j, y := range q[r*d : (r+1)*d] {
					want += float64(y) * float64(rows[i*d+j])
					most = max(most, math.Abs(float64(y*steps.Step[j])))
					size += math.Abs(float64(y)) * (math.Abs(float64(steps.Lo[j])) + 256*float64(steps.Step[j]))
				}
				near(t, "score", float64(scores[r*places+i]), want, float64(d)*64*most/32639, 30*size)
			}
		}
		out, codes, w := make([]float32, d), make([]float32, d), make([]float32, places)
		for i := range n {
			w[i] = float32(1+i%3) / float32(math.Ldexp(1, exp+15))
		}
		m.AddTo([][]float32{out}, [][]float32{codes}, [][]float32{make([]float32, d)}, w, places, steps)
		for j, got := range out {
			var want, size float64
			for i := range n {
				want += float64(w[i]) * float64(rows[i*d+j])
				size += float64(w[i]) * (math.Abs(float64(steps.Lo[j])) + 256*float64(steps.Step[j]))
			}
			near(t, "sum", float64(got), want, 0, 10*size)
		}
	})
}

func TestMeanKeysRefused(t *testing.T) {
	const n, d = 17, 32
	b := AppendMeanKeys(nil, make([]float32, n*d), d, 0)
	read := func(b []byte, n, d, exp int, use func(m *MeanKeys) error) error {
		var m MeanKeys
		if err := m.Parse(b, n, d, exp); err != nil {
			return err
		}
		return use(&m)
	}
	for what, use := range map[string]func(m *MeanKeys) error{
		"rows":  func(m *MeanKeys) error { return m.Rows(make([]float32, 32*d)) },
		"steps": func(m *MeanKeys) error { return m.ReadSteps(NewKeySteps(d)) },
		"scores": func(m *MeanKeys) error {
			return m.Scores(make([]float32, 32), 32, make([]float32, d), kernels.KeyQuery{Words: make([]int16, d), Scale: make([]float32, 2)})
		},
	} {
		if err := read(b, n, d, 0, use); err != nil {
			t.Errorf("%s: %v", what, err)
		}
		for name, err := range map[string]error{
			"too short":    read(b[1:], n, d, 0, use),
			"of others":    read(b, 16, d, 0, use),
			"dimension":    read(b, n, 24, 0, use),
			"no exponents": read(b, n, d, 200, use),
			"no steps":     read(make([]byte, len(b)), n, d, 0, use),
		} {
			if !errors.Is(err, ErrCorrupt) {
				t.Errorf("%s, %s: %v", what, name, err)
			}
		}
	}
}

// What stands for bins has about half of the variance that keys have; a scatter that is none is refused.
func TestStandIn(t *testing.T) {
	const d = 32
	importance, square := make([]float32, d), make([]float32, d)
	for j := range importance { // channel j deviates by j + 1 on average
		square[j] = 1 + float32(j%3)
		importance[j] = square[j] * float32((j+1)*(j+1))
	}
	o := FitKeyOrder(importance, square, -3)
	b := o.Append(nil)
	if o, err := ParseKeyOrder(b, d); err != nil {
		t.Fatal(err)
	} else {
		s := NewKeySteps(d)
		o.StandIn(s, -3)
		for g := range d / groupDims {
			var sum, squares float64
			for _, c := range o.Channels[g*groupDims:][:groupDims] {
				sum, squares = sum+float64(importance[c]), squares+float64(square[c])
			}
			for j := g * groupDims; j < (g+1)*groupDims; j++ {
				if got, want := float64(KeyNoise[0])*math.Pow(256*float64(s.Step[j]), 2), standInPart*standInPart*sum/squares; math.Abs(got-want) > .003*want || s.Lo[j] != 0 {
					t.Fatalf("place %d: a variance of %v, not %v", j, got, want)
				}
			}
		}
	}
	for _, bad := range []byte{0x7c, 0x80} { // infinite, negative
		b[d+d/4+1] = bad
		if _, err := ParseKeyOrder(b, d); !errors.Is(err, ErrCorrupt) {
			t.Errorf("a scatter of %x00: %v", bad, err)
		}
	}
}
