package main

import (
	"fmt"

	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
	"github.com/mmcloughlin/avo/reg"
)

// addRows: some channels after the other, over all rows; of each the sum stays in a register.
func (v isa) addRows() {
	v.function("addRows", "sum *float64, x *float32, n int, d int")
	sum, x, left, pitch := param("sum"), param("x"), param("d"), param("d")
	SHLQ(Imm(2), pitch)
	half := v.lanes / 2 // doubles in a vector
	for _, tile := range []int{8, 2} {
		label := fmt.Sprintf("channels%d", tile)
		channels := uint64(tile * half)
		Label(label)
		CMPQ(left, Imm(channels))
		JL(LabelRef(label + "end"))
		acc := make([]reg.VecVirtual, tile)
		for i := range acc {
			acc[i] = v.vec()
			VMOVUPD(Mem{Base: sum, Disp: 8 * half * i}, acc[i])
		}
		row, n := GP64(), param("n")
		MOVQ(x, row)
		Label(label + "rows")
		for i := range acc {
			t := v.vec()
			VCVTPS2PD(Mem{Base: row, Disp: 4 * half * i}, t)
			VADDPD(t, acc[i], acc[i])
		}
		ADDQ(pitch, row)
		DECQ(n)
		JNZ(LabelRef(label + "rows"))
		for i := range acc {
			VMOVUPD(acc[i], Mem{Base: sum, Disp: 8 * half * i})
		}
		ADDQ(U32(8*channels), sum)
		ADDQ(U32(4*channels), x)
		SUBQ(Imm(channels), left)
		JMP(LabelRef(label))
		Label(label + "end")
	}
	end()
}

// deviations: row by row, 16 channels at a time.
func (v isa) deviations() {
	v.function("deviations", "dst *float32, x *float32, row *float32, n int, d int")
	dst, x, n := param("dst"), param("x"), param("n")
	Label("rows")
	row, left := param("row"), param("d")
	Label("channels")
	for i := range 16 / v.lanes {
		y := v.vec()
		VMOVUPS(Mem{Base: x, Disp: 4 * v.lanes * i}, y)
		VSUBPS(Mem{Base: row, Disp: 4 * v.lanes * i}, y, y)
		VMOVUPS(y, Mem{Base: dst, Disp: 4 * v.lanes * i})
	}
	for _, r := range []reg.GPVirtual{dst, x, row} {
		ADDQ(Imm(64), r)
	}
	SUBQ(Imm(16), left)
	JNZ(LabelRef("channels"))
	DECQ(n)
	JNZ(LabelRef("rows"))
	end()
}

// extremes: a vector of channels after the other, over all rows.
func (v isa) extremes() {
	v.function("extremes", "lo *float32, hi *float32, x *float32, n int, d int")
	lo, hi, x, d, left := param("lo"), param("hi"), param("x"), param("d"), param("d")
	SHLQ(Imm(2), d)
	Label("channels")
	least, most := v.vec(), v.vec()
	VMOVUPS(Mem{Base: lo}, least)
	VMOVUPS(Mem{Base: hi}, most)
	row, n := GP64(), param("n")
	MOVQ(x, row)
	Label("rows")
	VMINPS(Mem{Base: row}, least, least)
	VMAXPS(Mem{Base: row}, most, most)
	ADDQ(d, row)
	DECQ(n)
	JNZ(LabelRef("rows"))
	VMOVUPS(least, Mem{Base: lo})
	VMOVUPS(most, Mem{Base: hi})
	for _, r := range []reg.GPVirtual{lo, hi, x} {
		ADDQ(Imm(uint64(4*v.lanes)), r)
	}
	SUBQ(Imm(uint64(v.lanes)), left)
	JNZ(LabelRef("channels"))
	end()
}

