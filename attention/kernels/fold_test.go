package kernels

import (
	"encoding/binary"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"testing"
)

// Words have the same bits whatever kernel runs; offsets, which are sums, up to rounding.
func TestFold(t *testing.T) {
	inf := float32(math.Inf(1))
	others(t, func(t *testing.T) {
		for groups := 1; groups <= mostGroups; groups++ {
			for _, rows := range []int{1, 2, 3, 4, 7, 17} {
				rng := rand.New(rand.NewPCG(uint64(groups), uint64(rows)))
				l, _ := leaf(rng, groups)
				channels := groups * LineTokens
				d := channels + LineTokens*rng.IntN(3)
				q, lo, step := odd(rng, rows*d), odd(rng, d), magnitudes(odd(rng, d))
				for i, special := range []float32{inf, float32(math.NaN()), 1e38, -1e-38, 0} {
					if rng.IntN(4) == 0 {
						q[(i*37)%len(q)] = special
					}
				}
				if rng.IntN(8) == 0 {
					clear(q[:d])
				}
				query := func() KeyQuery { return KeyQuery{make([]int16, rows*channels), odd(rng, 2*rows)} }
				got, want := query(), query()
				l.Fold(got, q, d, lo, step)
				plain(func() { l.Fold(want, q, d, lo, step) })
				what := fmt.Sprintf("%d groups, %d rows", groups, rows)
				for r := range rows {
					unit, offset := 2*r, 2*r+1
					for g := range groups {
						at := (g*rows + r) * LineTokens
						a, b := got.Words[at:at+LineTokens], want.Words[at:at+LineTokens]
						if !slices.Equal(a, b) && finite(want.Scale[offset]) { // else scores are no numbers
							t.Fatalf("%s: words %v, not %v", what, a, b)
						}
					}
					if a, b := got.Scale[unit], want.Scale[unit]; a != b && (a == a || b == b) {
						t.Fatalf("%s: unit %v, not %v", what, a, b)
					}
					size := 1.
					for c, x := range q[r*d:][:channels] {
						size += math.Abs(float64(x)) * (math.Abs(float64(lo[c])) + 300*float64(step[c]))
					}
					if size < math.MaxFloat32/1000 {
						near(t, what+", offset", got.Scale[offset:offset+1], want.Scale[offset:offset+1], size)
					}
				}
			}
		}
	})
}

// A folded query scores what the unpacked keys do.
func TestFoldedScores(t *testing.T) {
	for _, v := range Variants() {
		defer Use(v)()
		rng := rand.New(rand.NewPCG(31, 32))
		for range 50 {
			groups, rows := 1+rng.IntN(mostGroups), 1+rng.IntN(5)
			l, planes := leaf(rng, groups)
			d := groups * LineTokens
			q, lo, step := odd(rng, rows*d), odd(rng, d), magnitudes(odd(rng, d))
			query := KeyQuery{make([]int16, rows*d), make([]float32, 2*rows)}
			l.Fold(query, q, d, lo, step)
			got, want, keys := make([]float32, rows*LineTokens), make([]float32, rows*LineTokens), make([]float32, LineTokens*d)
			ScoreKeys(got, LineTokens, query, &l, planes)
			UnpackKeys(keys, d, &l, planes, lo, step)
			Dots(want, LineTokens, q, keys, d)
			for r := range rows {
				most := 1.
				for c, x := range q[r*d : (r+1)*d] {
					most = max(most, 128*math.Abs(float64(x*step[c])))
				}
				for i := range LineTokens {
					if e := math.Abs(float64(got[r*LineTokens+i] - want[r*LineTokens+i])); e > 2e-4*most*math.Sqrt(float64(groups)) {
						t.Fatalf("%v: %d groups: score %v, not %v", v, groups, got[r*LineTokens+i], want[r*LineTokens+i])
					}
				}
			}
		}
	}
}

// storedBins returns bins that are in order, as Bins reads them, with lower ends and sizes that no exponent but the least makes too large or small.
func storedBins(rng *rand.Rand, d, exp int) []byte {
	src := oddBytes(rng, 4*d)
	for i := range d {
		putBin(src, i, false, uint16(rng.Uint32())&^0x4000)      // below 2
		putBin(src, i, true, uint16(1+rng.IntN(0x3bff))&^0x8000) // positive, below 1
		if exp == -110 {                                         // steps below 2^-126 are refused
			putBin(src, i, true, 0x2c00)
		}
	}
	return src
}

