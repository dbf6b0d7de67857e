package compress

import (
	"errors"
	"fmt"
	"math"
	"slices"
	"testing"

	"kvtier/attention/kernels"
)

// Scores from codes are products with unpacked keys, up to the 16 bits of the query.
func TestScoreKeys(t *testing.T) {
	for _, d := range []int{16, 48, 64, 80, 128, 256} {
		x := normal(int64(d), 256, d)
		s := FitKeySteps(x, d, KeyExp(x))
		codes := make([]uint8, 16*d)
		KeyCodes(codes, x[:16*d], d, s, nil)
		order := anyOrder(d)
		packed := PackKeyPlanes(codes, 16, d, order.Lines)
		for rows := 1; rows <= 5; rows++ {
			q := normal(9, rows, d)
			for planes := 1; planes <= NumKeyPlanes; planes++ {
				for _, v := range kernels.Variants() {
					undo := kernels.Use(v)
					checkScore(t, fmt.Sprintf("d %d, %d rows, %d planes, %v", d, rows, planes, v), q, d, order, s, packed[:planes])
					undo()
				}
			}
		}
	}
}

func fold(l *KeyLayout, q []float32, s KeySteps) kernels.KeyQuery {
	rows := len(q) / l.d
	out := kernels.KeyQuery{Words: make([]int16, rows*l.Known()), Scale: make([]float32, 2*rows)}
	l.Fold(out, q, s)
	return out
}

// FoldStored is Parse and Fold, and refuses what Parse does.
func TestFoldStored(t *testing.T) {
	for _, d := range []int{16, 64, 128, 256} {
		x := normal(int64(d), 256, d)
		exp := KeyExp(x)
		s := FitKeySteps(x, d, exp)
		b, q := s.Append(nil, exp), normal(9, 3, d)
		for planes := 1; planes <= NumKeyPlanes; planes++ {
			l := NewKeyLayout(d, anyOrder(d).Lines, planes)
			want := fold(&l, q, s)
			got := kernels.KeyQuery{Words: make([]int16, len(want.Words)), Scale: make([]float32, len(want.Scale))}
			if err := l.FoldStored(got, q, b[:KeyStepsBytes(l.Known())], exp); err != nil || !slices.Equal(got.Words, want.Words) || !slices.Equal(got.Scale, want.Scale) {
				t.Fatalf("d %d, %d planes: %v, %v, not %v", d, planes, err, got, want)
			}
			for name, err := range map[string]error{
				"short":        l.FoldStored(got, q, b[:KeyStepsBytes(l.Known())-1], exp),
				"exponent":     l.FoldStored(got, q, b, maxKeyExp+1),
				"out of range": l.FoldStored(got, q, slices.Repeat([]byte{0xff}, len(b)), exp),
			} {
				if !errors.Is(err, ErrCorrupt) {
					t.Errorf("d %d, %d planes, %s: %v", d, planes, name, err)
				}
			}
		}
	}
}

func checkScore(t *testing.T, what string, q []float32, d int, order KeyOrder, s KeySteps, planes [][]byte) {
	t.Helper()
	l := NewKeyLayout(d, order.Lines, len(planes))
	keys, scores := make([]float32, 16*d), make([]float32, len(q)/d*16)
	known := UnpackKeys(keys, d, order.Lines, s, planes...)
	l.Score(scores, 16, fold(&l, q, s), planes)
	for r := 0; r < len(q)/d; r++ {
		var most float64 // what one channel can change a score by
		for j, x := range q[r*d:][:known] {
			most = max(most, 256*math.Abs(float64(x*s.Step[j])))
		}
		for token := range 16 {
			var want float64
			for j := range known {
				want += float64(q[r*d+j]) * float64(keys[token*d+j])
			}
			if e := math.Abs(float64(scores[r*16+token]) - want); !(e <= 1e-4*most) {
				t.Fatalf("%s: row %d, token %d: %v, not %v; off by %.2g of what a channel can do", what, r, token, scores[r*16+token], want, e/most)
			}
		}
	}
}

