package main

import (
	"math"

	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
	"github.com/mmcloughlin/avo/reg"
)

// places says what codes of 1 to 4 lines mean, in bins: see places in ../fold.go.
var places = [][3]F32{{}, {128 - 96*.89, .89, 96}, {8, 1, 120}, {2, 1, 126}, {.5, 1, 127.5}}

const placeOffset, placeScale, placeMiddle = 0, 4, 8

// placeTable returns the places, 16 bytes for each number of lines.
func (v isa) placeTable() Mem {
	name := "places" + v.suffix
	if _, ok := constants[name]; !ok {
		constants[name] = GLOBL(name, RODATA|NOPTR)
		for l, x := range places {
			for i, f := range append(x[:], 0) {
				DATA(16*l+4*i, f)
			}
		}
	}
	return constants[name]
}

// maxFloat is the largest finite number.
const maxFloat = F32(math.MaxFloat32)

// fold: the first pass over a row's channels finds the largest product and sums
// the offset, the second rounds the products to words. It computes products anew.
func (v isa) fold() {
	table := v.placeTable()
	v.function("fold", "words *int16, scale *float32, q *float32, d int, rows int, lo *float32, step *float32, levels *byte, groups int")
	words, scale, q, d, rows := param("words"), param("scale"), param("q"), param("d"), param("rows")
	pitch, base := GP64(), GP64() // from group to group of words
	MOVQ(rows, pitch)
	SHLQ(Imm(5), pitch)
	LEAQ(table, base)
	SHLQ(Imm(2), d)
	Label("row")
	offset, most := v.vec(), v.vec()
	v.zero(offset)
	v.zero(most)
	v.eachGroup("largest", base, q, func(entry reg.GPVirtual, x, p reg.VecVirtual, lo Mem, w reg.VecVirtual, _ int) {
		v.and(v.constant(U32(0x7fffffff)), p)
		VMAXPS(most, p, most) // of a NaN in p, most remains; it shows in the offset
		place := v.vec()
		VBROADCASTSS(Mem{Base: entry, Disp: placeOffset}, place)
		VFMADD213PS(lo, place, w)
		VFMADD231PS(x, w, offset)
	})
	unit := v.scalar(most, VMAXPS).AsX()
	VDIVSS(v.constant(F32(127<<8|127)), unit, unit)
	VMOVSS(unit, Mem{Base: scale})
	VUCOMISS(v.constant(F32(0x1p-100)), unit)
	JBE(LabelRef("nothing"))
	VUCOMISS(v.constant(maxFloat), unit)
	JA(LabelRef("nothing"))
	to := GP64()
	MOVQ(words, to)
	one, inverse, units := XMM(), v.vec(), v.vec()
	VMOVSS(v.constant(F32(1)), one)
	VDIVSS(unit, one, one)
	VBROADCASTSS(one, inverse)
	VBROADCASTSS(unit, units)
	var halves []reg.VecVirtual
	v.eachGroup("round", base, q, func(entry reg.GPVirtual, _, p reg.VecVirtual, _ Mem, _ reg.VecVirtual, part int) {
		i, f := v.vec(), v.vec()
		VMULPS(inverse, p, i)
		VCVTPS2DQ(i, i)
		VCVTDQ2PS(i, f)
		VFNMADD231PS(units, f, p)
		middle := v.vec()
		VBROADCASTSS(Mem{Base: entry, Disp: placeMiddle}, middle)
		VFMADD231PS(middle, p, offset)
		VPSHUFD(Imm(0b11011000), i, i)
		if halves = append(halves, i); part == 16/v.lanes-1 {
			v.narrowWords(halves, Mem{Base: to})
			ADDQ(pitch, to)
			halves = nil
		}
	})
	JMP(LabelRef("sum"))
	Label("nothing")
	left, at, none := param("groups"), GP64(), YMM()
	MOVQ(words, at)
	VXORPS(none, none, none)
	Label("clear")
	VMOVUPS(none, Mem{Base: at})
	ADDQ(pitch, at)
	DECQ(left)
	JNZ(LabelRef("clear"))
	Label("sum")
	VMOVSS(v.scalar(offset, VADDPS), Mem{Base: scale, Disp: 4})
	ADDQ(Imm(8), scale)
	ADDQ(Imm(32), words)
	ADDQ(d, q)
	DECQ(rows)
	JNZ(LabelRef("row"))
	end()
}

