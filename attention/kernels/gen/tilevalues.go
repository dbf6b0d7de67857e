package main

import (
	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
	"github.com/mmcloughlin/avo/reg"
)

// A tile of sums has, of up to four rows, those of one set of codes in its upper half and those of the other one in its lower: the weights come
// above as many rows of zeros, and below them.
const (
	valueRows   = 4
	valueBlocks = 4                                 // of 64 tokens
	zeroRows    = 2 * valueRows * tileRow           // before the weights, and behind them
	blockWords  = zeroRows + 2*valueRows*tileRow    // of weights, with the zeros before them
	valueCodes  = valueBlocks*blockWords + zeroRows // of one block, both sets
	valueSums   = valueCodes + 8*tileSize
	valuesRoom  = valueSums + 4*tileSize
)

// Tiles of addValueTiles.
const (
	upperWords = words
	lowerWords = words + 1
)

// addValueTiles: bytes of four tokens are brought side by side, and are two sets of codes: with high and low nibble, and with the high one alone, so
// that sums of low nibbles are differences; or, of 8 bits, those of either nibble. They go through memory, 64 tokens at a time.
func (v isa) addValueTiles(shapes Mem) {
	v.function("addValueTiles", "out *[]float32, words *int16, place *float32, rows int, high *uintptr, low *uintptr, n int, d int, ahead int, room *byte")
	frame, full := room(valuesRoom), GP64()
	MOVQ(U32(tileRows), full)
	tileBegin(shapes, full)
	v.weightTiles(frame, param("rows"))
	col, block, width := slot(), GP64(), slot()
	zero(col)
	Label("columns")
	t := param("d")
	SHRQ(Imm(1), t)
	SUBQ(col, t)
	MOVQ(t, width)
	for i := range tile(4) {
		tileZero(sums0 + i)
	}
	XORQ(block, block)
	Label("block")
	v.unpackValues(frame, block, col, width)
	v.multiplyValues(frame, block)
	INCQ(block)
	t = GP64()
	MOVQ(block, t)
	SHLQ(Imm(6), t)
	CMPQ(t, param("n"))
	JL(LabelRef("block"))
	for i := range tile(4) {
		tileStore(sums0+i, Mem{Base: frame, Disp: valueSums + tileSize*int(i)})
	}
	v.writeValues(frame, col, width)
	ADDQ(Imm(64), col)
	t = param("d")
	SHRQ(Imm(1), t)
	CMPQ(t, col)
	JG(LabelRef("columns"))
	tileEnd()
}

func zero(m Mem) {
	t := GP64()
	XORQ(t, t)
	MOVQ(t, m)
}

// weightTiles makes tiles of the weights, one for each 64 tokens.
func (v isa) weightTiles(frame, rows reg.GPVirtual) {
	from, to, n, half, none := param("words"), GP64(), param("n"), ZMM(), ZMM()
	VMOVDQU64(v.constant(U32(0x00800080)), half)
	v.zero(none)
	MOVQ(frame, to)
	Label("weights")
	for r := range blockWords / tileRow {
		VMOVDQU64(none, Mem{Base: to, Disp: tileRow * r})
	}
	row, into, r := GP64(), GP64(), GP64()
	MOVQ(from, row)
	LEAQ(Mem{Base: to, Disp: zeroRows}, into)
	MOVQ(rows, r)
	Label("weightRow")
	for i := range 2 {
		w := ZMM()
		VMOVDQU64(Mem{Base: row, Disp: 64 * i}, w)
		h := highBytes(w, half, ZMM())
		VPMOVWB(h, Mem{Base: into, Disp: 32 * i})
		VPMOVWB(w, Mem{Base: into, Disp: 32*i + valueRows*tileRow})
	}
	ADDQ(U32(wordPitch), row)
	ADDQ(Imm(tileRow), into)
	DECQ(r)
	JNZ(LabelRef("weightRow"))
	ADDQ(U32(128), from)
	ADDQ(U32(blockWords), to)
	SUBQ(Imm(64), n)
	JG(LabelRef("weights"))
	for r := range zeroRows / tileRow {
		VMOVDQU64(none, Mem{Base: to, Disp: tileRow * r})
	}
}

