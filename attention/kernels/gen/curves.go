package main

import (
	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
	"github.com/mmcloughlin/avo/reg"
)

// Offsets in a Curve, and its size.
const (
	curveBelow, curveAbove, curvePart, curveFrom = 0, 8, 16, 20
	curveBytes                                   = 24
)

func (v isa) curves() {
	v.function("curves", "dst *float32, sums *float32, x *float32, stride int, curves **[225]float32, rows int")
	dst, sums, at, stride, c, rows := param("dst"), param("sums"), param("x"), param("stride"), param("curves"), param("rows")
	SHLQ(Imm(2), stride)
	below, above := GP64(), GP64()
	Label("row")
	MOVQ(Mem{Base: c, Disp: curveBelow}, below)
	MOVQ(Mem{Base: c, Disp: curveAbove}, above)
	from, part := v.vec(), v.vec()
	VBROADCASTSS(Mem{Base: c, Disp: curveFrom}, from)
	VBROADCASTSS(Mem{Base: c, Disp: curvePart}, part)
	sum, roots := v.vec(), v.vec()
	v.zero(sum)
	v.zero(roots)
	for i := 0; i < 16; i += v.lanes {
		y := v.curve(Mem{Base: at, Disp: 4 * i}, from, part, below, above)
		VMOVUPS(y, Mem{Base: dst, Disp: 4 * i})
		VADDPS(y, sum, sum)
		VSQRTPS(y, y)
		VADDPS(y, roots, roots)
	}
	VMOVSS(v.scalar(sum, VADDPS), Mem{Base: sums})
	VMOVSS(v.scalar(roots, VADDPS), Mem{Base: sums, Disp: 4})
	ADDQ(Imm(64), dst)
	ADDQ(Imm(8), sums)
	ADDQ(stride, at)
	ADDQ(Imm(curveBytes), c)
	DECQ(rows)
	JNZ(LabelRef("row"))
	end()
}

// curve returns a curve's values at a vector of x.
func (v isa) curve(at Mem, from, part reg.VecVirtual, below, above reg.GPVirtual) reg.VecVirtual {
	x, f, i := v.vec(), v.vec(), v.vec()
	VMOVUPS(at, x)
	VSUBPS(from, x, x)
	VMULPS(v.constant(F32(4)), x, x)
	gather, keep := v.positive(x)
	VMINPS(v.constant(F32(223)), x, x)
	VCVTTPS2DQ(x, i)
	VCVTDQ2PS(i, f)
	VSUBPS(f, x, f)
	low, high := v.between(gather, below, i, f), v.between(gather, above, i, f)
	VSUBPS(low, high, high)
	VFMADD231PS(part, high, low)
	keep(low)
	return low
}

// between returns what a row is between its points i and i+1.
func (v isa) between(gather func(Mem, reg.VecVirtual), row reg.GPVirtual, i, f reg.VecVirtual) reg.VecVirtual {
	low, high := v.vec(), v.vec()
	gather(Mem{Base: row, Index: i, Scale: 4}, low)
	gather(Mem{Base: row, Index: i, Scale: 4, Disp: 4}, high)
	VSUBPS(low, high, high)
	VFMADD231PS(f, high, low)
	return low
}

// positive returns what gathers lanes where x is more than 0, and what clears the others.
func (v isa) positive(x reg.VecVirtual) (gather func(Mem, reg.VecVirtual), keep func(reg.VecVirtual)) {
	const greater = U8(0x1e)
	if v.lanes == 16 {
		mask := K()
		VCMPPS(greater, v.constant(F32(0)), x, mask)
		gather = func(from Mem, to reg.VecVirtual) {
			left := K() // gathering clears it
			KMOVW(mask, left)
			v.zero(to)
			VGATHERDPS(from, left, to)
		}
		return gather, func(y reg.VecVirtual) { VMOVAPS_Z(y, mask, y) }
	}
	mask := YMM()
	VCMPPS(greater, v.constant(F32(0)), x, mask)
	gather = func(from Mem, to reg.VecVirtual) {
		left := YMM()
		VMOVAPS(mask, left)
		v.zero(to)
		VGATHERDPS(left, from, to)
	}
	return gather, func(y reg.VecVirtual) { VANDPS(mask, y, y) }
}
