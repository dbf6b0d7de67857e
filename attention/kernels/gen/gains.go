package main

import (
	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
)

// Offsets in a GainRow, and its size.
const (
	gainOfSquare, gainOfWeight, gainFactor = 0, 4, 8
	gainBytes                              = 12
)

// gains: a row after the other, whose gains are added up in registers.
func (v isa) gains() {
	v.function("gains", "gain *float32, w *float32, rows *float32, n int")
	at, row, n := param("w"), param("rows"), param("n")
	gain := v.zeros(16 / v.lanes)
	Label("row")
	ofSquare, ofWeight, factor := v.vec(), v.vec(), v.vec()
	VBROADCASTSS(Mem{Base: row, Disp: gainOfSquare}, ofSquare)
	VBROADCASTSS(Mem{Base: row, Disp: gainOfWeight}, ofWeight)
	VBROADCASTSS(Mem{Base: row, Disp: gainFactor}, factor)
	for i := range gain {
		w, y := v.vec(), v.vec()
		VMOVUPS(Mem{Base: at, Disp: 4 * v.lanes * i}, w)
		VMULPS(ofSquare, w, y)
		VMINPS(ofWeight, y, y)
		VMULPS(w, y, y)
		VFMADD231PS(y, factor, gain[i])
	}
	ADDQ(Imm(64), at)
	ADDQ(Imm(gainBytes), row)
	DECQ(n)
	JNZ(LabelRef("row"))
	to := param("gain")
	for i, x := range gain {
		VMOVUPS(x, Mem{Base: to, Disp: 4 * v.lanes * i})
	}
	end()
}