// binAt returns where channel i's lower end or size lies.
func binAt(i int, size bool) int {
	at := i/16*64 + i%16*2
	if size {
		at += 32
	}
	return at
}

func putBin(b []byte, i int, size bool, h uint16) {
	binary.LittleEndian.PutUint16(b[binAt(i, size):], h)
}

// spoilBin puts a channel's bins out of order.
func spoilBin(rng *rand.Rand, b []byte, i int) {
	switch rng.IntN(4) {
	case 0:
		putBin(b, i, false, 0xfc00) // a lower end of -Inf
	case 1:
		putBin(b, i, false, 0x7e01) // that is no number
	case 2:
		putBin(b, i, true, 0) // an empty bin
	case 3:
		putBin(b, i, true, 0x8400) // a negative one
	}
}

// Bins are read bit for bit, and those out of order found wherever they are.
func TestBins(t *testing.T) {
	for _, v := range Variants() {
		undo := Use(v)
		rng := rand.New(rand.NewPCG(33, 34))
		for _, d := range dims {
			for _, exp := range []int{0, -110, 113, 5} {
				unit := float32(math.Ldexp(1, exp))
				src := storedBins(rng, d, exp)
				lo, step := odd(rng, d), odd(rng, d)
				if !Bins(lo, step, src, unit) {
					t.Fatalf("%v: d %d, exponent %d: refused", v, d, exp)
				}
				for i := range d {
					for j, got := range []float32{lo[i], step[i]} {
						h := binary.LittleEndian.Uint16(src[binAt(i, j == 1):])
						e, m, sign := int(h>>10&31), float64(h&1023), 1-2*float64(h>>15)
						want := sign * math.Ldexp(m, exp-24)
						if e > 0 {
							want = sign * math.Ldexp(1024+m, exp+e-25)
						}
						if float64(got) != want {
							t.Fatalf("%v: %#x in units of 2^%d is %v, not %v", v, h, exp, got, want)
						}
					}
				}
				at := rng.IntN(d)
				if spoilBin(rng, src, at); Bins(lo, step, src, unit) {
					t.Fatalf("%v: d %d: bad channel %d is taken", v, d, at)
				}
			}
		}
		src := make([]byte, 4*16)
		for i := range 16 {
			putBin(src, i, true, 0x7bff) // 2^16 bins of 2^113: the last one's end is not finite
		}
		if Bins(make([]float32, 16), make([]float32, 16), src, 0x1p113) {
			t.Errorf("%v: an upper end that is not finite is taken", v)
		}
		undo()
	}
}

// FoldBins is Bins and then Fold, bit for bit.
func TestFoldBins(t *testing.T) {
	for _, v := range Variants() {
		undo := Use(v)
		for groups := range mostGroups + 1 {
			for _, rows := range []int{0, 1, 2, 3, 4, 5, 8, 17} {
				checkFoldBins(t, rand.New(rand.NewPCG(uint64(groups), uint64(rows))), groups, rows)
			}
		}
		undo()
	}
}

func checkFoldBins(t *testing.T, rng *rand.Rand, groups, rows int) {
	t.Helper()
	l := NewLayout(nil, nil)
	if groups > 0 {
		l, _ = leaf(rng, groups)
	}
	channels, exp := groups*LineTokens, []int{0, -110, 113, 5}[rng.IntN(4)]
	d := channels + LineTokens*(1+rng.IntN(3))
	unit, src := float32(math.Ldexp(1, exp)), storedBins(rng, channels, exp)
	q, lo, step := odd(rng, rows*d), make([]float32, channels), make([]float32, channels)
	for range rng.IntN(3) * min(rows, 1) {
		q[rng.IntN(len(q))] = []float32{float32(math.Inf(1)), float32(math.NaN()), 1e38, 0}[rng.IntN(4)]
	}
	query := func() KeyQuery {
		q := KeyQuery{make([]int16, rows*channels+1), odd(rng, 2*rows+1)} // with a guard
		q.Words[rows*channels], q.Scale[2*rows] = 77, 77
		return q
	}
	got, want := query(), query()
	if !l.FoldBins(got, q, d, src, unit) || !Bins(lo, step, src, unit) {
		t.Fatalf("%d groups, %d rows, exponent %d: refused", groups, rows, exp)
	}
	l.Fold(want, q, d, lo, step)
	for i, x := range want.Scale {
		if y := got.Scale[i]; x != y && (x == x || y == y) {
			t.Fatalf("%d groups, %d rows: scale %v, not %v", groups, rows, y, x)
		}
	}
	if !slices.Equal(got.Words, want.Words) {
		t.Fatalf("%d groups, %d rows: words %v, not %v", groups, rows, got.Words, want.Words)
	}
	if channels == 0 {
		return
	}
	if spoilBin(rng, src, rng.IntN(channels)); l.FoldBins(got, q, d, src, unit) {
		t.Fatalf("%d groups, %d rows: a bad channel is taken", groups, rows)
	}
}

