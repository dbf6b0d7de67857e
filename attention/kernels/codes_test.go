package kernels

import (
	"encoding/binary"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"testing"
)

// valueScale returns what is stored of a step, rounded down, and a zero point.
func valueScale(step float32, zero byte) []byte {
	b := binary.LittleEndian.AppendUint16(nil, uint16(math.Float32bits(step)>>15))
	return append(b, zero)
}

func TestValueBatch(t *testing.T) {
	others(t, func(t *testing.T) {
		shapes(t, func(t *testing.T, rng *rand.Rand, rows, n, d int) {
			if d%2 == 1 {
				return
			}
			if n == 67 { // more than tiles hold at once
				n = []int{67, 127, 128, 190, ValueTokens}[rng.IntN(5)]
			}
			stride := n + rng.IntN(3)
			w, scales := odd(rng, (rows-1)*stride+n), []byte(nil)
			for range n {
				scales = append(scales, valueScale(rng.Float32(), byte(rng.Uint32()))...)
			}
			high, low := oddBytes(rng, n*d/2), oddBytes(rng, n*d/2)
			for name, low := range map[string][]byte{"4 bits": nil, "8 bits": low} {
				var b ValueBatch
				b.AppendRun(slices.Clip(scales), high, low, n, d, 0)
				got := odd(rng, rows*d)
				want, exact := slices.Clone(got), slices.Clone(got)
				b.AddTo(rowsOf(got, d), w, stride)
				plain(func() { b.AddTo(rowsOf(want, d), w, stride) })
				addUnrounded(rowsOf(exact, d), w, stride, scales, high, low, n)
				what := fmt.Sprintf("%d rows, %d tokens, d %d, %s", rows, n, d, name)
				near(t, what, got, want, math.Sqrt(float64(n))*1000)
				near(t, what+", weights not rounded", got, exact, math.Sqrt(float64(n))*20000)
			}
		})
	})
}

// addUnrounded is a ValueBatch's AddTo in float32, value by value.
func addUnrounded(out [][]float32, w []float32, stride int, scales, high, low []byte, n int) {
	for r, to := range out {
		half := len(to) / 2
		for t := range n {
			step, offset := ParseValueScale(scales[t*ValueScale:], low != nil)
			for j, c := range high[t*half:][:half] {
				x, y := c<<4, c&0xf0
				if low != nil {
					x |= low[t*half+j] & 15
					y |= low[t*half+j] >> 4
				}
				to[j] += w[r*stride+t] * ((float32(x) + offset) * step)
				to[half+j] += w[r*stride+t] * ((float32(y) + offset) * step)
			}
		}
	}
}

// Tokens of all magnitudes, from next to nothing to what is stored at most.
func TestValueMagnitudes(t *testing.T) {
	const n, d = 20, 32
	rng := rand.New(rand.NewPCG(5, 6))
	for _, size := range []float32{0, 0x1p-126, 0x1p-100, 1, 0x1p100, 0x1p112} {
		scales, high := []byte(nil), oddBytes(rng, n*d/2)
		for range n {
			scales = append(scales, valueScale(size*(1+rng.Float32()), 100)...)
		}
		w := make([]float32, n)
		for i := range w {
			w[i] = rng.Float32()
		}
		want := make([]float32, d)
		addUnrounded(rowsOf(want, d), w, n, scales, high, nil, n)
		for _, v := range Variants() {
			undo := Use(v)
			got := make([]float32, d)
			var b ValueBatch
			b.AppendRun(scales, high, nil, n, d, 0)
			b.AddTo(rowsOf(got, d), w, n)
			undo()
			for i := range got {
				if !(math.Abs(float64(got[i]-want[i])) <= math.Max(float64(size)*.02, n*128*leastWeight/mostWeight)) {
					t.Fatalf("%v, steps of %v: channel %d is %v, not %v", v, size, i, got[i], want[i])
				}
			}
		}
	}
}

// A weight that is no number, or infinite, shows in every output.
func TestValueWeightsNotFinite(t *testing.T) {
	const n, d = 18, 48
	for _, v := range Variants() {
		for _, bad := range []float32{float32(math.NaN()), float32(math.Inf(1))} {
			undo := Use(v)
			w, out := make([]float32, n), make([]float32, d)
			w[17] = bad
			var b ValueBatch
			b.AppendRun(slices.Repeat(valueScale(1, 7), n), make([]byte, n*d/2), nil, n, d, 0)
			b.AddTo(rowsOf(out, d), w, n)
			undo()
			for i, x := range out {
				if x == x {
					t.Fatalf("%v, weight %v: channel %d is %v", v, bad, i, x)
				}
			}
		}
	}
}

// So does an element of a query.
func TestWordsNotFinite(t *testing.T) {
	for _, v := range Variants() {
		for _, d := range []int{16, 48, 128} {
			for _, bad := range []float32{float32(math.NaN()), float32(math.Inf(-1))} {
				undo := Use(v)
				q, got := make([]float32, 2*d), make([]float32, 10)
				q[d+3], q[0] = bad, 1
				DotsInt8(got, 5, q, slices.Repeat([]byte{2}, 5*d), d)
				undo()
				for i, x := range got {
					if finite := math.Abs(float64(x)) < math.Inf(1); finite != (i < 5) {
						t.Fatalf("%v, d %d, %v in the second row: scores %v", v, d, bad, got)
					}
				}
			}
		}
	}
}

