package kernels

import (
	"encoding/binary"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"testing"
)

// dims are those of models, and the odd ones that are allowed.
var dims = []int{16, 32, 48, 64, 80, 96, 112, 128, 192, 208, 256}

// others runs f with every variant but the Go loop.
func others(t *testing.T, f func(t *testing.T)) {
	for _, v := range Variants()[1:] {
		t.Run(v.String(), func(t *testing.T) {
			defer Use(v)()
			f(t)
		})
	}
}

// plain runs f with the Go loops.
func plain(f func()) {
	defer Use(Go)()
	f()
}

// shapes calls f with ragged shapes; a failure names the shape.
func shapes(t *testing.T, f func(t *testing.T, rng *rand.Rand, rows, n, d int)) {
	for _, d := range append([]int{1, 24}, dims...) {
		for _, rows := range []int{1, 2, 3, 4, 5, 7, 8, 16} {
			for _, n := range []int{1, 2, 3, 4, 5, 15, 16, 17, 64, 67} {
				f(t, rand.New(rand.NewPCG(uint64(d), uint64(rows*100+n))), rows, n, d)
			}
		}
	}
}

// odd returns n normal numbers in a slice that no vector is aligned to, and
// with nothing behind it.
func odd(rng *rand.Rand, n int) []float32 {
	x := make([]float32, n+1)[1:]
	for i := range x {
		x[i] = float32(rng.NormFloat64())
	}
	return slices.Clip(x)
}

func oddBytes(rng *rand.Rand, n int) []byte {
	x := make([]byte, n+1)[1:]
	for i := range x {
		x[i] = byte(rng.Uint32())
	}
	return slices.Clip(x)
}

// rowsOf cuts a table into its rows.
func rowsOf(x []float32, d int) (out [][]float32) {
	for ; len(x) >= d; x = x[d:] {
		out = append(out, x[:d:d])
	}
	return out
}

// near checks that got is want up to rounding of terms of the size scale; NaN
// and Inf are where they should be.
func near(t *testing.T, what string, got, want []float32, scale float64) {
	t.Helper()
	for i, w := range want {
		g := got[i]
		if g == w || g != g && w != w {
			continue
		}
		if !(math.Abs(float64(g)-float64(w)) <= 2e-6*scale) {
			t.Fatalf("%s: element %d is %v, not %v", what, i, g, w)
		}
	}
}

func TestDots(t *testing.T) {
	others(t, func(t *testing.T) {
		shapes(t, func(t *testing.T, rng *rand.Rand, rows, n, d int) {
			what := fmt.Sprintf("%d rows, %d tokens, d %d", rows, n, d)
			q, k, c := odd(rng, rows*d), odd(rng, n*d), oddBytes(rng, n*d)
			stride := n + rng.IntN(3)
			got, want := odd(rng, (rows-1)*stride+n), make([]float32, (rows-1)*stride+n)
			copy(want, got) // what lies between rows is left alone
			Dots(got, stride, q, k, d)
			plain(func() { Dots(want, stride, q, k, d) })
			near(t, what, got, want, math.Sqrt(float64(d))*10)
			DotsInt8(got, stride, q, c, d)
			plain(func() { DotsInt8(want, stride, q, c, d) })
			near(t, what+", int8", got, want, math.Sqrt(float64(d))*1000)
		})
	})
}

func TestAxpys(t *testing.T) {
	others(t, func(t *testing.T) {
		shapes(t, func(t *testing.T, rng *rand.Rand, rows, n, d int) {
			what := fmt.Sprintf("%d rows, %d tokens, d %d", rows, n, d)
			stride := n + rng.IntN(3)
			w, v, c := odd(rng, (rows-1)*stride+n), odd(rng, n*d), oddBytes(rng, n*d)
			got := odd(rng, rows*d)
			want := slices.Clone(got)
			cols := d
			if d%16 == 0 {
				cols = 16 * rng.IntN(d/16+1)
			}
			Axpys(rowsOf(got, d), w, stride, v, d, cols)
			plain(func() { Axpys(rowsOf(want, d), w, stride, v, d, cols) })
			near(t, what, got, want, math.Sqrt(float64(n))*10)
			AxpysInt8(rowsOf(got, d), w, stride, c, d)
			plain(func() { AxpysInt8(rowsOf(want, d), w, stride, c, d) })
			near(t, what+", int8", got, want, math.Sqrt(float64(n))*1000)
		})
	})
}