// unpackValues brings the codes of the block's tokens into tiles.
func (v isa) unpackValues(frame, block reg.GPVirtual, col, width Mem) {
	first, n, high, low, to := GP64(), param("n"), param("high"), param("low"), GP64()
	LEAQ(Mem{Base: frame, Disp: valueCodes}, to)
	MOVQ(block, first)
	SHLQ(Imm(6), first)
	SUBQ(first, n)
	LEAQ(Mem{Base: high, Index: first, Scale: 8}, high)
	most, at, mask := GP64(), GP64(), v.columnMask("values", width)
	MOVQ(U32(64), most)
	CMPQ(n, most)
	CMOVQGT(most, n)
	MOVQ(col, at)
	nibbles, ahead := ZMM(), param("ahead")
	VMOVDQU64(v.constant(U32(0x0f0f0f0f)), nibbles)
	bits4 := func(x reg.VecVirtual) [2]reg.VecVirtual {
		y := ZMM()
		VPANDND(x, nibbles, y)
		return [2]reg.VecVirtual{x, y}
	}
	TESTQ(low, low)
	JNZ(LabelRef("bits8"))
	Label("bits4")
	for q, x := range v.interleaved(high, at, ahead, mask) {
		v.storeSets(to, q, bits4(x))
	}
	v.nextQuad("bits4", n, to, high)
	JMP(LabelRef("unpacked"))
	Label("bits8")
	LEAQ(Mem{Base: low, Index: first, Scale: 8}, low)
	Label("quad8")
	x, y := v.interleaved(high, at, ahead, mask), v.interleaved(low, at, ahead, mask)
	for q := range x {
		a, b := ZMM(), ZMM()
		VPSLLW(Imm(4), x[q], a)
		VPSRLW(Imm(4), y[q], b)
		v.storeSets(to, q, [2]reg.VecVirtual{v.choose(nibbles, y[q], a), v.choose(nibbles, b, x[q])})
	}
	ADDQ(Imm(32), low)
	v.nextQuad("quad8", n, to, high)
	Label("unpacked")
}

// storeSets stores a row of the q-th tile of both sets.
func (v isa) storeSets(to reg.GPVirtual, q int, sets [2]reg.VecVirtual) {
	for s, x := range sets {
		VMOVDQU64(x, Mem{Base: to, Disp: tileSize * (4*s + q)})
	}
}

// nextQuad goes on with the next four tokens.
func (v isa) nextQuad(label string, n, to, high reg.GPVirtual) {
	ADDQ(Imm(32), high)
	ADDQ(Imm(tileRow), to)
	SUBQ(Imm(4), n)
	JG(LabelRef(label))
}

// choose takes x where mask is set, else y.
func (v isa) choose(mask, x, y reg.VecVirtual) reg.VecVirtual {
	const firstChooses = 0xca
	out := ZMM()
	VMOVDQA64(mask, out)
	VPTERNLOGD(Imm(firstChooses), y, x, out)
	return out
}

// columnMask has a bit for each byte of a row's next 64 that is there.
func (v isa) columnMask(label string, width Mem) reg.OpmaskVirtual {
	n, ones, k := GP64(), GP64(), K()
	MOVQ(I32(-1), ones)
	MOVQ(width, n)
	CMPQ(n, Imm(64))
	JGE(LabelRef(label + "whole"))
	MOVQ(n, reg.RCX)
	MOVQ(U32(1), ones)
	SHLQ(reg.CL, ones)
	DECQ(ones)
	Label(label + "whole")
	KMOVQ(ones, k)
	return k
}

// interleaved brings the bytes of four tokens' rows side by side: four vectors, the q-th with bytes 4q to 4q + 3 of each 16.
func (v isa) interleaved(rows, at, ahead reg.GPVirtual, mask reg.OpmaskVirtual) (out [4]reg.VecVirtual) {
	var x [4]reg.VecVirtual
	for i := range x {
		row := GP64()
		x[i] = ZMM()
		MOVQ(at, row)
		ADDQ(Mem{Base: rows, Disp: 8 * i}, row)
		VMOVDQU8_Z(Mem{Base: row}, mask, x[i])
		PREFETCHT0(Mem{Base: row, Index: ahead, Scale: 1})
	}
	for half, bytes := range []func(...Op){VPUNPCKLBW, VPUNPCKHBW} {
		ab, cd := ZMM(), ZMM()
		bytes(x[1], x[0], ab)
		bytes(x[3], x[2], cd)
		out[2*half], out[2*half+1] = ZMM(), ZMM()
		VPUNPCKLWD(cd, ab, out[2*half])
		VPUNPCKHWD(cd, ab, out[2*half+1])
	}
	return out
}