// leaf makes random lines for some groups, over a few planes and in no order.
func leaf(rng *rand.Rand, groups int) (l Layout, planes [][]byte) {
	var levels []uint8
	var lines []LinePlace
	planes = make([][]byte, 1+rng.IntN(mostPlanes))
	for range groups {
		n := 1 + rng.IntN(4)
		levels = append(levels, uint8(n))
		for range n {
			p := rng.IntN(len(planes))
			lines = append(lines, LinePlace{uint16(p), uint16(len(planes[p]))})
			planes[p] = append(planes[p], oddBytes(rng, Line+rng.IntN(3))...)
		}
	}
	for p := range planes {
		planes[p] = slices.Clip(planes[p])
	}
	return NewLayout(levels, lines), planes
}

func TestKeys(t *testing.T) {
	others(t, func(t *testing.T) {
		for groups := 1; groups <= mostGroups; groups++ {
			for _, rows := range []int{1, 2, 3, 4, 5, 7, 8, 9, 16, 17} {
				rng := rand.New(rand.NewPCG(uint64(groups), uint64(rows)))
				l, planes := leaf(rng, groups)
				q := KeyQuery{Words: make([]int16, groups*rows*LineTokens), Scale: odd(rng, 2*rows)}
				for i := range q.Words {
					q.Words[i] = int16(rng.IntN(2*mostWord+1) - mostWord)
				}
				checkScores(t, rng, q, l, planes)
				checkLeaves(t, rng, q, groups)
				d := groups*LineTokens + 16*rng.IntN(2)
				checkUnpack(t, rng, l, planes, d)
			}
		}
	})
}

// checkScores and checkUnpack want the same bits as the Go loop's.
func checkScores(t *testing.T, rng *rand.Rand, q KeyQuery, l Layout, planes [][]byte) {
	t.Helper()
	rows, stride := len(q.Scale)/2, LineTokens+rng.IntN(5)
	got := odd(rng, (rows-1)*stride+LineTokens)
	want := slices.Clone(got)
	ScoreKeys(got, stride, q, &l, planes)
	plain(func() { ScoreKeys(want, stride, q, &l, planes) })
	if !slices.Equal(got, want) {
		t.Fatalf("%d rows, levels %v:\n%v, not\n%v", rows, l.Levels(), got, want)
	}
}

// checkLeaves compares several leaves' scores at once with one after the other's.
func checkLeaves(t *testing.T, rng *rand.Rand, q KeyQuery, groups int) {
	t.Helper()
	l, planes := leaf(rng, groups)
	leaves, steps := 1+rng.IntN(20), make([]int, len(planes))
	for p, b := range planes { // some planes' leaves overlap, or are all the same
		steps[p] = rng.IntN(len(b) + 5)
		planes[p] = slices.Clip(append(b, oddBytes(rng, (leaves-1)*steps[p])...))
	}
	rows, stride := len(q.Scale)/2, LineTokens*leaves+rng.IntN(5)
	leafStride := LineTokens
	if rng.IntN(2) == 0 {
		leafStride, stride = rows*LineTokens+rng.IntN(3), LineTokens
	}
	got := odd(rng, (leaves-1)*leafStride+(rows-1)*stride+LineTokens)
	want := slices.Clone(got)
	ScoreLeaves(got, leafStride, stride, q, &l, planes, steps, leaves, 0)
	plain(func() {
		for i := range leaves {
			var leaf [][]byte
			for p, b := range planes {
				leaf = append(leaf, b[i*steps[p]:])
			}
			ScoreKeys(want[i*leafStride:], stride, q, &l, leaf)
		}
	})
	if !slices.Equal(got, want) {
		t.Fatalf("%d leaves, %d rows, levels %v:\n%v, not\n%v", leaves, rows, l.Levels(), got, want)
	}
}

func checkUnpack(t *testing.T, rng *rand.Rand, l Layout, planes [][]byte, d int) {
	t.Helper()
	lo, step := odd(rng, d), odd(rng, d)
	got := odd(rng, LineTokens*d)
	want := slices.Clone(got) // channels that are not known are left alone
	UnpackKeys(got, d, &l, planes, lo, step)
	plain(func() { UnpackKeys(want, d, &l, planes, lo, step) })
	if !slices.Equal(got, want) {
		t.Fatalf("levels %v, d %d: unpacked keys differ", l.Levels(), d)
	}
}

// The largest sums that there can be: 256 channels of code 255.
func TestScoresDoNotOverflow(t *testing.T) {
	l := NewLayout(slices.Repeat([]uint8{4}, mostGroups), make([]LinePlace, mostLines))
	ones := [][]byte{slices.Repeat([]byte{0xff}, Line)}
	q := KeyQuery{Words: slices.Repeat([]int16{mostWord}, mostGroups*LineTokens), Scale: []float32{1, 0}}
	for _, v := range Variants() {
		undo := Use(v)
		got := make([]float32, LineTokens)
		ScoreKeys(got, LineTokens, q, &l, ones)
		undo()
		if want := float32(mostGroups * LineTokens * 255 * mostWord); got[0] != want || got[15] != want {
			t.Errorf("%v: %v, not %v", v, got, want)
		}
	}
}
