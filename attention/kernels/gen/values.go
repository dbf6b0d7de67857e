package main

import (
	"fmt"

	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
	"github.com/mmcloughlin/avo/reg"
)

// wordPitch is from row to row of a batch's words, in bytes.
const wordPitch = 512

// weigh makes whole numbers of 16 bits of weights times steps, and sums them times offsets: of four rows at
// once, the last one for those that are missing.
func (v isa) weigh() {
	v.function("weigh", "words *int16, place *float32, w *float32, stride int, rows int, step *float32, offset *float32, n int, unit float32")
	words, place, stride, rows, n := param("words"), param("place"), param("stride"), param("rows"), param("n")
	step, offset, i := param("step"), param("offset"), GP64()
	SHLQ(Imm(2), stride)
	SHLQ(Imm(2), n) // in bytes of floats
	row := [4]reg.GPVirtual{param("w")}
	for r := 1; r < len(row); r++ {
		next := GP64()
		LEAQ(Mem{Base: row[r-1], Index: stride, Scale: 1}, next)
		CMPQ(rows, Imm(uint64(r)))
		CMOVQLE(row[r-1], next)
		row[r] = next
	}
	product := func(r int) reg.VecVirtual {
		x := v.vec()
		VMOVUPS(Mem{Base: row[r], Index: i, Scale: 1}, x)
		VMULPS(Mem{Base: step, Index: i, Scale: 1}, x, x)
		return x
	}
	most := make([]reg.VecVirtual, len(row))
	for r := range most {
		most[r] = v.vec()
		VMOVUPS(v.constant(leastWeight), most[r])
	}
	XORQ(i, i)
	Label("most")
	for r := range row {
		x := product(r)
		v.and(v.constant(U32(0x7fffffff)), x)
		VMAXPS(x, most[r], most[r])
	}
	ADDQ(Imm(uint64(4*v.lanes)), i)
	CMPQ(i, n)
	JL(LabelRef("most"))
	bounds := v.narrow(v.transposed(most, VMAXPS), VMAXPS)
	scale, inverse := XMM(), XMM()
	VMOVUPS(v.constant(F32(mostWeight)), inverse)
	VDIVPS(inverse, bounds, scale)
	VDIVPS(bounds, inverse, inverse)
	sums, inverses := v.zeros(len(row)), make([]reg.VecVirtual, len(row))
	for r := range inverses {
		x := XMM()
		VSHUFPS(Imm(uint64(0x55*r)), inverse, inverse, x)
		inverses[r] = v.vec()
		VBROADCASTSS(x, inverses[r])
	}
	XORQ(i, i)
	Label("words")
	for r := range row {
		x := product(r)
		VMULPS(inverses[r], x, x)
		v.round(x)
		VFMADD231PS(Mem{Base: offset, Index: i, Scale: 1}, x, sums[r])
		VCVTPS2DQ(x, x)
		v.storeWords(x, Mem{Base: words, Disp: wordPitch * r})
	}
	ADDQ(Imm(uint64(2*v.lanes)), words)
	ADDQ(Imm(uint64(4*v.lanes)), i)
	CMPQ(i, n)
	JL(LabelRef("words"))
	total, unit, out := v.narrow(v.transposed(sums, VADDPS), VADDPS), XMM(), XMM()
	VMULPS(scale, total, total)
	VBROADCASTSS(NewParamAddr("unit", 64), unit)
	VMULPS(unit, scale, scale)
	VUNPCKLPS(total, scale, out)
	VMOVUPS(out, Mem{Base: place})
	VUNPCKHPS(total, scale, out)
	VMOVUPS(out, Mem{Base: place, Disp: 16})
	end()
}

// storeWords narrows integers to words.
func (v isa) storeWords(x reg.VecVirtual, to Mem) {
	if v.lanes == 16 {
		VPMOVDW(x, to)
		return
	}
	high := XMM()
	VEXTRACTI128(Imm(1), x, high)
	VPACKSSDW(high, x.AsX(), high)
	VMOVUPS(high, to)
}

