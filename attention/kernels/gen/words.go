package main

import (
	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
	"github.com/mmcloughlin/avo/reg"
)

// toWords makes whole numbers of 16 bits of rows of floats. Magnitudes are compared as integers, in whose order what is infinite or no number comes last.
func (v isa) toWords() {
	v.function("toWords", "words *int16, scale *float32, x *float32, rows int, d int")
	words, scale, x, rows, d, i := param("words"), param("scale"), param("x"), param("rows"), param("d"), GP64()
	SHLQ(Imm(2), d) // in bytes of floats
	Label("row")
	most, t := v.vec(), v.vec()
	VMOVUPS(v.constant(leastWeight), most)
	XORQ(i, i)
	Label("most")
	VMOVUPS(Mem{Base: x, Index: i, Scale: 1}, t)
	v.and(v.constant(U32(0x7fffffff)), t)
	VPMAXUD(t, most, most)
	ADDQ(Imm(uint64(4*v.lanes)), i)
	CMPQ(i, d)
	JL(LabelRef("most"))
	bound, inverse := v.scalar(most, VPMAXUD), v.vec()
	VMOVSS(v.constant(F32(mostWeight)), inverse.AsX())
	VDIVSS(bound, inverse.AsX(), inverse.AsX())
	VDIVSS(v.constant(F32(mostWeight)), bound, bound)
	VMOVSS(bound, Mem{Base: scale})
	VBROADCASTSS(inverse.AsX(), inverse)
	XORQ(i, i)
	Label("words")
	y := v.vec()
	VMULPS(Mem{Base: x, Index: i, Scale: 1}, inverse, y)
	VCVTPS2DQ(y, y)
	v.storeWords(y, Mem{Base: words})
	ADDQ(Imm(uint64(2*v.lanes)), words)
	ADDQ(Imm(uint64(4*v.lanes)), i)
	CMPQ(i, d)
	JL(LabelRef("words"))
	ADDQ(d, x)
	ADDQ(Imm(4), scale)
	DECQ(rows)
	JNZ(LabelRef("row"))
	end()
}

// dotsWords is dots of rows of words and of signed bytes.
func (v isa) dotsWords() {
	v.function("dotsWords", "dst *float32, stride int, words *int16, scale *float32, rows int, k *byte, n int, d int")
	dst, stride, words, scale, rows, d := param("dst"), param("stride"), param("words"), param("scale"), param("rows"), param("d")
	d3 := triple(d)
	v.tokenTiles(dst, stride, rows, d, d3, 1, dotTiles{
		sums: func(label string, k reg.GPVirtual, r, tokens int) []reg.VecVirtual {
			return v.wordTile(label, words, k, d, d3, r, tokens)
		},
		dots: func(i int, sums []reg.VecVirtual) reg.VecVirtual {
			x, factor := v.across(sums, VPADDD), XMM()
			VBROADCASTSS(Mem{Base: scale, Disp: 4 * i}, factor)
			VCVTDQ2PS(x, x)
			VMULPS(factor, x, x)
			return x
		},
		next: func(r int) {
			for range r {
				LEAQ(Mem{Base: words, Index: d, Scale: 2}, words)
			}
			ADDQ(Imm(uint64(4*r)), scale)
		},
	})
}

// wordTile sums products of r rows and some tokens.
func (v isa) wordTile(label string, words, k, d, d3 reg.GPVirtual, r, tokens int) []reg.VecVirtual {
	acc := v.zeros(r * tokens)
	ww, kk, i := GP64(), GP64(), GP64()
	MOVQ(words, ww)
	MOVQ(k, kk)
	MOVQ(d, i)
	if v.lanes == 16 { // of the last 16 channels, if they are no whole vector, the upper half is 0
		Label(label + "dims")
		CMPQ(i, Imm(32))
		JL(LabelRef(label + "rest"))
		v.addWordProducts(acc, func() reg.VecVirtual { return ZMM() }, ww, kk, d, d3, r, tokens)
		ADDQ(Imm(64), ww)
		ADDQ(Imm(32), kk)
		SUBQ(Imm(32), i)
		JMP(LabelRef(label + "dims"))
		Label(label + "rest")
		TESTQ(i, i)
		JZ(LabelRef(label + "done"))
		v.addWordProducts(acc, func() reg.VecVirtual { return YMM() }, ww, kk, d, d3, r, tokens)
		Label(label + "done")
		return acc
	}
	Label(label + "dims")
	v.addWordProducts(acc, v.vec, ww, kk, d, d3, r, tokens)
	ADDQ(Imm(32), ww)
	ADDQ(Imm(16), kk)
	SUBQ(Imm(16), i)
	JNZ(LabelRef(label + "dims"))
	return acc
}

// addWordProducts loads as many channels as vec has words of each token, and multiplies them with each row's.
func (v isa) addWordProducts(acc []reg.VecVirtual, vec func() reg.VecVirtual, ww, kk, d, d3 reg.GPVirtual, r, tokens int) {
	key := make([]reg.VecVirtual, tokens)
	for t := range key {
		key[t] = vec()
		m := strided(kk, d, d3, 1, t)
		VPMOVSXBW(m, key[t])
		m.Disp = ahead
		PREFETCHT1(m)
	}
	for j := range r {
		x := vec()
		VMOVUPS(strided(ww, d, d3, 2, j), x)
		for t := range key {
			a := acc[j*tokens+t]
			if v.lanes == 16 {
				VPDPWSSD(key[t].AsZ(), x.AsZ(), a)
				continue
			}
			y := vec()
			VPMADDWD(key[t], x, y)
			VPADDD(y, a, a)
		}
	}
}
