package main

import (
	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
)

// sweep: four loads at a time, each into a sum of its own, so that nothing but memory limits it.
func (v isa) sweep() {
	const (
		loads      = 4
		sweepAhead = 2 << 10 // the best of .5 to 8 KiB
	)
	v.function("sweep", "b *byte, n int) (sum uint64")
	at, n := param("b"), param("n")
	acc := v.zeros(loads)
	Label("loop")
	for i, a := range acc {
		m := Mem{Base: at, Disp: 4 * v.lanes * i}
		VPADDQ(m, a, a)
		if m.Disp%64 == 0 {
			m.Disp += sweepAhead
			PREFETCHT0(m)
		}
	}
	ADDQ(U32(uint64(4*v.lanes*loads)), at)
	SUBQ(U32(uint64(4*v.lanes*loads)), n)
	JNZ(LabelRef("loop"))
	for _, a := range acc[1:] {
		VPADDQ(a, acc[0], acc[0])
	}
	sum, t := v.narrow(acc[0], VPADDQ), XMM()
	VPSHUFD(Imm(0xee), sum, t)
	VPADDQ(t, sum, sum)
	r := GP64()
	VMOVQ(sum, r)
	Store(r, Return("sum"))
	end()
}

func (v isa) prefetch() {
	v.function("prefetch", "b *byte, n int")
	at, n := param("b"), param("n")
	Label("loop")
	PREFETCHT1(Mem{Base: at})
	ADDQ(Imm(64), at)
	SUBQ(Imm(64), n)
	JG(LabelRef("loop"))
	RET()
}

// widenBF16: the bits of a bfloat16 are the upper half of a float32's.
func (v isa) widenBF16() {
	v.function("widenBF16", "dst *float32, src *byte, n int")
	dst, src, n := param("dst"), param("src"), param("n")
	Label("loop")
	x := v.vec()
	VPMOVZXWD(Mem{Base: src}, x)
	VPSLLD(Imm(16), x, x)
	VMOVUPS(x, Mem{Base: dst})
	ADDQ(Imm(uint64(2*v.lanes)), src)
	ADDQ(Imm(uint64(4*v.lanes)), dst)
	SUBQ(Imm(uint64(v.lanes)), n)
	JNZ(LabelRef("loop"))
	end()
}