// readValueScales: of three bytes each, 4 tokens at a time.
func (v isa) readValueScales() {
	table := GLOBL("scaleBytes"+v.suffix, RODATA|NOPTR)
	for t := range 4 {
		DATA(4*t, U32(0x80020100+0x030303*t)) // 0x80 gives 0
	}
	v.function("readValueScales", "step *float32, offset *float32, src *byte, n int, middle float32")
	step, offset, src, n, middle := param("step"), param("offset"), param("src"), param("n"), XMM()
	VBROADCASTSS(NewParamAddr("middle", 32), middle)
	Label("tokens")
	x, y := XMM(), XMM()
	VMOVQ(Mem{Base: src}, x)
	VPINSRD(Imm(2), Mem{Base: src, Disp: 8}, x, x)
	VPSHUFB(table, x, x)
	VPSLLD(Imm(16), x, y)
	VPSRLD(Imm(1), y, y)
	VMOVUPS(y, Mem{Base: step})
	VPSRLD(Imm(16), x, x)
	VCVTDQ2PS(x, x)
	VSUBPS(x, middle, x)
	VMOVUPS(x, Mem{Base: offset})
	ADDQ(Imm(12), src)
	ADDQ(Imm(16), step)
	ADDQ(Imm(16), offset)
	SUBQ(Imm(4), n)
	JNZ(LabelRef("tokens"))
	end()
}

// Of the Go loop.
const (
	leastWeight F32 = 0x1p-110
	mostWeight      = 127<<8 | 127
)

// round rounds to whole numbers, halves to even ones.
func (v isa) round(x reg.VecVirtual) {
	if v.lanes == 16 {
		VRNDSCALEPS(Imm(0), x, x)
	} else {
		VROUNDPS(Imm(0), x, x)
	}
}

// addValues: bytes of four tokens are brought side by side, so that words of two
// tokens lie in each lane; these are multiplied with two tokens' weights and added at once.
func (v isa) addValues() {
	v.function("addValues", "out *[]float32, words *int16, place *float32, rows int, high *uintptr, low *uintptr, n int, d int, ahead int")
	out, words, place, rows := param("out"), param("words"), param("place"), param("rows")
	rowBlocks(v.rows, rows, func(r int) {
		col := GP64()
		XORQ(col, col)
		for _, bytes := range v.valueTiles() {
			t := &valueTile{isa: v, bytes: bytes, r: r, col: col, words: words}
			label := fmt.Sprintf("cols%dx%d", bytes, r)
			Label(label)
			left := param("d")
			SHRQ(Imm(1), left)
			SUBQ(col, left)
			CMPQ(left, Imm(uint64(bytes)))
			JL(LabelRef(label + "end"))
			for half := range t.halves() {
				at := fmt.Sprintf("%shalf%d", label, half)
				low := param("low")
				TESTQ(low, low)
				JNZ(LabelRef(at + "low"))
				t.sum(at+"bits4", half, nil)
				JMP(LabelRef(at + "add"))
				Label(at + "low")
				t.sum(at+"bits8", half, low)
				Label(at + "add")
				t.add(out, place, half)
			}
			ADDQ(Imm(uint64(bytes)), col)
			JMP(LabelRef(label))
			Label(label + "end")
		}
		ADDQ(Imm(uint64(sliceSize*r)), out)
		ADDQ(Imm(uint64(8*r)), place)
		ADDQ(U32(uint64(wordPitch*r)), words)
	})
}

// valueTiles: rows of codes are a multiple of 8 bytes.
func (v isa) valueTiles() []int {
	if v.lanes == 16 {
		return []int{64, 32, 8}
	}
	return []int{32, 8}
}

// valueTile is some bytes of codes of all tokens: twice as many channels. Of each 16
// bytes one half is summed after the other.
type valueTile struct {
	isa
	bytes      int
	r          int // rows
	col, words reg.GPVirtual
	acc        []reg.VecVirtual // [rows][nibbles][quarters]
}