func TestWeights(t *testing.T) {
	inf, nan := float32(math.Inf(1)), float32(math.NaN())
	others(t, func(t *testing.T) {
		rng := rand.New(rand.NewPCG(1, 2))
		for n := range 70 {
			x := odd(rng, n)
			for i := range x {
				x[i] *= 30
				if rng.IntN(8) == 0 {
					x[i] = []float32{-inf, inf, nan, 0, -1e30, math.MaxFloat32, -math.SmallestNonzeroFloat32}[rng.IntN(7)]
				}
			}
			for _, top := range []float32{0, 50, -50, inf, -inf, nan, math.MaxFloat32} {
				got, want := slices.Clone(x), slices.Clone(x)
				a, b := Largest(got, top), float32(0)
				plain(func() { b = Largest(want, top) })
				if a != b && (a == a || b == b) {
					t.Fatalf("largest of %v and %v: %v, not %v", x, top, a, b)
				}
				a = Weights(got, got, top)
				plain(func() { b = Weights(want, want, top) })
				near(t, "sum", []float32{a}, []float32{b}, float64(b))
				for i, w := range want {
					if math.Abs(float64(got[i]-w)) > 1.5e-7*float64(w) {
						t.Fatalf("exp(%v - %v) = %v, not %v", x[i], top, got[i], w)
					}
				}
			}
		}
	})
}

func TestExponentials(t *testing.T) {
	for _, v := range Variants() {
		undo := Use(v)
		var worst float64
		x := make([]float32, 1<<14)
		for i := range x {
			x[i] = -87 * float32(i) / float32(len(x)-1)
		}
		got := slices.Clone(x)
		Weights(got, got, 0)
		undo()
		for i := range x {
			e := math.Exp(float64(x[i]))
			worst = max(worst, math.Abs(float64(got[i])-e)/e)
		}
		if worst > 1.3e-7 || got[0] != 1 {
			t.Errorf("%v: off by %g, exp(0) = %v", v, worst, got[0])
		}
	}
}

// What is not a number, or not finite, stays where it is.
func TestNotFinite(t *testing.T) {
	inf, nan := float32(math.Inf(1)), float32(math.NaN())
	const d, n, rows = 32, 9, 3
	others(t, func(t *testing.T) {
		for _, bad := range []float32{inf, -inf, nan} {
			q, k, w := slices.Repeat([]float32{1}, rows*d), slices.Repeat([]float32{1}, n*d), slices.Repeat([]float32{1}, rows*n)
			k[4*d+5] = bad
			got, want := make([]float32, rows*n), make([]float32, rows*n)
			Dots(got, n, q, k, d)
			plain(func() { Dots(want, n, q, k, d) })
			near(t, "dots", got, want, d)
			out, expect := make([]float32, rows*d), make([]float32, rows*d)
			Axpys(rowsOf(out, d), w, n, k, d, d)
			plain(func() { Axpys(rowsOf(expect, d), w, n, k, d, d) })
			near(t, "axpys", out, expect, n)
		}
	})
}

