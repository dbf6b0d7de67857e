package kernels

import (
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"testing"
)

func TestAddValues(t *testing.T) {
	others(t, func(t *testing.T) {
		shapes(t, func(t *testing.T, rng *rand.Rand, rows, n, d int) {
			if d%2 == 1 {
				return
			}
			stride := n + rng.IntN(3)
			w, scale := odd(rng, (rows-1)*stride+n), odd(rng, 2*n)
			high, low := make([][]byte, n), make([][]byte, n)
			for i := range high {
				high[i], low[i] = oddBytes(rng, d/2), oddBytes(rng, d/2)
				scale[2*i+1] = float32(-rng.IntN(256)) + .5
			}
			for name, low := range map[string][][]byte{"4 bits": nil, "8 bits": low} {
				got := odd(rng, rows*d)
				want := slices.Clone(got)
				AddValues(rowsOf(got, d), w, stride, scale, high, low, d)
				plain(func() { AddValues(rowsOf(want, d), w, stride, scale, high, low, d) })
				near(t, fmt.Sprintf("%d rows, %d tokens, d %d, %s", rows, n, d, name), got, want, math.Sqrt(float64(n))*1000)
			}
		})
	})
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
			for _, rows := range []int{1, 2, 3, 4, 5, 7, 8, 16, 17} {
				rng := rand.New(rand.NewPCG(uint64(groups), uint64(rows)))
				l, planes := leaf(rng, groups)
				q := KeyQuery{Words: make([]int16, groups*rows*LineTokens), Scale: odd(rng, 2*rows)}
				for i := range q.Words {
					q.Words[i] = int16(rng.IntN(65535) - 32767)
				}
				checkScores(t, rng, q, l, planes)
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
	q := KeyQuery{Words: slices.Repeat([]int16{math.MaxInt16}, mostGroups*LineTokens), Scale: []float32{1, 0}}
	for _, v := range Variants() {
		undo := Use(v)
		got := make([]float32, LineTokens)
		ScoreKeys(got, LineTokens, q, &l, ones)
		undo()
		if want := float32(mostGroups * LineTokens * 255 * math.MaxInt16); got[0] != want || got[15] != want {
			t.Errorf("%v: %v, not %v", v, got, want)
		}
	}
}