// halves says in how many steps the tile's bytes are summed.
func (t *valueTile) halves() int { return min(2, t.bytes/8) }

// weights returns rows' words for a pair of tokens, as operands of addWords. They are used four times: in registers, if there are enough of them.
func (t *valueTile) weights(w reg.GPVirtual, pair int) []Op {
	out := make([]Op, t.r)
	for i := range out {
		m := Mem{Base: w, Disp: wordPitch*i + 4*pair}
		if out[i] = m; t.lanes == 16 {
			x := t.vec()
			VPBROADCASTD(m, x)
			out[i] = x
		}
	}
	return out
}

// addWords adds to acc the products of two words of each lane with weights.
func (t *valueTile) addWords(acc, x reg.VecVirtual, weights Op) {
	if t.lanes == 16 {
		VPDPWSSD(weights, x, acc)
		return
	}
	y := t.vec()
	VPBROADCASTD(weights, y)
	VPMADDWD(x, y, y)
	VPADDD(y, acc, acc)
}

// vec returns a new register as wide as the tile, of 16 bytes at least.
func (t *valueTile) vec() reg.VecVirtual {
	switch t.bytes {
	case 64:
		return ZMM()
	case 32:
		return YMM()
	}
	return XMM()
}

func (t *valueTile) at(i, nibble, quarter int) *reg.VecVirtual {
	return &t.acc[(i*2+nibble)*2+quarter]
}

// sum goes through all tokens, four at a time.
func (t *valueTile) sum(label string, half int, low reg.Register) {
	if t.acc == nil {
		for range 4 * t.r {
			t.acc = append(t.acc, t.vec())
		}
	}
	for _, x := range t.acc {
		t.zero(x)
	}
	high, n, w := param("high"), param("n"), GP64()
	MOVQ(t.words, w)
	Label(label)
	h := t.interleave(high, half)
	var l [2]reg.VecVirtual
	if low != nil {
		l = t.interleave(low, half)
		ADDQ(Imm(32), low)
	}
	for pair := range 2 {
		weights := t.weights(w, pair)
		for quarter := range 2 {
			for nibble, x := range t.codes(h[quarter], l[quarter], pair) {
				for i := range t.r {
					t.addWords(*t.at(i, nibble, quarter), x, weights[i])
				}
			}
		}
	}
	ADDQ(Imm(32), high)
	ADDQ(Imm(8), w)
	SUBQ(Imm(4), n)
	JG(LabelRef(label))
	if low != nil {
		return
	}
	for i := range t.r { // sums of whole bytes less those of low nibbles are 16 times those of high ones
		for quarter := range 2 {
			low, high := *t.at(i, 0, quarter), *t.at(i, 1, quarter)
			VPSUBD(low, high, high)
			VPSRAD(Imm(4), high, high)
		}
	}
}

// interleave returns bytes of four tokens, each of two quarters of every 16: a lane holds the
// same byte of the first, the third, the second and the fourth token.
func (t *valueTile) interleave(rows reg.Register, half int) (out [2]reg.VecVirtual) {
	var x [4]reg.VecVirtual
	for i := range x {
		row := GP64()
		MOVQ(Mem{Base: rows, Disp: 8 * i}, row)
		x[i] = t.vec()
		m := Mem{Base: row, Index: t.col, Scale: 1}
		if t.bytes == 8 {
			VMOVQ(m, x[i])
		} else {
			VMOVUPS(m, x[i])
		}
		if half == 0 {
			ahead := param("ahead")
			ADDQ(row, ahead)
			PREFETCHT0(Mem{Base: ahead, Index: t.col, Scale: 1})
		}
	}
	unpack := VPUNPCKLBW
	if half == 1 {
		unpack = VPUNPCKHBW
	}
	unpack(x[2], x[0], x[0])
	unpack(x[3], x[1], x[1])
	out = [2]reg.VecVirtual{x[2], x[3]}
	VPUNPCKLWD(x[1], x[0], out[0])
	VPUNPCKHWD(x[1], x[0], out[1])
	return out
}

