package main

import (
	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
	"github.com/mmcloughlin/avo/reg"
)

// Offsets in a GainRow, and its size.
const (
	gainTop, gainOfSquare, gainOfShare, gainFactor = 0, 4, 8, 12
	gainBytes                                      = 16
)

// gains: a row after the other, whose gains are added up in registers.
func (v isa) gains() {
	v.function("gains", "gain *float32, shares *float32, sums *float32, x *float32, stride int, rows *float32, n int, least float32")
	shares, sums, at, stride, row, n := param("shares"), param("sums"), param("x"), param("stride"), param("rows"), param("n")
	SHLQ(Imm(2), stride)
	least := v.vec()
	VBROADCASTSS(NewParamAddr("least", 56), least)
	gain := v.zeros(16 / v.lanes)
	Label("row")
	top, ofSquare, ofShare, factor := v.vec(), v.vec(), v.vec(), v.vec()
	VBROADCASTSS(Mem{Base: row, Disp: gainTop}, top)
	VBROADCASTSS(Mem{Base: row, Disp: gainOfSquare}, ofSquare)
	VBROADCASTSS(Mem{Base: row, Disp: gainOfShare}, ofShare)
	VBROADCASTSS(Mem{Base: row, Disp: gainFactor}, factor)
	var sum, squares reg.VecVirtual
	for i := range gain {
		x := v.vec()
		VMOVUPS(Mem{Base: at, Disp: 4 * v.lanes * i}, x)
		VSUBPS(top, x, x)
		keep := v.notBelow(x, v.constant(F32(-87)))
		w := v.exp(x)
		keep(w)
		v.clearBelow(w, least)
		VMOVUPS(w, Mem{Base: shares, Disp: 4 * v.lanes * i})
		if i == 0 {
			sum, squares = v.vec(), v.vec()
			VMOVAPS(w, sum)
			VMULPS(w, w, squares)
		} else {
			VADDPS(w, sum, sum)
			VFMADD231PS(w, w, squares)
		}
		y := v.vec()
		VMULPS(ofSquare, w, y)
		VMINPS(ofShare, y, y)
		VMULPS(w, y, y)
		VFMADD231PS(y, factor, gain[i])
	}
	VMOVSS(v.scalar(sum, VADDPS), Mem{Base: sums})
	VMOVSS(v.scalar(squares, VADDPS), Mem{Base: sums, Disp: 4})
	ADDQ(Imm(8), sums)
	ADDQ(stride, at)
	ADDQ(stride, shares)
	ADDQ(Imm(gainBytes), row)
	DECQ(n)
	JNZ(LabelRef("row"))
	to := param("gain")
	for i, x := range gain {
		VMOVUPS(x, Mem{Base: to, Disp: 4 * v.lanes * i})
	}
	end()
}
