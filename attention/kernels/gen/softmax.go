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
	v.eachScores(n, func(vectors int) {
		x, keep := make([]reg.VecVirtual, vectors), make([]func(reg.VecVirtual), vectors)
		for i := range x {
			x[i] = v.vec()
			VMOVUPS(Mem{Base: at, Disp: 4 * v.lanes * i}, x[i])
			VSUBPS(top, x[i], x[i])
			keep[i] = v.notBelow(x[i], v.constant(F32(-87)))
		}
		for i, e := range v.exps(x) {
			keep[i](e)
			VMOVUPS(e, Mem{Base: dst, Disp: 4 * v.lanes * i})
			VADDPS(e, sum, sum)
		}
		ADDQ(U32(uint64(4*v.lanes*vectors)), dst)
		ADDQ(U32(uint64(4*v.lanes*vectors)), at)
	})
	Store(v.scalar(sum, VADDPS), Return("sum"))
	end()
}

// eachScores emits loops over n scores, 16 of them at least: some vectors at a time, so that they need not wait for one another.
func (v isa) eachScores(n reg.GPVirtual, body func(vectors int)) {
	for _, vectors := range []int{v.lanes / 4, 1} { // of AVX2, 16 scores
		label := fmt.Sprintf("vectors%d", vectors)
		Label(label)
		CMPQ(n, Imm(uint64(v.lanes*vectors)))
		JL(LabelRef(label + "end"))
		body(vectors)
		SUBQ(Imm(uint64(v.lanes*vectors)), n)
		JMP(LabelRef(label))
		Label(label + "end")
	}
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
func (v isa) exp(x reg.VecVirtual) reg.VecVirtual { return v.exps([]reg.VecVirtual{x})[0] }

// exps is exp of some vectors, step by step.
func (v isa) exps(x []reg.VecVirtual) []reg.VecVirtual {
	n, p := make([]reg.VecVirtual, len(x)), make([]reg.VecVirtual, len(x))
	each := func(step func(i int, x, n, p reg.VecVirtual)) {
		for i := range x {
			step(i, x[i], n[i], p[i])
		}
	}
	each(func(_ int, x, _, _ reg.VecVirtual) { VMINPS(v.constant(F32(0)), x, x) })
	each(func(_ int, x, _, _ reg.VecVirtual) { VMAXPS(v.constant(F32(-87)), x, x) })
	each(func(i int, x, _, _ reg.VecVirtual) {
		n[i] = v.vec()
		VMULPS(v.constant(F32(1.44269504088896341)), x, n[i])
	})
	each(func(_ int, _, n, _ reg.VecVirtual) { v.round(n) })
	each(func(_ int, x, n, _ reg.VecVirtual) { VFNMADD231PS(v.constant(F32(ln2High)), n, x) })
	each(func(_ int, x, n, _ reg.VecVirtual) { VFNMADD231PS(v.constant(F32(ln2Low)), n, x) })
	each(func(i int, _, _, _ reg.VecVirtual) {
		p[i] = v.vec()
		VMOVUPS(v.constant(expPolynomial[0]), p[i])
	})
	for _, c := range expPolynomial[1:] {
		each(func(_ int, x, _, p reg.VecVirtual) { VFMADD213PS(v.constant(c), x, p) })
	}
	each(func(_ int, x, _, p reg.VecVirtual) { VMULPS(x, p, p) })
	each(func(_ int, x, _, p reg.VecVirtual) { VFMADD213PS(x, x, p) })
	each(func(_ int, _, _, p reg.VecVirtual) { VADDPS(v.constant(F32(1)), p, p) })
	each(func(_ int, _, n, _ reg.VecVirtual) { VCVTPS2DQ(n, n) })
	each(func(_ int, _, n, _ reg.VecVirtual) { VPSLLD(Imm(23), n, n) })
	each(func(_ int, _, n, p reg.VecVirtual) { VPADDD(n, p, p) })
	return p
}

func (v isa) largest() {
	v.function("largest", "x *float32, n int, least float32) (most float32")
	at, n := param("x"), param("n")
	most := make([]reg.VecVirtual, v.lanes/4)
	for i := range most {
		most[i] = v.broadcast(NewParamAddr("least", 16))
	}
	v.eachScores(n, func(vectors int) {
		for i := range vectors {
			x := v.vec()
			VMOVUPS(Mem{Base: at, Disp: 4 * v.lanes * i}, x)
			VMAXPS(most[i], x, most[i]) // of a NaN in x, most remains
		}
		ADDQ(U32(uint64(4*v.lanes*vectors)), at)
	})
	for _, x := range most[1:] {
		VMAXPS(x, most[0], most[0])
	}
	Store(v.scalar(most[0], VMAXPS), Return("most"))
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

const (
	runTokens = 64
	runSum    = 16 // bytes of a RunSum
)

// sumRuns: of four runs at a time what is added up is added across at once.
func (v isa) sumRuns() {
	v.function("sumRuns", "dst *float32, x *float32, runs int")
	dst, at, left := param("dst"), param("x"), param("runs")
	means, tops := AllocLocal(16), AllocLocal(16) // there are too few registers to keep them
	for _, n := range []int{4, 1} {
		label := fmt.Sprintf("runs%d", n)
		scores := func(run, token int) Mem { return Mem{Base: at, Disp: 4 * (run*runTokens + token)} }
		Label(label)
		CMPQ(left, Imm(uint64(n)))
		JL(LabelRef(label + "end"))
		mean, top := v.zeros(n), make([]reg.VecVirtual, n)
		for i := range n {
			top[i] = v.vec()
			VMOVUPS(v.constant(U32(0xff800000)), top[i])
			for token := 0; token < runTokens; token += v.lanes {
				x := v.vec()
				VMOVUPS(scores(i, token), x)
				VADDPS(x, mean[i], mean[i])
				VMAXPS(top[i], x, top[i]) // of a NaN in x, top remains
			}
		}
		m := v.across(mean, VADDPS).AsX()
		VMULPS(v.constant(F32(1./runTokens)), m, m)
		VMOVUPS(m, means)
		VMOVUPS(v.across(top, VMAXPS).AsX(), tops)
		sum, squares := v.zeros(n), v.zeros(n)
		for i := range n {
			most := v.broadcast(tops.Offset(4 * i))
			for token := 0; token < runTokens; token += v.lanes * v.lanes / 4 {
				x, keep := make([]reg.VecVirtual, v.lanes/4), make([]func(reg.VecVirtual), v.lanes/4)
				for j := range x {
					x[j] = v.vec()
					VMOVUPS(scores(i, token+j*v.lanes), x[j])
					VSUBPS(most, x[j], x[j])
					keep[j] = v.notBelow(x[j], v.constant(F32(-87)))
				}
				for j, e := range v.exps(x) {
					keep[j](e)
					VADDPS(e, sum[i], sum[i])
					VFMADD231PS(e, e, squares[i])
				}
			}
		}
		s, q := v.across(sum, VADDPS).AsX(), v.across(squares, VADDPS).AsX()
		mt, sq := [2]reg.VecVirtual{XMM(), XMM()}, [2]reg.VecVirtual{XMM(), XMM()}
		m, t := XMM(), XMM()
		VMOVUPS(means, m)
		VMOVUPS(tops, t)
		VUNPCKLPS(t, m, mt[0])
		VUNPCKLPS(q, s, sq[0])
		VUNPCKHPS(t, m, mt[1])
		VUNPCKHPS(q, s, sq[1])
		for i := range n {
			out, halves := XMM(), U8(0x44)
			if i%2 == 1 {
				halves = 0xee
			}
			VSHUFPS(halves, sq[i/2], mt[i/2], out)
			VMOVUPS(out, Mem{Base: dst, Disp: runSum * i})
		}
		ADDQ(U32(uint64(4*runTokens*n)), at)
		ADDQ(Imm(uint64(runSum*n)), dst)
		SUBQ(Imm(uint64(n)), left)
		JMP(LabelRef(label))
		Label(label + "end")
	}
	end()
}