// codes returns words of two tokens, the first two of a lane or the others: of high codes alone low nibbles and whole bytes; with low
// codes, which are nil if there are none, the 8 bits of either nibble.
func (t *valueTile) codes(high, low reg.VecVirtual, pair int) (x [2]reg.VecVirtual) {
	mask := t.constant(U32(0x000f000f))
	if low == nil {
		x[0], x[1] = t.vec(), t.shifted(high, -8*pair)
		t.andOf(mask, x[1], x[0])
		if pair == 0 {
			x[1] = t.vec()
			t.andOf(t.constant(U32(0x00ff00ff)), high, x[1])
		}
		return x
	}
	for nibble := range x {
		up := -4*nibble - 8*pair
		x[nibble] = t.vec()
		t.andOf(t.constant(U32(0x00f000f0)), t.shifted(high, up+4), x[nibble])
		y := t.shifted(low, up)
		if t.lanes == 16 {
			const orOfAnd = 0xf8
			VPTERNLOGD(Imm(orOfAnd), mask, y, x[nibble])
			continue
		}
		z := t.vec()
		VPAND(mask, y, z)
		VPOR(z, x[nibble], x[nibble])
	}
	return x
}

// shifted is isa's in a register as wide as the tile.
func (t *valueTile) shifted(x reg.VecVirtual, up int) reg.VecVirtual {
	if up == 0 {
		return x
	}
	y := t.vec()
	t.shift(x, up, y)
	return y
}

// add adds what the sums stand for to the output.
func (t *valueTile) add(out, place reg.GPVirtual, half int) {
	for i := range t.r {
		scale, offset := t.vec(), t.vec()
		VBROADCASTSS(Mem{Base: place, Disp: 8 * i}, scale)
		VBROADCASTSS(Mem{Base: place, Disp: 8*i + 4}, offset)
		to := rowOf(out, i)
		for nibble := range 2 {
			var x [2]reg.VecVirtual
			for quarter := range x {
				x[quarter] = *t.at(i, nibble, quarter)
				VCVTDQ2PS(x[quarter], x[quarter])
				VMULPS(scale, x[quarter], x[quarter])
				VADDPS(offset, x[quarter], x[quarter])
			}
			t.addHalves(x[0], x[1], Mem{Base: to, Index: t.col, Scale: 4, Disp: 32 * half})
			if nibble == 0 {
				LEAQ(Mem{Base: to, Index: param("d"), Scale: 2}, to) // d/2 floats
			}
		}
	}
}

// addHalves adds, of each 16 floats from m, the first 4 numbers of a 128-bit lane of a, then those of b.
func (t *valueTile) addHalves(a, b reg.VecVirtual, m Mem) {
	switch {
	case t.bytes == 64:
		high := [2]reg.VecVirtual{YMM(), YMM()}
		VEXTRACTF64X4(Imm(1), a, high[0])
		VEXTRACTF64X4(Imm(1), b, high[1])
		t.addLanes(a.AsY(), b.AsY(), m)
		m.Disp += 128
		t.addLanes(high[0], high[1], m)
	case t.bytes == 32:
		t.addLanes(a, b, m)
	default:
		for _, x := range []reg.VecVirtual{a, b} {
			t.addTo(m, x)
			m.Disp += 16
		}
	}
}

// addLanes is addHalves of two lanes.
func (t *valueTile) addLanes(a, b reg.Register, m Mem) {
	lo, hi := YMM(), YMM()
	if t.lanes == 16 {
		VSHUFF32X4(Imm(0), b, a, lo)
		VSHUFF32X4(Imm(3), b, a, hi)
	} else {
		VPERM2F128(Imm(0x20), b, a, lo)
		VPERM2F128(Imm(0x31), b, a, hi)
	}
	t.addTo(m, lo)
	m.Disp += 64
	t.addTo(m, hi)
}