// What is no number, or not finite, does not become one that looks fine.
func TestFoldNotFinite(t *testing.T) {
	const d = 16
	x := normal(1, 16, d)
	s := FitKeySteps(x, d, KeyExp(x))
	planes := PackKeyPlanes(make([]uint8, 16*d), 16, d, anyOrder(d).Lines)
	l := NewKeyLayout(d, anyOrder(d).Lines, NumKeyPlanes)
	for _, bad := range []float32{float32(math.NaN()), float32(math.Inf(1))} {
		q, scores := make([]float32, d), make([]float32, 16)
		q[3] = bad
		l.Score(scores, 16, fold(&l, q, s), planes[:])
		if finite(scores[0]) {
			t.Errorf("query %v: score %v", bad, scores[0])
		}
	}
	scores := make([]float32, 16)
	if l.Score(scores, 16, fold(&l, make([]float32, d), s), planes[:]); scores[0] != 0 {
		t.Errorf("query 0: score %v", scores[0])
	}
}

// Filling a batch is appending token by token.
func TestAppendRun(t *testing.T) {
	const n, d = kernels.ValueTokens, 48
	scales, hi, lo := PackValues(normal(5, n, d), n, d)
	row := ValueRowBytes(d)
	for _, low := range [][]byte{nil, lo} {
		var appended, filled kernels.ValueBatch
		for i := range n {
			var l []byte
			if low != nil {
				l = low[i*row:][:row]
			}
			appended.Append(scales[3*i:][:3], hi[i*row:][:row], l)
		}
		for at := 0; at < n; at += n / 4 {
			var l []byte
			if low != nil {
				l = low[at*row:]
			}
			filled.AppendRun(scales[3*at:], hi[at*row:], l, n/4, d, 0)
		}
		one, other, w := [][]float32{make([]float32, d)}, [][]float32{make([]float32, d)}, normal(3, 1, n)
		appended.AddTo(one, w, n)
		filled.AddTo(other, w, n)
		if !slices.Equal(one[0], other[0]) {
			t.Errorf("low codes %v: batches differ", low != nil)
		}
		if filled.Append(scales, hi, low) || filled.AppendRun(scales, hi, low, 1, d, 0) {
			t.Error("a full batch took in a token")
		}
	}
}

// Batches of values are sums of unpacked values.
func TestValueBatch(t *testing.T) {
	for _, d := range []int{16, 64, 80, 256} {
		const n, rows = 130, 3
		x, w := normal(int64(d), n, d), normal(2, rows, n)
		scales, hi, lo := PackValues(x, n, d)
		row := ValueRowBytes(d)
		got, want, value := make([][]float32, rows), make([][]float32, rows), make([]float32, d)
		for r := range rows {
			got[r], want[r] = make([]float32, d), make([]float32, d)
		}
		var size float64 // of what is summed up
		var b kernels.ValueBatch
		from := 0
		flush := func(to int) {
			b.AddTo(got, w[from:], n)
			b.Reset()
			from = to
		}
		for i := range n {
			scale, high, low := scales[3*i:][:3], hi[i*row:][:row], lo[i*row:][:row]
			if i >= 40 && i < 56 {
				low = nil // batches of both kinds
			}
			UnpackValue(value, scale, high, low, d)
			for r := range rows {
				for j, v := range value {
					want[r][j] += w[r*n+i] * v
					size = max(size, math.Abs(float64(w[r*n+i]*v)))
				}
			}
			if !b.Append(scale, high, low) {
				flush(i)
				b.Append(scale, high, low)
			}
		}
		if b.Len() != n-from {
			t.Errorf("%d tokens in the last batch, not %d", b.Len(), n-from)
		}
		flush(n)
		for r := range rows {
			for j := range want[r] {
				if e := math.Abs(float64(got[r][j] - want[r][j])); !(e <= 4e-4*size) {
					t.Fatalf("d %d: %v, not %v", d, got[r][j], want[r][j])
				}
			}
		}
	}
}