func TestShortSlicesPanic(t *testing.T) {
	f := func(n int) []float32 { return make([]float32, n) }
	b := func(n int) []byte { return make([]byte, n) }
	two, one := []LinePlace{{0, 0}, {0, 64}}, []LinePlace{{0, 0}}
	l := NewLayout([]uint8{1, 1}, two)
	planes, two128 := [][]byte{b(128)}, [][]byte{b(256)}
	batch := func(scales, high, low []byte, n, d int) *ValueBatch {
		x := new(ValueBatch)
		must(x.AppendRun(scales, high, low, n, d, 0), "they do not fit")
		return x
	}
	query := func(words, rows int) KeyQuery { return KeyQuery{make([]int16, words), f(2 * rows)} }
	for name, call := range map[string]func(){
		"dots: dst":            func() { Dots(f(7), 4, f(32), f(64), 16) },
		"dots: stride":         func() { Dots(f(99), 3, f(32), f(64), 16) },
		"dots: negative":       func() { Dots(f(99), -3, f(32), f(64), 16) },
		"dots: huge stride":    func() { Dots(f(99), math.MaxInt, f(64), f(64), 16) },
		"dots: d":              func() { Dots(f(99), 4, f(32), f(64), 0) },
		"dots int8: d":         func() { DotsInt8(f(1), 1, f(272), b(272), 272) },
		"dots int8: dst":       func() { DotsInt8(f(7), 4, f(32), b(64), 16) },
		"dots bf16: k":         func() { DotsBF16(f(8), 4, f(32), b(2*55), 4, 13, 16) },
		"dots bf16: pitch":     func() { DotsBF16(f(8), 4, f(32), b(2*55), 4, -16, 16) },
		"axpys bf16: v":        func() { AxpysBF16(rowsOf(f(32), 16), f(8), 4, b(2*63), 4, 16, 16) },
		"axpys: w":             func() { Axpys(rowsOf(f(32), 16), f(7), 4, f(64), 16, 16) },
		"axpys: cols":          func() { Axpys(rowsOf(f(32), 16), f(8), 4, f(64), 16, 32) },
		"axpys: part of 16":    func() { Axpys(rowsOf(f(32), 16), f(8), 4, f(64), 16, 8) },
		"axpys: row":           func() { Axpys([][]float32{f(16), f(15)}, f(8), 4, f(64), 16, 16) },
		"axpys int8: w":        func() { AxpysInt8(rowsOf(f(32), 16), f(7), 4, b(64), 16) },
		"gains: gain":          func() { Gains(f(15), f(32), make([]GainRow, 2)) },
		"gains: w":             func() { Gains(f(16), f(31), make([]GainRow, 2)) },
		"fold: words":          func() { l.Fold(query(31, 1), f(32), 32, f(32), f(32)) },
		"fold: scale":          func() { l.Fold(KeyQuery{make([]int16, 64), f(3)}, f(64), 32, f(32), f(32)) },
		"fold: steps":          func() { l.Fold(query(32, 1), f(32), 32, f(32), f(31)) },
		"fold: more than d":    func() { l.Fold(query(32, 1), f(32), 16, f(32), f(32)) },
		"bins: src":            func() { Bins(f(16), f(16), b(63), 1) },
		"bins: step":           func() { Bins(f(16), f(15), b(64), 1) },
		"bins: 24":             func() { Bins(f(24), f(24), b(128), 1) },
		"fold bins: src":       func() { l.FoldBins(query(32, 1), f(32), 32, b(127), 1) },
		"fold bins: words":     func() { l.FoldBins(query(31, 1), f(32), 32, b(128), 1) },
		"fold bins: scale":     func() { l.FoldBins(KeyQuery{make([]int16, 64), f(3)}, f(64), 32, b(128), 1) },
		"fold bins: d":         func() { l.FoldBins(query(32, 1), f(32), 16, b(128), 1) },
		"sums of codes: w":     func() { SumCodes(rowsOf(f(64), 32), f(31), 16, &l, planes) },
		"sums of codes: row":   func() { SumCodes([][]float32{f(31)}, f(16), 16, &l, planes) },
		"sums of codes: plane": func() { SumCodes([][]float32{f(32)}, f(16), 16, &l, [][]byte{b(127)}) },
		"bins: codes": func() {
			AddBins(rowsOf(f(32), 32), rowsOf(f(32), 32), rowsOf(f(31), 31), f(1), f(32), f(32), b(2), new([5]float32))
		},
		"bins: spread": func() {
			AddBins(rowsOf(f(32), 32), rowsOf(f(31), 31), rowsOf(f(32), 32), f(1), f(32), f(32), b(2), new([5]float32))
		},
		"bins: five lines": func() {
			AddBins(rowsOf(f(16), 16), rowsOf(f(16), 16), rowsOf(f(16), 16), f(1), f(16), f(16), []byte{5}, new([5]float32))
		},
		"squares: dst":         func() { BinSquares(f(3), f(64), f(32)) },
		"squares: d":           func() { BinSquares(f(3), f(48), f(24)) },
		"squares int8: dst":    func() { SquaresInt8(f(1), b(32), 16) },
		"leaf weights: sums":   func() { LeafWeights(f(32), f(3), f(2), 0) },
		"sums of runs":         func() { SumRuns(make([]RunSum, 2), f(2*RunTokens-1)) },
		"leaf weights: offset": func() { LeafWeights(f(32), f(4), f(1), 0) },
		"weights: dst":         func() { Weights(f(3), f(4), 0) },
		"product: dst":         func() { MatMul(f(31), f(4), 2, 1, f(32), 2, 2, 16) },
		"product: a":           func() { MatMul(f(32), f(3), 2, 1, f(32), 2, 2, 16) },
		"product: b":           func() { MatMul(f(32), f(4), 2, 1, f(31), 2, 2, 16) },
		"product: negative":    func() { MatMul(f(32), f(4), -2, 1, f(32), 2, 2, 16) },
		"product: huge stride": func() { MatMul(f(32), f(4), 1<<62, 1<<62, f(48), 2, 3, 16) },
		"dot: b":               func() { Dot(f(16), f(15)) },
		"add rows: sum":        func() { AddRows(nil, f(16)) },
		"deviations: dst":      func() { Deviations(f(31), f(32), f(16)) },
		"extremes: hi":         func() { Extremes(f(16), f(15), f(16)) },
		"quantise: dst":        func() { Quantise(b(31), f(32), f(16), f(16), 0) },
		"quantise: inverse":    func() { Quantise(b(32), f(32), f(16), f(15), 0) },
		"hadamard: 8":          func() { Hadamard(f(8)) },
		"hadamard: 48":         func() { Hadamard(f(48)) },
		"widen: src":           func() { WidenBF16(f(16), b(31)) },
		"gather: dst":          func() { GatherDots(f(1), f(64), []int{0, 1}, f(16)) },
		"gather: row":          func() { GatherDots(f(2), f(31), []int{0, 1}, f(16)) },
		"gather: negative row": func() { GatherAxpy(f(16), f(1), f(64), []int{-1}) },
		"gather: w":            func() { GatherAxpy(f(16), f(1), f(64), []int{0, 1}) },
		"values: w":            func() { batch(b(6), b(16), nil, 2, 16).AddTo(rowsOf(f(32), 16), f(3), 2) },
		"values: row":          func() { batch(b(3), b(8), nil, 1, 16).AddTo([][]float32{f(15)}, f(1), 1) },
		"values: scales":       func() { batch(b(5), b(16), nil, 2, 16) },
		"values: codes":        func() { batch(b(6), b(15), nil, 2, 16) },
		"values: low":          func() { batch(b(6), b(16), b(15), 2, 16) },
		"values: too many":     func() { batch(b(771), b(2056), nil, 257, 16) },
		"values: odd d":        func() { batch(b(3), b(8), nil, 1, 15) },
		"values: d":            func() { batch(b(3), b(129), nil, 1, 258) },
		"values: rows differ":  func() { batch(b(3), b(8), nil, 1, 16).Append(b(3), b(16), nil) },
		"values: low row":      func() { new(ValueBatch).Append(b(3), b(8), b(7)) },
		"values: scale":        func() { new(ValueBatch).Append(b(2), b(8), nil) },
		"layout: groups":       func() { NewLayout(make([]uint8, 17), nil) },
		"layout: no lines":     func() { NewLayout([]uint8{0, 1}, one) },
		"layout: five lines":   func() { NewLayout([]uint8{5}, make([]LinePlace, 5)) },
		"layout: lines":        func() { NewLayout([]uint8{1, 1}, one) },
		"layout: planes":       func() { NewLayout([]uint8{1}, []LinePlace{{8, 0}}) },
		"scores: dst":          func() { ScoreKeys(f(15), 16, query(32, 1), &l, planes) },
		"scores: stride":       func() { ScoreKeys(f(99), 15, query(64, 2), &l, planes) },
		"scores: words":        func() { ScoreKeys(f(16), 16, query(31, 1), &l, planes) },
		"scores: no planes":    func() { ScoreKeys(f(16), 16, query(32, 1), &l, nil) },
		"scores: short plane":  func() { ScoreKeys(f(16), 16, query(32, 1), &l, [][]byte{b(127)}) },
		"scores: leaves":       func() { ScoreLeaves(f(31), 16, 32, query(32, 1), &l, two128, []int{128}, 2, 0) },
		"scores: leaf stride":  func() { ScoreLeaves(f(32), -1, 32, query(32, 1), &l, two128, []int{128}, 2, 0) },
		"scores: third leaf":   func() { ScoreLeaves(f(48), 16, 48, query(32, 1), &l, two128, []int{128}, 3, 0) },
		"scores: step":         func() { ScoreLeaves(f(32), 16, 32, query(32, 1), &l, two128, []int{129}, 2, 0) },
		"scores: step back":    func() { ScoreLeaves(f(32), 16, 32, query(32, 1), &l, two128, []int{-1}, 2, 0) },
		"scores: no steps":     func() { ScoreLeaves(f(32), 16, 32, query(32, 1), &l, two128, nil, 2, 0) },
		"scores: huge step":    func() { ScoreLeaves(f(48), 16, 48, query(32, 1), &l, two128, []int{math.MaxInt}, 3, 0) },
		"unpack: dst":          func() { UnpackKeys(f(511), 32, &l, planes, f(32), f(32)) },
		"unpack: steps":        func() { UnpackKeys(f(512), 32, &l, planes, f(31), f(32)) },
		"unpack: more than d":  func() { UnpackKeys(f(512), 16, &l, planes, f(32), f(32)) },
		"unpack: short plane":  func() { UnpackKeys(f(512), 32, &l, [][]byte{b(127)}, f(32), f(32)) },
	} {
		for _, v := range Variants() {
			undo := Use(v)
			func() {
				defer func() {
					if recover() == nil {
						t.Errorf("%v: %s: no panic", v, name)
					}
				}()
				call()
			}()
			undo()
		}
	}
}

