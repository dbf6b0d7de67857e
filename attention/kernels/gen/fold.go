package main

import (
	"fmt"
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

// fold: of some rows at a time, the first pass over the channels finds the largest products and sums the
// offsets, the second computes products anew and rounds them to words. foldBins reads bins as they are stored, in either pass.
func (v isa) fold(stored bool) {
	table := v.placeTable()
	if stored {
		v.function("foldBins", "words *int16, scale *float32, q *float32, d int, rows int, src *byte, unit float32, levels *byte, groups int) (bad uint64")
	} else {
		v.function("fold", "words *int16, scale *float32, q *float32, d int, rows int, lo *float32, step *float32, levels *byte, groups int")
	}
	f := &folding{isa: v, words: param("words"), q: param("q"), d: param("d"), base: GP64(),
		unit: AllocLocal(16), inverse: AllocLocal(16), tells: AllocLocal(16)}
	if stored {
		f.good = v.mask()
	}
	scale, rows := param("scale"), param("rows")
	SHLQ(Imm(2), f.d)
	f.d3 = triple(f.d)
	LEAQ(table, f.base)
	rowBlocksUntil("folded", v.rows, rows, func(r int) {
		label := fmt.Sprintf("rows%d", r)
		offset, most := f.largest(label+"largest", r)
		unit := f.units(most)
		f.round(label+"round", offset)
		v.storePairs(unit, v.byRow(offset, VADDPS), Mem{Base: scale}, r)
		ADDQ(Imm(uint64(8*r)), scale)
		ADDQ(U32(uint64(32*r)), f.words)
		for range r {
			ADDQ(f.d, f.q)
		}
	})
	if stored {
		Store(f.good.missing(), Return("bad"))
	}
	end()
}

// folding emits fold. It walks along the groups of channels.
type folding struct {
	isa
	words, q, d, d3, base reg.GPVirtual
	good                  *lanesMask // of stored bins; nil: they are floats
	// By row; tells is a mask, 0 if the unit is nothing to tell keys apart by, or no number. Then so are unit and inverse.
	unit, inverse, tells Mem

	at, levels, left, entry reg.GPVirtual
	bins                    []reg.GPVirtual // lower ends and sizes, or lines of both
	binUnit, scale          reg.VecVirtual
}

// first begins a loop over the groups.
func (f *folding) first(label string) {
	f.at, f.levels, f.left, f.entry = GP64(), param("levels"), param("groups"), GP64()
	MOVQ(f.q, f.at)
	if f.good != nil {
		f.bins, f.binUnit = []reg.GPVirtual{param("src")}, f.vec()
		VBROADCASTSS(NewParamAddr("unit", 48), f.binUnit)
	} else {
		f.bins = []reg.GPVirtual{param("lo"), param("step")}
	}
	Label(label)
	MOVBQZX(Mem{Base: f.levels}, f.entry)
	SHLQ(Imm(4), f.entry)
	ADDQ(f.base, f.entry)
	f.scale = f.broadcast(Mem{Base: f.entry, Disp: placeScale})
}

// next ends it.
func (f *folding) next(label string) {
	for _, r := range append(f.bins, f.at) {
		ADDQ(Imm(64), r)
	}
	INCQ(f.levels)
	DECQ(f.left)
	JNZ(LabelRef(label))
}

// x is a part of a row of the query, product its product with the bins' size.
func (f *folding) x(r, part int) Mem {
	m := strided(f.at, f.d, f.d3, 1, r)
	m.Disp += 4 * f.lanes * part
	return m
}

func (f *folding) product(r, part int, width reg.VecVirtual) reg.VecVirtual {
	p := f.vec()
	VMULPS(f.x(r, part), width, p)
	VMULPS(f.scale, p, p)
	return p
}

// lower and width load bins' lower ends and sizes.
func (f *folding) lower(part int) reg.VecVirtual {
	if f.good != nil {
		return f.readF16(Mem{Base: f.bins[0], Disp: 2 * f.lanes * part}, f.binUnit)
	}
	x := f.vec()
	VMOVUPS(Mem{Base: f.bins[0], Disp: 4 * f.lanes * part}, x)
	return x
}

func (f *folding) width(part int) reg.VecVirtual {
	if f.good != nil {
		return f.readF16(Mem{Base: f.bins[0], Disp: 32 + 2*f.lanes*part}, f.binUnit)
	}
	x := f.vec()
	VMOVUPS(Mem{Base: f.bins[1], Disp: 4 * f.lanes * part}, x)
	return x
}

// largest returns, lane by lane, the rows' offsets but for what rounding takes, and their largest products.
func (f *folding) largest(label string, rows int) (offset, most []reg.VecVirtual) {
	offset, most = f.zeros(rows), f.zeros(rows)
	f.first(label)
	for part := range 16 / f.lanes {
		base, w := f.lower(part), f.width(part)
		if f.good != nil {
			f.good.ofBins(base, w)
		}
		VFMADD231PS(f.broadcast(Mem{Base: f.entry, Disp: placeOffset}), w, base)
		for r := range rows {
			VFMADD231PS(f.x(r, part), base, offset[r])
			p := f.product(r, part, w)
			f.and(f.constant(U32(0x7fffffff)), p)
			VMAXPS(most[r], p, most[r]) // of a NaN in p, most remains; it shows in the offset
		}
	}
	f.next(label)
	return offset, most
}

// units makes and returns the rows' units.
func (f *folding) units(most []reg.VecVirtual) (unit reg.VecVirtual) {
	unit, inverse, tells := f.byRow(most, VMAXPS), f.vec(), f.vec()
	VDIVPS(f.constant(F32(127<<8|127)), unit, unit)
	VMOVUPS(f.constant(F32(1)), inverse)
	VDIVPS(unit, inverse, inverse)
	if f.lanes == 16 {
		VPTERNLOGD(Imm(0xff), tells, tells, tells)
	} else {
		VPCMPEQD(tells, tells, tells)
	}
	for _, keep := range []func(reg.VecVirtual){f.keep(greater, f.constant(F32(0x1p-100)), unit), f.keep(lessOrEqual, f.constant(maxFloat), unit)} {
		keep(inverse)
		keep(tells)
	}
	for _, x := range []struct {
		x  reg.VecVirtual
		to Mem
	}{{unit, f.unit}, {inverse, f.inverse}, {tells, f.tells}} {
		VMOVUPS(x.x.AsX(), x.to)
	}
	return unit
}

// round writes the words, and adds what rounding takes to the offsets.
func (f *folding) round(label string, offset []reg.VecVirtual) {
	to, pitch := GP64(), param("rows") // from group to group of words
	MOVQ(f.words, to)
	SHLQ(Imm(5), pitch)
	f.first(label)
	middle := f.broadcast(Mem{Base: f.entry, Disp: placeMiddle})
	halves := make([][]reg.VecVirtual, len(offset))
	for part := range 16 / f.lanes {
		w := f.width(part)
		for r := range offset {
			ofRow := func(m Mem) reg.VecVirtual { m.Disp += 4 * r; return f.broadcast(m) }
			p, i, whole := f.product(r, part, w), f.vec(), f.vec()
			f.and(ofRow(f.tells), p)
			VMULPS(ofRow(f.inverse), p, i)
			VCVTPS2DQ(i, i)
			VCVTDQ2PS(i, whole)
			VFNMADD231PS(ofRow(f.unit), whole, p)
			VFMADD231PS(middle, p, offset[r])
			VPSHUFD(Imm(0b11011000), i, i)
			halves[r] = append(halves[r], i)
		}
	}
	for r, x := range halves {
		f.narrowWords(x, Mem{Base: to, Disp: 32 * r})
	}
	ADDQ(pitch, to)
	f.next(label)
}

// byRow reduces up to four vectors, each to the lane of its number; the other lanes hold anything.
func (v isa) byRow(x []reg.VecVirtual, add func(...Op)) reg.VecVirtual {
	for len(x) < 4 {
		x = append(x, x[len(x)-1])
	}
	out := v.narrow(v.transposed(x, add), add)
	if v.lanes == 16 {
		return out.AsZ().(reg.VecVirtual)
	}
	return out.AsY().(reg.VecVirtual)
}

// storePairs stores the lowest n numbers of a and b in turns.
func (v isa) storePairs(a, b reg.VecVirtual, to Mem, n int) {
	for i, unpack := range []func(...Op){VUNPCKLPS, VUNPCKHPS} {
		x := XMM()
		unpack(b.AsX(), a.AsX(), x)
		switch to := to.Offset(16 * i); n - 2*i {
		case 1:
			VMOVLPS(x, to)
		case 2, 3, 4:
			VMOVUPS(x, to)
		}
	}
}

// broadcast returns what lies at m in all lanes.
func (v isa) broadcast(m Mem) reg.VecVirtual {
	x := v.vec()
	VBROADCASTSS(m, x)
	return x
}

// readF16 reads binary16 in units.
func (v isa) readF16(m Mem, unit reg.VecVirtual) reg.VecVirtual {
	x := v.vec()
	VCVTPH2PS(m, x)
	VMULPS(unit, x, x)
	return x
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
	v.function("readBins", "lo *float32, step *float32, src *byte, groups int, unit float32) (bad uint64")
	lo, step, src, left := param("lo"), param("step"), param("src"), param("groups")
	unit := v.broadcast(NewParamAddr("unit", 32))
	good := v.mask()
	Label("group")
	for part := range 16 / v.lanes {
		a, w := v.readF16(Mem{Base: src, Disp: 2 * v.lanes * part}, unit), v.readF16(Mem{Base: src, Disp: 32 + 2*v.lanes*part}, unit)
		VMOVUPS(a, Mem{Base: lo, Disp: 4 * v.lanes * part})
		VMOVUPS(w, Mem{Base: step, Disp: 4 * v.lanes * part})
		good.ofBins(a, w)
	}
	for _, r := range []reg.GPVirtual{lo, step, src} {
		ADDQ(Imm(64), r)
	}
	DECQ(left)
	JNZ(LabelRef("group"))
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

// ofBins passes bins of lower end a and size w that are in order.
func (m *lanesMask) ofBins(a, w reg.VecVirtual) {
	size, top := m.constant(U32(0x7fffffff)), m.vec()
	m.and(greaterOrEqual, m.constant(F32(0x1p-126)), w)
	VMULPS(m.constant(F32(255.5)), w, top)
	m.and(lessOrEqual, m.constant(maxFloat), top)
	VADDPS(a, top, top)
	m.isa.and(size, top)
	m.and(lessOrEqual, m.constant(maxFloat), top)
	t := m.vec()
	VMOVUPS(size, t)
	m.isa.and(a, t)
	m.and(lessOrEqual, m.constant(maxFloat), t)
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