func TestBinSquares(t *testing.T) {
	others(t, func(t *testing.T) {
		for _, d := range dims {
			for rows := range 6 {
				rng := rand.New(rand.NewPCG(uint64(d), uint64(rows)))
				q, step := odd(rng, rows*d), odd(rng, d)
				got, want := odd(rng, rows*d/16), make([]float32, rows*d/16)
				BinSquares(got, q, step)
				plain(func() { BinSquares(want, q, step) })
				near(t, fmt.Sprintf("d %d, %d rows", d, rows), got, want, 1<<22)
			}
		}
	})
}

func TestSquaresInt8(t *testing.T) {
	for _, v := range Variants() {
		defer Use(v)()
		shapes(t, func(t *testing.T, rng *rand.Rand, _, n, d int) {
			c, got := oddBytes(rng, n*d), odd(rng, n)
			SquaresInt8(got, c, d)
			for i := range n {
				want := 0.
				for _, x := range c[i*d : (i+1)*d] {
					want += float64(int8(x)) * float64(int8(x))
				}
				if float64(got[i]) != want {
					t.Fatalf("%v: d %d: %v, not %v", v, d, got[i], want)
				}
			}
		})
	}
}

// Weighted sums of codes, brought into their bins, are those of the unpacked keys.
func TestSumsOfCodes(t *testing.T) {
	noise := [mostLevels + 1]float32{5, 4, 3, 2, 1}
	for _, v := range Variants() {
		defer Use(v)()
		for groups := 1; groups <= mostGroups; groups++ {
			for _, rows := range []int{1, 2, 3, 4, 5, 9} {
				rng := rand.New(rand.NewPCG(uint64(groups), uint64(rows)))
				l, planes := leaf(rng, groups)
				known := groups * LineTokens
				d := known + LineTokens*rng.IntN(3)
				levels := append(slices.Clone(l.Levels()), make([]uint8, d/LineTokens-groups)...)
				lo, step, keys, mass := odd(rng, d), magnitudes(odd(rng, d)), make([]float32, LineTokens*d), make([]float32, rows)
				stride := LineTokens + rng.IntN(3)
				w, codes := odd(rng, (rows-1)*stride+LineTokens), make([]float32, rows*d)
				for r := range rows {
					for _, x := range w[r*stride:][:LineTokens] {
						mass[r] += x
					}
				}
				SumCodes(rowsOf(codes, d), w, stride, &l, planes)
				got, want, spread := odd(rng, rows*d), make([]float32, rows*d), odd(rng, rows*d)
				wantSpread := slices.Clone(spread)
				copy(want, got)
				AddBins(rowsOf(got, d), rowsOf(spread, d), rowsOf(codes, d), mass, lo, step, levels, &noise)
				UnpackKeys(keys, d, &l, planes, lo, step)
				Axpys(rowsOf(want, d), w, stride, keys, d, known)
				near(t, fmt.Sprintf("%v: %d groups, %d rows", v, groups, rows), got, want, 1e4)
				for r := range rows {
					for j := range d {
						wantSpread[r*d+j] += mass[r] * step[j] * step[j] * noise[levels[j/LineTokens]]
					}
				}
				near(t, "spread", spread, wantSpread, 1e3)
			}
		}
	}
}