// Nothing to do is no error.
func TestNothing(t *testing.T) {
	for _, v := range Variants() {
		defer Use(v)()
		Dots(nil, 0, nil, make([]float32, 32), 16)
		Dots(nil, 0, make([]float32, 32), nil, 16)
		Axpys(nil, nil, 0, nil, 16, 16)
		new(ValueBatch).AddTo([][]float32{make([]float32, 16)}, nil, 0)
		new(ValueBatch).AppendRun(nil, nil, nil, 0, 16, 0)
		ScoreKeys(nil, 0, KeyQuery{}, &Layout{}, nil)
		Gains(make([]float32, 16), nil, nil)
		UnpackKeys(make([]float32, 256), 16, &Layout{}, nil, nil, nil)
		(&Layout{}).Fold(KeyQuery{}, nil, 16, nil, nil)
		(&Layout{}).FoldBins(KeyQuery{}, nil, 16, nil, 1)
		Bins(nil, nil, nil, 1)
		BinSquares(nil, nil, make([]float32, 16))
		LeafWeights(nil, nil, nil, 0)
		SumRuns(nil, nil)
		AddRows(make([]float64, 16), nil)
		Deviations(nil, nil, make([]float32, 16))
		SquaresInt8(nil, nil, 16)
		if Largest(nil, 3) != 3 || Weights(nil, nil, 3) != 0 {
			t.Errorf("%v: of nothing", v)
		}
		dst := make([]float32, LineTokens)
		if ScoreKeys(dst, LineTokens, KeyQuery{Scale: []float32{1, 5}}, &Layout{}, nil); dst[15] != 5 {
			t.Errorf("%v: no groups: %v", v, dst)
		}
	}
}