// quantise: nothing is fused, so that all kernels compute the same codes.
func (v isa) quantise() {
	v.function("quantise", "dst *byte, x *float32, n int, d int, lo *float32, inverse *float32, zero float32")
	dst, x, n := param("dst"), param("x"), param("n")
	zero := v.vec()
	VBROADCASTSS(NewParamAddr("zero", 48), zero)
	Label("row")
	lo, inverse, left := param("lo"), param("inverse"), param("d")
	Label("channels")
	codes := make([]reg.VecVirtual, 16/v.lanes)
	for i := range codes {
		at := 4 * v.lanes * i
		y := v.vec()
		VMOVUPS(Mem{Base: x, Disp: at}, y)
		VSUBPS(Mem{Base: lo, Disp: at}, y, y)
		VMULPS(Mem{Base: inverse, Disp: at}, y, y)
		VADDPS(zero, y, y)
		VMAXPS(v.constant(F32(0)), y, y)
		VMINPS(v.constant(F32(255)), y, y)
		VCVTTPS2DQ(y, y)
		codes[i] = y
	}
	v.storeBytes(codes, Mem{Base: dst})
	ADDQ(Imm(16), dst)
	for _, r := range []reg.GPVirtual{x, lo, inverse} {
		ADDQ(Imm(64), r)
	}
	SUBQ(Imm(16), left)
	JNZ(LabelRef("channels"))
	DECQ(n)
	JNZ(LabelRef("row"))
	end()
}

// storeBytes narrows 16 integers from 0 to 255 to bytes.
func (v isa) storeBytes(codes []reg.VecVirtual, dst Mem) {
	if v.lanes == 16 {
		VPMOVDB(codes[0], dst)
		return
	}
	words, high := YMM(), XMM()
	VPACKUSDW(codes[1], codes[0], words)
	VPERMQ(Imm(0b11011000), words, words)
	VEXTRACTI128(Imm(1), words, high)
	VPACKUSWB(high, words.AsX(), high)
	VMOVUPS(high, dst)
}

// quantiseBlock: 16 tokens lie in the lanes of vectors, so that channels follow one another without any sum across lanes. As
// in quantise, nothing is fused.
func (v isa) quantiseBlock() {
	v.function("quantiseBlock", "codes *byte, target *float32, x *float32, d int, lo *float32, step *float32, inverse *float32, feedback *float32")
	codes, target, x, left, stride := param("codes"), param("target"), param("x"), param("d"), param("d")
	lo, step, inverse, feedback := param("lo"), param("step"), param("inverse"), param("feedback")
	LEAQ(Mem{Base: stride, Index: stride, Scale: 1, Disp: 2}, stride) // from one channel's feedback to the next one's, which begins a place later
	SHLQ(Imm(1), stride)
	ADDQ(Imm(4), feedback)
	Label("channel")
	low, width, inv := v.vec(), v.vec(), v.vec()
	VBROADCASTSS(Mem{Base: lo}, low)
	VBROADCASTSS(Mem{Base: step}, width)
	VBROADCASTSS(Mem{Base: inverse}, inv)
	bins, errors := make([]reg.VecVirtual, 16/v.lanes), make([]reg.VecVirtual, 16/v.lanes)
	for i := range bins {
		at := 4 * v.lanes * i
		y, e, bin, t := v.vec(), v.vec(), v.vec(), v.vec()
		VMOVUPS(Mem{Base: x, Disp: at}, e)
		VSUBPS(low, e, bin)
		VMULPS(inv, bin, bin)
		VMOVUPS(Mem{Base: target, Disp: at}, y)
		VSUBPS(low, y, y)
		VMULPS(inv, y, y)
		VSUBPS(v.constant(F32(4)), bin, t) // no more than MostFeedback away
		VMAXPS(t, y, y)
		VADDPS(v.constant(F32(4)), bin, t)
		VMINPS(t, y, y)
		VMAXPS(v.constant(F32(0)), y, y)
		VMINPS(v.constant(F32(255)), y, y)
		VCVTTPS2DQ(y, y)
		bins[i] = y
		middle := v.vec()
		VCVTDQ2PS(y, middle)
		VADDPS(v.constant(F32(.5)), middle, middle)
		VMULPS(width, middle, middle)
		VADDPS(low, middle, middle)
		VSUBPS(middle, e, e)
		errors[i] = e
	}
	v.storeBytes(bins, Mem{Base: codes})
	DECQ(left)
	JZ(LabelRef("done"))
	ADDQ(Imm(16), codes)
	for _, r := range []reg.GPVirtual{target, x} {
		ADDQ(Imm(64), r)
	}
	for _, r := range []reg.GPVirtual{lo, step, inverse} {
		ADDQ(Imm(4), r)
	}
	at, from, n := GP64(), GP64(), GP64()
	MOVQ(target, at)
	MOVQ(feedback, from)
	MOVQ(left, n)
	Label("behind")
	f := v.vec()
	VBROADCASTSS(Mem{Base: from}, f)
	for i, e := range errors {
		t := v.vec()
		VMULPS(e, f, t)
		VADDPS(Mem{Base: at, Disp: 4 * v.lanes * i}, t, t)
		VMOVUPS(t, Mem{Base: at, Disp: 4 * v.lanes * i})
	}
	ADDQ(Imm(4), from)
	ADDQ(Imm(64), at)
	DECQ(n)
	JNZ(LabelRef("behind"))
	ADDQ(stride, feedback)
	JMP(LabelRef("channel"))
	Label("done")
	end()
}