// eachGroup emits a loop over the groups of channels: for each vector of them x of the query, its product p
// with the bins' size, where the bins' lower ends lie, and their size w.
func (v isa) eachGroup(label string, table, q reg.GPVirtual, use func(entry reg.GPVirtual, x, p reg.VecVirtual, lo Mem, w reg.VecVirtual, part int)) {
	at, lo, step, levels, left := GP64(), param("lo"), param("step"), param("levels"), param("groups")
	MOVQ(q, at)
	Label(label)
	entry := GP64()
	MOVBQZX(Mem{Base: levels}, entry)
	SHLQ(Imm(4), entry)
	ADDQ(table, entry)
	scale := v.vec()
	VBROADCASTSS(Mem{Base: entry, Disp: placeScale}, scale)
	for part := range 16 / v.lanes {
		x, w, p := v.vec(), v.vec(), v.vec()
		VMOVUPS(Mem{Base: at, Disp: 4 * v.lanes * part}, x)
		VMOVUPS(Mem{Base: step, Disp: 4 * v.lanes * part}, w)
		VMULPS(x, w, p)
		VMULPS(scale, p, p)
		use(entry, x, p, Mem{Base: lo, Disp: 4 * v.lanes * part}, w, part)
	}
	for _, r := range []reg.GPVirtual{at, lo, step} {
		ADDQ(Imm(64), r)
	}
	INCQ(levels)
	DECQ(left)
	JNZ(LabelRef(label))
}

// narrowWords writes 16 numbers of 32 bits as words.
func (v isa) narrowWords(x []reg.VecVirtual, to Mem) {
	if v.lanes == 16 {
		VPMOVDW(x[0], to)
		return
	}
	y := YMM()
	VPACKSSDW(x[1], x[0], y)
	VPERMQ(Imm(0b11011000), y, y)
	VMOVUPS(y, to)
}

// readBins returns a mask of bins that are not in order, of some channels: 0 if there are none.
func (v isa) readBins() {
	v.function("readBins", "lo *float32, step *float32, src *byte, d int, unit float32) (bad uint64")
	lo, step, low, d := param("lo"), param("step"), param("src"), param("d")
	unit := v.vec()
	VBROADCASTSS(NewParamAddr("unit", 32), unit)
	high := GP64()
	LEAQ(Mem{Base: low, Index: d, Scale: 2}, high)
	good := v.mask()
	Label("loop")
	a, w, top := v.vec(), v.vec(), v.vec()
	VCVTPH2PS(Mem{Base: low}, a)
	VCVTPH2PS(Mem{Base: high}, w)
	VMULPS(unit, a, a)
	VMULPS(unit, w, w)
	VMOVUPS(a, Mem{Base: lo})
	VMOVUPS(w, Mem{Base: step})
	const greaterOrEqual, lessOrEqual = U8(0x1d), U8(0x12)
	good.and(greaterOrEqual, v.constant(F32(0x1p-126)), w)
	VMULPS(v.constant(F32(255.5)), w, top)
	good.and(lessOrEqual, v.constant(maxFloat), top)
	VADDPS(a, top, top)
	for _, x := range []reg.VecVirtual{a, top} {
		v.and(v.constant(U32(0x7fffffff)), x)
		good.and(lessOrEqual, v.constant(maxFloat), x)
	}
	for _, r := range []reg.GPVirtual{lo, step} {
		ADDQ(Imm(uint64(4*v.lanes)), r)
	}
	for _, r := range []reg.GPVirtual{low, high} {
		ADDQ(Imm(uint64(2*v.lanes)), r)
	}
	SUBQ(Imm(uint64(v.lanes)), d)
	JNZ(LabelRef("loop"))
	Store(good.missing(), Return("bad"))
	end()
}

// lanesMask says which lanes passed all comparisons.
type lanesMask struct {
	isa
	k   reg.OpmaskVirtual
	all reg.VecVirtual
}

func (v isa) mask() *lanesMask {
	m := &lanesMask{isa: v}
	if v.lanes == 16 {
		m.k = K()
		KXNORW(m.k, m.k, m.k)
	} else {
		m.all = v.vec()
		VPCMPEQD(m.all, m.all, m.all)
	}
	return m
}

func (m *lanesMask) and(predicate Op, y Mem, x reg.VecVirtual) {
	if m.lanes == 16 {
		k := K()
		VCMPPS(predicate, y, x, k)
		KANDW(k, m.k, m.k)
		return
	}
	t := m.vec()
	VCMPPS(predicate, y, x, t)
	VANDPS(t, m.all, m.all)
}

// missing returns the lanes that did not pass.
func (m *lanesMask) missing() reg.GPVirtual {
	out := GP64()
	if m.lanes == 16 {
		KMOVW(m.k, out.As32())
	} else {
		VMOVMSKPS(m.all, out.As32())
	}
	XORQ(U32(1<<m.lanes-1), out)
	return out
}