func TestNoAllocations(t *testing.T) {
	const rows, n, d = 4, 64, 128
	rng := rand.New(rand.NewPCG(3, 4))
	q, k, c, dst, out := odd(rng, rows*d), odd(rng, n*d), oddBytes(rng, n*d), odd(rng, rows*n), rowsOf(odd(rng, rows*d), d)
	var values ValueBatch
	runs := make([]RunSum, len(dst)/RunTokens)
	scales := slices.Repeat(valueScale(1, 100), n)
	l, planes := leaf(rng, d/16)
	query, tokens := KeyQuery{make([]int16, rows*d), odd(rng, 2*rows)}, []int{0, 3, 1}
	for _, v := range Variants() {
		defer Use(v)()
		if a := testing.AllocsPerRun(10, func() {
			var scores [rows * n]float32
			Dots(scores[:], n, q, k, d)
			DotsInt8(dst, n, q, c, d)
			Weights(dst, scores[:], Largest(scores[:5], 0))
			Axpys(out, dst, n, k, d, d)
			AxpysInt8(out, dst, n, c, d)
			values.Reset()
			values.AppendRun(scales, c, nil, n, d, 0)
			values.AddTo(out, dst, n)
			ScoreKeys(dst, n, query, &l, planes)
			GatherDots(dst, q, tokens, q[:d])
			MatMul(dst[:64], q, 1, 4, k, 4, 8, 16)
			Dot(q, k[:len(q)])
			GatherAxpy(q[:d], dst, k, tokens)
			WidenBF16(dst, c)
			Extremes(q[:d], k[:d], k)
			Quantise(c, k, q[:d], k[:d], 3)
			Hadamard(k[:d])
			LeafWeights(dst, out[0], k, 0)
			SumRuns(runs, dst)
			SquaresInt8(dst, c, d)
			l.Fold(KeyQuery{query.Words, dst}, q, d, k, k[d:])
			Bins(q[:d], dst, c, 1)
			l.FoldBins(KeyQuery{query.Words, dst}, q, d, c, 1)
			SumCodes(out, dst, LineTokens, &l, planes)
			AddBins(out[:1], out[1:2], out[2:], dst, k, k, l.Levels(), new([5]float32))
			BinSquares(dst, q, k[:d])
			Gains(dst, q, []GainRow{{}, {}})
			UnpackKeys(k, d, &l, planes, q, q)
		}); a != 0 {
			t.Errorf("%v: %v allocations", v, a)
		}
	}
}

