package main

import (
	"fmt"

	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
	"github.com/mmcloughlin/avo/reg"
)

// The exponential is that of Cephes' expf: with n the nearest whole number to
// x/ln 2 and r = x - n ln 2, exp(x) = 2^n (1 + r + r^2 p(r)).
const (
	ln2High = .693359375
	ln2Low  = -2.12194440e-4
)

var expPolynomial = []F32{1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1}

func (v isa) weights() {
	v.function("weights", "dst *float32, x *float32, n int, top float32) (sum float32")
	dst, at, n := param("dst"), param("x"), param("n")
	top, sum := v.vec(), v.vec()
	VBROADCASTSS(NewParamAddr("top", 24), top)
	v.zero(sum)
	Label("loop")
	x := v.vec()
	VMOVUPS(Mem{Base: at}, x)
	VSUBPS(top, x, x)
	keep := v.notBelow(x, v.constant(F32(-87)))
	e := v.exp(x)
	keep(e)
	VMOVUPS(e, Mem{Base: dst})
	VADDPS(e, sum, sum)
	ADDQ(Imm(uint64(4*v.lanes)), dst)
	ADDQ(Imm(uint64(4*v.lanes)), at)
	SUBQ(Imm(uint64(v.lanes)), n)
	JNZ(LabelRef("loop"))
	Store(v.scalar(sum, VADDPS), Return("sum"))
	end()
}

// notBelow returns what clears lanes where x was below limit, or no number.
func (v isa) notBelow(x reg.VecVirtual, limit Mem) (keep func(reg.VecVirtual)) {
	return v.keep(greaterOrEqual, limit, x)
}

// Predicates of comparisons, which no NaN passes.
const greater, greaterOrEqual, lessOrEqual = U8(0x1e), U8(0x1d), U8(0x12)

// keep returns what clears lanes where x is not as predicate says, compared with y.
func (v isa) keep(predicate U8, y Op, x reg.VecVirtual) func(reg.VecVirtual) {
	if v.lanes == 16 {
		mask := K()
		VCMPPS(predicate, y, x, mask)
		return func(z reg.VecVirtual) { VMOVAPS_Z(z, mask, z) }
	}
	mask := YMM()
	VCMPPS(predicate, y, x, mask)
	return func(z reg.VecVirtual) { VANDPS(mask, z, z) }
}

// exp returns exp(x) for x in -87..0; what is outside is taken for its end.
func (v isa) exp(x reg.VecVirtual) reg.VecVirtual {
	VMINPS(v.constant(F32(0)), x, x)
	VMAXPS(v.constant(F32(-87)), x, x)
	n := v.vec()
	VMULPS(v.constant(F32(1.44269504088896341)), x, n)
	if v.lanes == 16 {
		VRNDSCALEPS(Imm(0), n, n)
	} else {
		VROUNDPS(Imm(0), n, n)
	}
	VFNMADD231PS(v.constant(F32(ln2High)), n, x)
	VFNMADD231PS(v.constant(F32(ln2Low)), n, x)
	p := v.vec()
	VMOVUPS(v.constant(expPolynomial[0]), p)
	for _, c := range expPolynomial[1:] {
		VFMADD213PS(v.constant(c), x, p)
	}
	VMULPS(x, p, p)
	VFMADD213PS(x, x, p)
	VADDPS(v.constant(F32(1)), p, p)
	VCVTPS2DQ(n, n)
	VPSLLD(Imm(23), n, n)
	VPADDD(n, p, p)
	return p
}

func (v isa) largest() {
	v.function("largest", "x *float32, n int, least float32) (most float32")
	at, n := param("x"), param("n")
	most := v.vec()
	VBROADCASTSS(NewParamAddr("least", 16), most)
	Label("loop")
	x := v.vec()
	VMOVUPS(Mem{Base: at}, x)
	VMAXPS(most, x, most) // of a NaN in x, most remains
	ADDQ(Imm(uint64(4*v.lanes)), at)
	SUBQ(Imm(uint64(v.lanes)), n)
	JNZ(LabelRef("loop"))
	Store(v.scalar(most, VMAXPS), Return("most"))
	end()
}

// leafWeights: of four leaves at a time the sums are added across at once.
func (v isa) leafWeights() {
	v.function("leafWeights", "x *float32, sums *float32, offsets *float32, leaves int, least float32")
	at, sums, offsets, left := param("x"), param("sums"), param("offsets"), param("leaves")
	least := v.vec()
	VBROADCASTSS(NewParamAddr("least", 32), least)
	for _, n := range []int{4, 1} {
		label := fmt.Sprintf("leaves%d", n)
		Label(label)
		CMPQ(left, Imm(uint64(n)))
		JL(LabelRef(label + "end"))
		sum, squares := make([]reg.VecVirtual, n), make([]reg.VecVirtual, n)
		for i := range n {
			offset := v.vec()
			VBROADCASTSS(Mem{Base: offsets, Disp: 4 * i}, offset)
			sum[i], squares[i] = v.leaf(Mem{Base: at, Disp: 64 * i}, offset, least)
		}
		if n == 4 {
			s, q := v.narrow(v.transposed(sum, VADDPS), VADDPS), v.narrow(v.transposed(squares, VADDPS), VADDPS)
			lo, hi := XMM(), XMM()
			VUNPCKLPS(q, s, lo)
			VUNPCKHPS(q, s, hi)
			VMOVUPS(lo, Mem{Base: sums})
			VMOVUPS(hi, Mem{Base: sums, Disp: 16})
		} else {
			VMOVSS(v.scalar(sum[0], VADDPS), Mem{Base: sums})
			VMOVSS(v.scalar(squares[0], VADDPS), Mem{Base: sums, Disp: 4})
		}
		ADDQ(U32(uint64(64*n)), at)
		ADDQ(Imm(uint64(8*n)), sums)
		ADDQ(Imm(uint64(4*n)), offsets)
		SUBQ(Imm(uint64(n)), left)
		JMP(LabelRef(label))
		Label(label + "end")
	}
	end()
}

// leaf writes a leaf's weights and returns vectors of their sums and their squares'.
func (v isa) leaf(at Mem, offset, least reg.VecVirtual) (sum, squares reg.VecVirtual) {
	for i := 0; i < 16; i += v.lanes {
		x, m := v.vec(), at
		m.Disp += 4 * i
		VADDPS(m, offset, x)
		keep := v.notBelow(x, v.constant(F32(-87)))
		x = v.exp(x)
		keep(x)
		v.keep(greaterOrEqual, least, x)(x)
		VMOVUPS(x, m)
		if i == 0 {
			sum, squares = x, v.vec()
			VMULPS(x, x, squares)
		} else {
			VFMADD231PS(x, x, squares)
			VADDPS(x, sum, sum)
		}
	}
	return sum, squares
}
