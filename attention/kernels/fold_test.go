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

// Bins are read bit for bit, and those out of order found wherever they are.
func TestBins(t *testing.T) {
	half := func(b []byte, i int, h uint16) { binary.LittleEndian.PutUint16(b[2*i:], h) }
	for _, v := range Variants() {
		undo := Use(v)
		rng := rand.New(rand.NewPCG(33, 34))
		for _, d := range append([]int{1, 24}, dims...) {
			for _, exp := range []int{0, -110, 113, 5} {
				unit := float32(math.Ldexp(1, exp))
				src := oddBytes(rng, 4*d)
				for i := range d {
					half(src, i, uint16(rng.Uint32())&^0x4000)         // below 2
					half(src, d+i, uint16(1+rng.IntN(0x3bff))&^0x8000) // positive, below 1
				}
				if exp == -110 { // steps below 2^-126 are refused
					for i := range d {
						half(src, d+i, 0x2c00)
					}
				}
				lo, step := odd(rng, d), odd(rng, d)
				if !Bins(lo, step, src, unit) {
					t.Fatalf("%v: d %d, exponent %d: refused", v, d, exp)
				}
				for i := range d {
					for j, got := range []float32{lo[i], step[i]} {
						h := binary.LittleEndian.Uint16(src[2*(i+j*d):])
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
				bad := slices.Clone(src)
				at := rng.IntN(d)
				switch rng.IntN(4) {
				case 0:
					half(bad, at, 0xfc00) // a lower end of -Inf
				case 1:
					half(bad, at, 0x7e01) // that is no number
				case 2:
					half(bad, d+at, 0) // an empty bin
				case 3:
					half(bad, d+at, 0x8400) // a negative one
				}
				if Bins(lo, step, bad, unit) {
					t.Fatalf("%v: d %d: bad channel %d is taken", v, d, at)
				}
			}
		}
		src := make([]byte, 4*16)
		for i := range 16 {
			half(src, 16+i, 0x7bff) // 2^16 bins of 2^113: the last one's end is not finite
		}
		if Bins(make([]float32, 16), make([]float32, 16), src, 0x1p113) {
			t.Errorf("%v: an upper end that is not finite is taken", v)
		}
		undo()
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