// addBins: a row after the other; of groups without lines there is only the spread.
func (v isa) addBins() {
	table := v.placeTable()
	v.function("addBins", "out *[]float32, spread *[]float32, codes *[]float32, mass *float32, rows int, lo *float32, step *float32, levels *byte, groups int, noise *float32")
	out, spread, codes, mass, rows, noise := param("out"), param("spread"), param("codes"), param("mass"), param("rows"), param("noise")
	base := GP64()
	LEAQ(table, base)
	Label("row")
	lo, step, levels, left := param("lo"), param("step"), param("levels"), param("groups")
	to, toSpread, from := rowOf(out, 0), rowOf(spread, 0), rowOf(codes, 0)
	m := v.vec()
	VBROADCASTSS(Mem{Base: mass}, m)
	Label("group")
	entry, unknown := GP64(), v.vec()
	MOVBQZX(Mem{Base: levels}, entry)
	VBROADCASTSS(Mem{Base: noise, Index: entry, Scale: 4}, unknown)
	for i := 0; i < 64; i += 4 * v.lanes {
		w := v.vec()
		VMOVUPS(Mem{Base: step, Disp: i}, w)
		VMULPS(w, w, w)
		VMULPS(unknown, w, w)
		VMINPS(v.constant(maxFloat), w, w)
		VMULPS(m, w, w)
		v.addTo(Mem{Base: toSpread, Disp: i}, w)
	}
	SHLQ(Imm(4), entry)
	JZ(LabelRef("next"))
	ADDQ(base, entry)
	offset, scale := v.vec(), v.vec()
	VBROADCASTSS(Mem{Base: entry, Disp: placeOffset}, offset)
	VBROADCASTSS(Mem{Base: entry, Disp: placeScale}, scale)
	for i := 0; i < 64; i += 4 * v.lanes {
		x, w := v.vec(), v.vec()
		VMOVUPS(Mem{Base: step, Disp: i}, w)
		VMULPS(Mem{Base: from, Disp: i}, scale, x)
		VFMADD231PS(m, offset, x)
		VMULPS(w, x, x)
		VFMADD231PS(Mem{Base: lo, Disp: i}, m, x)
		v.addTo(Mem{Base: to, Disp: i}, x)
	}
	Label("next")
	for _, r := range []reg.GPVirtual{lo, step, to, toSpread, from} {
		ADDQ(Imm(64), r)
	}
	INCQ(levels)
	DECQ(left)
	JNZ(LabelRef("group"))
	for _, r := range []reg.GPVirtual{out, spread, codes} {
		ADDQ(Imm(sliceSize), r)
	}
	ADDQ(Imm(4), mass)
	DECQ(rows)
	JNZ(LabelRef("row"))
	end()
}

// binSquares: a vector a group, added across.
func (v isa) binSquares() {
	v.function("binSquares", "dst *float32, q *float32, rows int, step *float32, d int")
	dst, q, rows := param("dst"), param("q"), param("rows")
	range256 := v.vec()
	VMOVUPS(v.constant(F32(256)), range256)
	Label("row")
	step, left := param("step"), param("d")
	Label("group")
	sum := v.vec()
	for i := 0; i < 16; i += v.lanes {
		x := v.vec()
		VMULPS(Mem{Base: step, Disp: 4 * i}, range256, x)
		VMULPS(Mem{Base: q, Disp: 4 * i}, x, x)
		if i == 0 {
			VMULPS(x, x, sum)
		} else {
			VFMADD231PS(x, x, sum)
		}
	}
	VMOVSS(v.scalar(sum, VADDPS), Mem{Base: dst})
	ADDQ(Imm(64), q)
	ADDQ(Imm(64), step)
	ADDQ(Imm(4), dst)
	SUBQ(Imm(16), left)
	JNZ(LabelRef("group"))
	DECQ(rows)
	JNZ(LabelRef("row"))
	end()
}

// squaresInt8: products of pairs are added in 32 bits.
func (v isa) squaresInt8() {
	v.function("squaresInt8", "dst *float32, c *byte, n int, d int")
	dst, at, n := param("dst"), param("c"), param("n")
	Label("row")
	left, sum := param("d"), YMM()
	VXORPS(sum, sum, sum)
	Label("dims")
	x := YMM()
	VPMOVSXBW(Mem{Base: at}, x)
	VPMADDWD(x, x, x)
	VPADDD(x, sum, sum)
	ADDQ(Imm(16), at)
	SUBQ(Imm(16), left)
	JNZ(LabelRef("dims"))
	VCVTDQ2PS(sum, sum)
	half := isa{lanes: 8}
	VMOVSS(half.scalar(sum, VADDPS), Mem{Base: dst})
	ADDQ(Imm(4), dst)
	DECQ(n)
	JNZ(LabelRef("row"))
	end()
}
