package main

import (
	"fmt"

	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
	"github.com/mmcloughlin/avo/reg"
)

// gatherDots: each row has the four sums of the Go loop as the lanes of one
// vector; eight rows at a time hide how long additions take.
func (v isa) gatherDots() {
	v.function("gatherDots", "dst *float32, x *float32, tokens *int, n int, d int, w *float32")
	dst, tokens, n := param("dst"), param("tokens"), param("n")
	for _, count := range []int{8, 1} {
		label := fmt.Sprintf("rows%d", count)
		Label(label)
		CMPQ(n, Imm(uint64(count)))
		JL(LabelRef(label + "end"))
		acc := v.dotRows(label, tokens, count)
		for i := 0; i+4 <= count; i += 4 {
			VHADDPS(acc[i+1], acc[i], acc[i])
			VHADDPS(acc[i+3], acc[i+2], acc[i+2])
			VHADDPS(acc[i+2], acc[i], acc[i])
			VMOVUPS(acc[i], Mem{Base: dst, Disp: 4 * i})
		}
		if count == 1 {
			VHADDPS(acc[0], acc[0], acc[0])
			VHADDPS(acc[0], acc[0], acc[0])
			VMOVSS(acc[0], Mem{Base: dst})
		}
		ADDQ(Imm(uint64(4*count)), dst)
		ADDQ(Imm(uint64(8*count)), tokens)
		SUBQ(Imm(uint64(count)), n)
		JMP(LabelRef(label))
		Label(label + "end")
	}
	end()
}

func (v isa) dotRows(label string, tokens reg.GPVirtual, count int) []reg.VecVirtual {
	rows, acc := make([]reg.GPVirtual, count), make([]reg.VecVirtual, count)
	for i := range rows { // pointers behind the rows, so that one index counts up to 0
		rows[i], acc[i] = GP64(), XMM()
		MOVQ(Mem{Base: tokens, Disp: 8 * i}, rows[i])
		INCQ(rows[i])
		IMULQ(NewParamAddr("d", 32), rows[i])
		SHLQ(Imm(2), rows[i])
		ADDQ(NewParamAddr("x", 8), rows[i])
		VXORPS(acc[i], acc[i], acc[i])
	}
	at, w := param("d"), param("w")
	LEAQ(Mem{Base: w, Index: at, Scale: 4}, w)
	NEGQ(at)
	Label(label + "dims")
	weight := XMM()
	VMOVUPS(Mem{Base: w, Index: at, Scale: 4}, weight)
	for i, row := range rows {
		t := XMM()
		VMULPS(Mem{Base: row, Index: at, Scale: 4}, weight, t)
		VADDPS(t, acc[i], acc[i])
	}
	ADDQ(Imm(4), at)
	JNZ(LabelRef(label + "dims"))
	return acc
}

// gatherAxpy: products are rounded before they are added, token after token, as the Go loop does.
func (v isa) gatherAxpy() {
	v.function("gatherAxpy", "out *float32, w *float32, x *float32, tokens *int, n int, d int")
	out, x, left, pitch := param("out"), param("x"), param("d"), param("d")
	SHLQ(Imm(2), pitch)
	for _, tile := range []int{4, 1} {
		label := fmt.Sprintf("cols%d", tile)
		columns := uint64(tile * v.lanes)
		Label(label)
		CMPQ(left, Imm(columns))
		JL(LabelRef(label + "end"))
		acc := make([]reg.VecVirtual, tile)
		for j := range acc {
			acc[j] = v.vec()
			VMOVUPS(Mem{Base: out, Disp: 4 * v.lanes * j}, acc[j])
		}
		w, tokens, n, row := param("w"), param("tokens"), param("n"), GP64()
		Label(label + "tokens")
		MOVQ(Mem{Base: tokens}, row)
		IMULQ(pitch, row)
		weight := v.vec()
		VBROADCASTSS(Mem{Base: w}, weight)
		for j := range acc {
			t := v.vec()
			VMULPS(Mem{Base: x, Index: row, Scale: 1, Disp: 4 * v.lanes * j}, weight, t)
			VADDPS(t, acc[j], acc[j])
		}
		ADDQ(Imm(4), w)
		ADDQ(Imm(8), tokens)
		DECQ(n)
		JNZ(LabelRef(label + "tokens"))
		for j := range acc {
			VMOVUPS(acc[j], Mem{Base: out, Disp: 4 * v.lanes * j})
		}
		ADDQ(U32(4*columns), out)
		ADDQ(U32(4*columns), x)
		SUBQ(Imm(columns), left)
		JMP(LabelRef(label))
		Label(label + "end")
	}
	end()
}