// hadamard: butterflies at distance 1, 2 and so on within vectors, by exchanging lanes and adding with
// signs; then between vectors, the pairs of each distance one after the other.
func (v isa) hadamard() {
	v.function("hadamard", "x *float32, n int")
	x, n := param("x"), param("n")
	signs := map[int]reg.VecVirtual{}
	for h := 1; h < v.lanes; h *= 2 {
		name := fmt.Sprintf("butterfly%d%s", h, v.suffix)
		m := GLOBL(name, RODATA|NOPTR)
		for i := range 16 {
			sign := uint32(0)
			if i&h != 0 {
				sign = 1 << 31
			}
			DATA(4*i, U32(sign))
		}
		signs[h] = v.vec()
		VMOVUPS(m, signs[h])
	}
	at, behind := GP64(), GP64()
	MOVQ(x, at)
	LEAQ(Mem{Base: x, Index: n, Scale: 4}, behind)
	Label("within")
	y := v.vec()
	VMOVUPS(Mem{Base: at}, y)
	for h := 1; h < v.lanes; h *= 2 {
		other := v.exchange(y, h)
		t := v.vec()
		VXORPS(y, signs[h], t) // the second of a pair: other - y
		VADDPS(t, other, y)
	}
	VMOVUPS(y, Mem{Base: at})
	ADDQ(Imm(uint64(4*v.lanes)), at)
	CMPQ(at, behind)
	JL(LabelRef("within"))
	step, low := GP64(), GP64()
	MOVQ(U32(uint64(4*v.lanes)), step)
	SHLQ(Imm(2), n)
	Label("distance")
	CMPQ(step, n)
	JGE(LabelRef("done"))
	MOVQ(x, low)
	Label("block")
	until := GP64()
	LEAQ(Mem{Base: low, Index: step, Scale: 1}, until)
	Label("pair")
	a, b, sum := v.vec(), v.vec(), v.vec()
	VMOVUPS(Mem{Base: low}, a)
	VMOVUPS(Mem{Base: low, Index: step, Scale: 1}, b)
	VADDPS(b, a, sum)
	VSUBPS(b, a, a)
	VMOVUPS(sum, Mem{Base: low})
	VMOVUPS(a, Mem{Base: low, Index: step, Scale: 1})
	ADDQ(Imm(uint64(4*v.lanes)), low)
	CMPQ(low, until)
	JL(LabelRef("pair"))
	ADDQ(step, low)
	CMPQ(low, behind)
	JL(LabelRef("block"))
	SHLQ(Imm(1), step)
	JMP(LabelRef("distance"))
	Label("done")
	end()
}

// exchange returns x with each lane in the place of the one h away.
func (v isa) exchange(x reg.VecVirtual, h int) reg.VecVirtual {
	y := v.vec()
	switch {
	case h == 1:
		VSHUFPS(Imm(0b10110001), x, x, y)
	case h == 2:
		VSHUFPS(Imm(0b01001110), x, x, y)
	case h == 4 && v.lanes == 8:
		VPERM2F128(Imm(1), x, x, y)
	case h == 4:
		VSHUFF32X4(Imm(0b10110001), x, x, y)
	default:
		VSHUFF32X4(Imm(0b01001110), x, x, y)
	}
	return y
}
