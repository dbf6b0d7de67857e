package main

import (
	"fmt"

	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
	"github.com/mmcloughlin/avo/reg"
)

// gatherDots: each row has the sixteen sums of the Go loop in the lanes of its vectors; several
// rows at a time hide how long additions take.
func (v isa) gatherDots() {
	v.function("gatherDots", "dst *float32, x *float32, tokens *int, n int, d int, w *float32")
	dst, tokens, n := param("dst"), param("tokens"), param("n")
	for _, count := range []int{v.lanes / 2, 1} {
		label := fmt.Sprintf("rows%d", count)
		Label(label)
		CMPQ(n, Imm(uint64(count)))
		JL(LabelRef(label + "end"))
		rows := make([]reg.GPVirtual, count) // pointers behind the rows, so that one index counts up to 0
		for i := range rows {
			rows[i] = GP64()
			MOVQ(Mem{Base: tokens, Disp: 8 * i}, rows[i])
			INCQ(rows[i])
			IMULQ(NewParamAddr("d", 32), rows[i])
			SHLQ(Imm(2), rows[i])
			ADDQ(NewParamAddr("x", 8), rows[i])
		}
		acc := v.orderedDots(label, rows, param("w"), param("d"))
		for i := 0; i < count; i += 4 {
			sums := v.orderedSum(acc[i:min(i+4, count)])
			if count == 1 {
				VMOVSS(sums, Mem{Base: dst})
			} else {
				VMOVUPS(sums, Mem{Base: dst, Disp: 4 * i})
			}
		}
		ADDQ(Imm(uint64(4*count)), dst)
		ADDQ(Imm(uint64(8*count)), tokens)
		SUBQ(Imm(uint64(count)), n)
		JMP(LabelRef(label))
		Label(label + "end")
	}
	end()
}

// dot is gatherDots of one row.
func (v isa) dot() {
	v.function("dot", "a *float32, b *float32, d int) (sum float32")
	a, b, d := param("a"), param("b"), param("d")
	LEAQ(Mem{Base: a, Index: d, Scale: 4}, a)
	acc := v.orderedDots("dims", []reg.GPVirtual{a}, b, d)
	Store(v.orderedSum(acc), Return("sum"))
	end()
}

// orderedDots multiplies rows, of which it is told the ends, by w [d], and returns each one's sixteen sums.
func (v isa) orderedDots(label string, rows []reg.GPVirtual, w, at reg.GPVirtual) (acc [][]reg.VecVirtual) {
	for range rows {
		acc = append(acc, v.zeros(16/v.lanes))
	}
	LEAQ(Mem{Base: w, Index: at, Scale: 4}, w)
	NEGQ(at)
	Label(label + "dims")
	for part := range 16 / v.lanes {
		weight := v.vec()
		VMOVUPS(Mem{Base: w, Index: at, Scale: 4, Disp: 4 * v.lanes * part}, weight)
		for i, row := range rows {
			t := v.vec()
			VMULPS(Mem{Base: row, Index: at, Scale: 4, Disp: 4 * v.lanes * part}, weight, t)
			VADDPS(t, acc[i][part], acc[i][part])
		}
	}
	ADDQ(Imm(16), at)
	JNZ(LabelRef(label + "dims"))
	return acc
}

// orderedSum adds up the sixteen sums of up to four rows, each in its lane: of each four lanes the first and the
// third, the second and the fourth, and these; then of the four sums likewise.
func (v isa) orderedSum(rows [][]reg.VecVirtual) reg.VecVirtual {
	var parts []reg.VecVirtual
	for part := range 16 / v.lanes {
		var a []reg.VecVirtual
		for i := range 4 {
			a = append(a, rows[min(i, len(rows)-1)][part])
		}
		parts = append(parts, v.transposed(a, VADDPS))
	}
	if v.lanes == 8 {
		VADDPS(parts[1], parts[0], parts[0])
	}
	return v.narrow(parts[0], VADDPS)
}

// matMul: a tile of dst stays in registers over all k. Products are rounded before they are added, in order of k.
func (v isa) matMul() {
	v.function("matMul", "dst *float32, a *float32, aRow int, aCol int, b *float32, m int, k int, n int")
	dst, a, aRow, aCol, m, n := param("dst"), param("a"), param("aRow"), param("aCol"), param("m"), param("n")
	SHLQ(Imm(2), aRow)
	SHLQ(Imm(2), aCol)
	SHLQ(Imm(2), n)
	aRow3, n3 := triple(aRow), triple(n)
	rowBlocks(v.rows, m, func(r int) {
		col := GP64()
		XORQ(col, col)
		for _, tile := range []int{4, 16 / v.lanes} {
			label := fmt.Sprintf("cols%dx%d", tile, r)
			Label(label)
			end := GP64()
			LEAQ(Mem{Base: col, Disp: 4 * v.lanes * tile}, end)
			CMPQ(end, n)
			JG(LabelRef(label + "end"))
			acc := v.zeros(r * tile)
			at, row, left := GP64(), param("b"), param("k")
			MOVQ(a, at)
			ADDQ(col, row)
			Label(label + "k")
			x := make([]reg.VecVirtual, tile)
			for j := range x {
				x[j] = v.vec()
				VMOVUPS(Mem{Base: row, Disp: 4 * v.lanes * j}, x[j])
			}
			for i := range r {
				w := v.vec()
				VBROADCASTSS(strided(at, aRow, aRow3, 1, i), w)
				for j := range x {
					t := v.vec()
					VMULPS(w, x[j], t)
					VADDPS(t, acc[i*tile+j], acc[i*tile+j])
				}
			}
			ADDQ(aCol, at)
			ADDQ(n, row)
			DECQ(left)
			JNZ(LabelRef(label + "k"))
			to := GP64()
			LEAQ(Mem{Base: dst, Index: col, Scale: 1}, to)
			for i := range r {
				for j := range tile {
					mem := strided(to, n, n3, 1, i)
					mem.Disp = 4 * v.lanes * j
					VMOVUPS(acc[i*tile+j], mem)
				}
			}
			MOVQ(end, col)
			JMP(LabelRef(label))
			Label(label + "end")
		}
		for range r {
			ADDQ(n, dst)
			ADDQ(aRow, a)
		}
	})
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
