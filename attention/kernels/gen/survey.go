package main

import (
	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
	"github.com/mmcloughlin/avo/reg"
)

// eachLanes emits a loop over n numbers, a multiple of 16 and not none: body gets an operand for each table's next ones.
func (v isa) eachLanes(n reg.GPVirtual, tables []reg.GPVirtual, body func(at []Mem)) {
	at := make([]Mem, len(tables))
	for i, t := range tables {
		at[i] = Mem{Base: t}
	}
	Label("lanes")
	body(at)
	for _, t := range tables {
		ADDQ(U32(uint64(4*v.lanes)), t)
	}
	SUBQ(U32(uint64(v.lanes)), n)
	JNZ(LabelRef("lanes"))
}

// load returns what lies at a place.
func (v isa) load(at Mem) reg.VecVirtual {
	x := v.vec()
	VMOVUPS(at, x)
	return x
}

// argument returns a scalar argument in all lanes.
func (v isa) argument(name string, off int) reg.VecVirtual {
	x := v.vec()
	VBROADCASTSS(NewParamAddr(name, off), x)
	return x
}

func (v isa) masses() {
	v.function("masses", "dst *float32, scores *float32, logs *float32, spreads *float32, n int, half float32, most float32")
	tables, n := []reg.GPVirtual{param("dst"), param("scores"), param("logs"), param("spreads")}, param("n")
	half, most := v.argument("half", 40), v.argument("most", 44)
	v.eachLanes(n, tables, func(at []Mem) {
		x, raise := v.load(at[1]), v.load(at[3])
		VADDPS(at[2], x, x)
		VMULPS(half, raise, raise)
		VMINPS(raise, most, raise) // of what is no number, that remains
		VADDPS(raise, x, x)
		VMOVUPS(x, at[0])
	})
	end()
}

func (v isa) presences() {
	v.function("presences", "dst *float32, x *float32, surprise *float32, n int, norm float32, least float32) (most float32")
	tables, n := []reg.GPVirtual{param("dst"), param("x"), param("surprise")}, param("n")
	norm, most := v.argument("norm", 32), v.argument("least", 36)
	v.eachLanes(n, tables, func(at []Mem) {
		x, y := v.load(at[1]), v.vec()
		VMULPS(at[2], norm, y)
		VADDPS(y, x, x)
		VMOVUPS(x, at[0])
		VMAXPS(most, x, most) // of a NaN in x, most remains
	})
	Store(v.scalar(most, VMAXPS), Return("most"))
	end()
}

func (v isa) depths() {
	v.function("depths", "dst *int32, x *float32, n int, top float32, scale float32, last float32")
	tables, n := []reg.GPVirtual{param("dst"), param("x")}, param("n")
	top, scale, last := v.argument("top", 24), v.argument("scale", 28), v.argument("last", 32)
	v.eachLanes(n, tables, func(at []Mem) {
		x := v.vec()
		VSUBPS(at[1], top, x)
		VMULPS(scale, x, x)
		VMINPS(last, x, x) // of what is no number, last
		VCVTTPS2DQ(x, x)
		VMOVUPS(x, at[0])
	})
	end()
}

func (v isa) roots() {
	v.function("roots", "dst *float32, x *float32, y *float32, n int")
	tables, n := []reg.GPVirtual{param("dst"), param("x"), param("y")}, param("n")
	v.eachLanes(n, tables, func(at []Mem) {
		x := v.load(at[1])
		VMULPS(at[2], x, x)
		VSQRTPS(x, x)
		VMOVUPS(x, at[0])
	})
	end()
}

func (v isa) multiply() {
	v.function("multiply", "x *float32, y *float32, n int")
	tables, n := []reg.GPVirtual{param("x"), param("y")}, param("n")
	v.eachLanes(n, tables, func(at []Mem) {
		x := v.load(at[0])
		VMULPS(at[1], x, x)
		VMOVUPS(x, at[0])
	})
	end()
}