// multiplyValues multiplies the block's codes.
func (v isa) multiplyValues(frame, block reg.GPVirtual) {
	w := GP64()
	IMUL3Q(U32(blockWords), block, w)
	ADDQ(frame, w)
	tileLoad(upperWords, Mem{Base: w, Disp: zeroRows})
	tileLoad(lowerWords, Mem{Base: w})
	for s, words := range []tile{upperWords, lowerWords} {
		for q := range 4 {
			t := codes + tile(q%2)
			tileLoad(t, Mem{Base: frame, Disp: valueCodes + tileSize*(4*s+q)})
			tileProducts(sums0+tile(q), words, t)
		}
	}
}

// writeValues adds what sums of codes stand for to the output.
func (v isa) writeValues(frame reg.GPVirtual, col, width Mem) {
	from, out, place, r := GP64(), param("out"), param("place"), param("rows")
	LEAQ(Mem{Base: frame, Disp: valueSums}, from)
	mask := GP64()
	KMOVQ(v.columnMask("out", width), mask)
	Label("outRow")
	scale, offset := ZMM(), ZMM()
	VBROADCASTSS(Mem{Base: place}, scale)
	VBROADCASTSS(Mem{Base: place, Disp: 4}, offset)
	var x [2][4]reg.VecVirtual // [nibbles][quarters]
	for q := range 4 {
		for s := range x {
			at := tileSize*q + 2*valueRows*tileRow*s
			x[s][q] = ZMM()
			VMOVDQU32(Mem{Base: from, Disp: at}, x[s][q])
			VPSLLD(Imm(8), x[s][q], x[s][q])
			VPADDD(Mem{Base: from, Disp: at + valueRows*tileRow}, x[s][q], x[s][q])
		}
	}
	low := param("low")
	TESTQ(low, low)
	JNZ(LabelRef("separate"))
	for q := range 4 {
		VPSUBD(x[1][q], x[0][q], x[0][q])
		VPSRAD(Imm(4), x[1][q], x[1][q])
	}
	Label("separate")
	to := GP64()
	MOVQ(Mem{Base: out}, to)
	c := GP64()
	MOVQ(col, c)
	LEAQ(Mem{Base: to, Index: c, Scale: 4}, to)
	for s := range x {
		for _, y := range x[s] {
			VCVTDQ2PS(y, y)
			VMULPS(scale, y, y)
			VADDPS(offset, y, y)
		}
		bits := GP64()
		MOVQ(mask, bits)
		for l, y := range v.lanesOf(x[s]) {
			k, z := K(), ZMM()
			KMOVW(bits.As32(), k)
			m := Mem{Base: to, Disp: 64 * l}
			VMOVUPS_Z(m, k, z)
			VADDPS(z, y, y)
			VMOVUPS(y, k, m)
			SHRQ(Imm(16), bits)
		}
		if s == 0 {
			half := param("d")
			LEAQ(Mem{Base: to, Index: half, Scale: 2}, to) // d/2 floats
		}
	}
	ADDQ(Imm(sliceSize), out)
	ADDQ(Imm(8), place)
	ADDQ(Imm(tileRow), from)
	DECQ(r)
	JNZ(LabelRef("outRow"))
}

// lanesOf makes of the l-th 128-bit lanes of four vectors the l-th vector.
func (v isa) lanesOf(x [4]reg.VecVirtual) (out [4]reg.VecVirtual) {
	var lo, hi [2]reg.VecVirtual
	for i := range 2 {
		lo[i], hi[i] = ZMM(), ZMM()
		VSHUFF32X4(Imm(0x44), x[2*i+1], x[2*i], lo[i])
		VSHUFF32X4(Imm(0xee), x[2*i+1], x[2*i], hi[i])
	}
	for l := range out {
		out[l] = ZMM()
		from, which := lo, uint64(0x88)
		if l >= 2 {
			from = hi
		}
		if l%2 == 1 {
			which = 0xdd
		}
		VSHUFF32X4(Imm(which), from[1], from[0], out[l])
	}
	return out
}