func TestEnv(t *testing.T) {
	list := Variants()
	best := list[len(list)-1]
	for name, want := range map[string]Variant{"": best, "go": Go} {
		if v, err := fromEnv(name); v != want || err != nil {
			t.Errorf("%q: %v, %v", name, v, err)
		}
	}
	if v, err := fromEnv("sse9"); v != best || err == nil {
		t.Errorf("unknown: %v, %v", v, err)
	}
}

func FuzzKernels(f *testing.F) {
	f.Add(uint64(1), uint8(4), uint8(20), uint8(7), []byte{1, 2, 3})
	f.Fuzz(func(t *testing.T, seed uint64, rows, n, groups uint8, special []byte) {
		rng := rand.New(rand.NewPCG(seed, 1))
		r, tokens, g := 1+int(rows)%16, 1+int(n)%80, 1+int(groups)%mostGroups
		d := g * LineTokens
		q, k := odd(rng, r*d), odd(rng, tokens*d)
		for i := 0; i+4 <= len(special); i += 4 { // any bits, NaNs among them
			k[rng.IntN(len(k))] = math.Float32frombits(binary.LittleEndian.Uint32(special[i:]))
		}
		want, out := make([]float32, r*tokens), make([]float32, r*d)
		plain(func() { Dots(want, tokens, q, k, d) })
		sizes := make([]float32, r*tokens) // sums of magnitudes bound what rounding does
		plain(func() { Dots(sizes, tokens, magnitudes(q), magnitudes(k), d) })
		l, planes := leaf(rng, g)
		query := KeyQuery{make([]int16, r*d), odd(rng, 2*r)}
		for i := range query.Words {
			query.Words[i] = int16(rng.IntN(2*mostWord+1) - mostWord)
		}
		others(t, func(t *testing.T) {
			got := make([]float32, r*tokens)
			Dots(got, tokens, q, k, d)
			for i := range got {
				if s := float64(sizes[i]); s < math.MaxFloat32/2 {
					near(t, "dots", got[i:i+1], want[i:i+1], 1+s)
				}
			}
			top := Largest(got, float32(math.Inf(-1)))
			weights := slices.Clone(got)
			Weights(weights, weights, top)
			if runs := len(got) / RunTokens; runs > 0 {
				sums, want := make([]RunSum, runs), make([]RunSum, runs)
				SumRuns(sums, got)
				plain(func() { SumRuns(want, got) })
				for i, w := range want {
					if s := sums[i]; s.Top != w.Top && (s.Top == s.Top || w.Top == w.Top) || math.Abs(float64(s.Sum-w.Sum)) > 1e-4 || math.Abs(float64(s.Squares-w.Squares)) > 1e-4 {
						t.Fatalf("run %d: %+v, not %+v", i, s, w)
					}
				}
			}
			Axpys(rowsOf(out, d), weights, tokens, k, d, d)
			checkRows(t, k, d)
			checkScores(t, rng, query, l, planes)
			if rng.IntN(8) == 0 { // the Go loops take long for many leaves
				checkLeaves(t, rng, query, g)
			}
			checkUnpack(t, rng, l, planes, d)
			checkFoldBins(t, rng, g, r)
		})
	})
}

// checkRows compares what is made of rows bit by bit; any NaN is like another.
func checkRows(t *testing.T, x []float32, d int) {
	got, want := make([]float64, d), make([]float64, d)
	AddRows(got, x)
	plain(func() { AddRows(want, x) })
	for j, y := range want {
		if got[j] != y && (got[j] == got[j] || y == y) {
			t.Fatalf("sum of channel %d: %v, not %v", j, got[j], y)
		}
	}
	deltas, less := make([]float32, len(x)), make([]float32, len(x))
	Deviations(deltas, x, x[:d])
	plain(func() { Deviations(less, x, x[:d]) })
	for i, y := range less {
		if deltas[i] != y && (deltas[i] == deltas[i] || y == y) {
			t.Fatalf("deviation %d: %v, not %v", i, deltas[i], y)
		}
	}
}

func magnitudes(x []float32) []float32 {
	out := slices.Clone(x)
	for i, v := range out {
		out[i] = float32(math.Abs(float64(v)))
	}
	return out
}
