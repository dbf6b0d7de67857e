package synth

import (
	"bytes"
	"math"
	"testing"
)

func model(t *testing.T, g Geometry, seed uint64) *Model {
	t.Helper()
	m, err := New(g, seed)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// Rows of a range are those of the whole block, and equal seeds give equal ones.
func TestSame(t *testing.T) {
	g := Geometry{Tokens: 8192, Layers: 3, KVHeads: 2, Group: 2, HeadDim: 64}
	a, b, c := model(t, g, 5), model(t, g, 5), model(t, g, 6)
	rows := func(m *Model, lo, hi int) (k, v []byte) {
		block := m.Block(1)
		x := m.Hidden(block, 2)
		k, v = make([]byte, (hi-lo)*m.RowBytes()), make([]byte, (hi-lo)*m.RowBytes())
		m.Rows(k, v, 2, block.First+lo, block.First+hi, HiddenAt(x, lo))
		return k, v
	}
	k, v := rows(a, 0, BlockTokens)
	sameK, sameV := rows(b, 100, 140)
	if from, to := 100*a.RowBytes(), 140*a.RowBytes(); !bytes.Equal(k[from:to], sameK) || !bytes.Equal(v[from:to], sameV) {
		t.Error("a range's rows are not the block's")
	}
	if other, _ := rows(c, 0, BlockTokens); bytes.Equal(k, other) {
		t.Error("another seed gives the same rows")
	}
	q, same := a.Query(a.Block(1), 7, 2), b.Query(b.Block(1), 7, 2)
	for i := range q {
		if q[i] != same[i] {
			t.Fatal("equal seeds give other queries")
		}
	}
}

// Heads are about as they are meant to be: see docs/million.md for how they compare with real ones.
func TestShape(t *testing.T) {
	m := model(t, Geometry{Tokens: 8192, Layers: 4, KVHeads: 2, Group: 4, HeadDim: 128}, 3)
	var shapes []Shape
	var body, want, peak, wantPeak float64
	for head := range m.KVHeads {
		s, err := Measure(m.Head(2, head, 128))
		if err != nil {
			t.Fatal(err)
		}
		shapes = append(shapes, s...)
		for g := range s {
			p := m.heads[2*m.KVHeads+head].asks[g].profile
			body, want = body+s[g].Body, want+1-p.Sink-p.Recent
			peak, wantPeak = peak+s[g].Peak, wantPeak+p.Peak
		}
	}
	for i, s := range shapes {
		if math.Abs(s.Sink+s.Recent+s.Body-1) > 1e-6 {
			t.Errorf("head %d: shares %v, %v, %v", i, s.Sink, s.Recent, s.Body)
		}
		if s.Directions < 15 || s.Directions > 40 || s.Following < .25 || s.Following > .7 {
			t.Errorf("head %d: keys vary in %.1f directions, values follow by %.2f", i, s.Directions, s.Following)
		}
		if s.Again[0] < .25 || s.Again[2] < .9 || s.Again[1] < s.Again[0] {
			t.Errorf("head %d chooses again %v", i, s.Again)
		}
	}
	n := float64(len(shapes))
	if math.Abs(body-want)/n > .25 || math.Abs(peak-wantPeak)/n > 4 {
		t.Errorf("body %.2f, meant to be %.2f; peak %.1f, meant to be %.1f", body/n, want/n, peak/n, wantPeak/n)
	}
}

func TestRefuses(t *testing.T) {
	for _, g := range []Geometry{{}, {Tokens: 4096, Layers: 1, KVHeads: 1, Group: 17, HeadDim: 64}, {Tokens: 4096, Layers: 1, KVHeads: 1, Group: 1, HeadDim: 72},
		{Tokens: 100, Layers: 1, KVHeads: 1, Group: 1, HeadDim: 64}} {
		if _, err := New(g, 1); err == nil {
			t.Errorf("%+v is taken", g)
		}
	}
	if _, err := Measure(&Rows{D: 64, Group: 1}); err == nil {
		t.Error("nothing is measured")
	}
}
