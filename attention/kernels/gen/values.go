package main

import (
	"fmt"

	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
	"github.com/mmcloughlin/avo/reg"
)

// addValues: bytes of codes are widened to lanes, so that a load of as many
// bytes as a vector has lanes yields two vectors, of the low and of the high channels.
func (v isa) addValues() {
	v.function("addValues", "out *[]float32, w *float32, stride int, rows int, scale *float32, high *[]byte, low *[]byte, n int, d int")
	out, w, stride, rows := param("out"), param("w"), param("stride"), param("rows")
	stride3 := triple(stride)
	rowBlocks(v.rows, rows, func(r int) {
		col := GP64()
		XORQ(col, col)
		for _, tile := range v.valueTiles() {
			label := fmt.Sprintf("cols%dx%d", tile.bytes(), r)
			Label(label)
			left := param("d")
			SHRQ(Imm(1), left)
			SUBQ(col, left)
			CMPQ(left, Imm(uint64(tile.bytes())))
			JL(LabelRef(label + "end"))
			low := param("low")
			TESTQ(low, low)
			JNZ(LabelRef(label + "low"))
			tile.sum(label+"bits4", w, stride, stride3, col, r, nil)
			tile.add(out, col, r)
			JMP(LabelRef(label + "next"))
			Label(label + "low")
			tile.sum(label+"bits8", w, stride, stride3, col, r, low)
			tile.add(out, col, r)
			Label(label + "next")
			ADDQ(Imm(uint64(tile.bytes())), col)
			JMP(LabelRef(label))
			Label(label + "end")
		}
		nextRows(out, w, stride, r)
	})
}

// valueTile is some vectors of bytes of codes.
type valueTile struct {
	isa
	count int
	acc   []reg.VecVirtual // [rows][count][2]
}

func (t *valueTile) bytes() int { return t.count * t.lanes }

// valueTiles: rows of codes are a multiple of 8 bytes.
func (v isa) valueTiles() []*valueTile {
	half := v
	half.lanes = 8
	tiles := []*valueTile{{isa: v, count: 2}, {isa: v, count: 1}}
	if v.lanes > 8 {
		tiles = append(tiles, &valueTile{isa: half, count: 1})
	}
	return tiles
}

// sum goes through all tokens.
func (t *valueTile) sum(label string, w, stride, stride3, col reg.GPVirtual, r int, low reg.Register) {
	t.acc = t.zeros(r * t.count * 2)
	ww, scale, high, n, row := GP64(), param("scale"), param("high"), param("n"), GP64()
	MOVQ(w, ww)
	Label(label)
	step, offset := t.vec(), t.vec()
	VBROADCASTSS(Mem{Base: scale}, step)
	VBROADCASTSS(Mem{Base: scale, Disp: 4}, offset)
	MOVQ(Mem{Base: high}, row)
	var x []reg.VecVirtual
	if low == nil && t.lanes == 16 {
		x = t.lookUp(row, col, step, offset)
	} else {
		x = t.unpack(row, col, low)
		t.place(x, step, offset)
	}
	if low != nil {
		ADDQ(Imm(sliceSize), low)
	}
	for i := range r {
		weight := t.vec()
		VBROADCASTSS(strided(ww, stride, stride3, 4, i), weight)
		for j, y := range x {
			VFMADD231PS(y, weight, t.acc[i*len(x)+j])
		}
	}
	ADDQ(Imm(8), scale)
	ADDQ(Imm(sliceSize), high)
	ADDQ(Imm(4), ww)
	DECQ(n)
	JNZ(LabelRef(label))
}

// lookUp returns the values of nibbles, of which there are only 16: a table in a register.
func (t *valueTile) lookUp(row, col reg.GPVirtual, step, offset reg.VecVirtual) (x []reg.VecVirtual) {
	table := t.vec()
	VADDPS(t.sixteens(), offset, table)
	VMULPS(step, table, table)
	for c := range t.count {
		lo, hi := t.vec(), t.vec()
		VPMOVZXBD(Mem{Base: row, Index: col, Scale: 1, Disp: c * t.lanes}, lo)
		VPSRLD(Imm(4), lo, hi)
		VPERMPS(table, lo, lo) // of an index the low 4 bits count
		VPERMPS(table, hi, hi)
		x = append(x, lo, hi)
	}
	return x
}

// sixteens returns an operand of 0, 16, 32 and so on.
func (t *valueTile) sixteens() Mem {
	const name = "sixteens"
	if _, ok := constants[name]; !ok {
		constants[name] = GLOBL(name+t.suffix, RODATA|NOPTR)
		for i := range t.lanes {
			DATA(4*i, F32(16*i))
		}
	}
	return constants[name]
}

// unpack returns codes of 8 bits as integers.
func (t *valueTile) unpack(row, col reg.GPVirtual, low reg.Register) (x []reg.VecVirtual) {
	for c := range t.count {
		x = append(x, t.split(Mem{Base: row, Index: col, Scale: 1, Disp: c * t.lanes}, 4)...)
	}
	if low == nil {
		return x
	}
	MOVQ(Mem{Base: low}, row)
	for c := range t.count {
		for i, y := range t.split(Mem{Base: row, Index: col, Scale: 1, Disp: c * t.lanes}, 0) {
			t.or(y, x[2*c+i])
		}
	}
	return x
}

// place makes values of codes.
func (t *valueTile) place(x []reg.VecVirtual, step, offset reg.VecVirtual) {
	for _, y := range x {
		VCVTDQ2PS(y, y)
		VADDPS(offset, y, y)
		VMULPS(step, y, y)
	}
}

// split widens bytes and returns their low and their high nibbles, each at bit
// shift, 4 or 0, of its lane.
func (t *valueTile) split(m Mem, shift uint64) []reg.VecVirtual {
	lo, hi := t.vec(), t.vec()
	VPMOVZXBD(m, hi)
	mask := t.constant(U32(15 << shift))
	if shift == 4 {
		VPSLLD(Imm(4), hi, lo)
		t.and(mask, lo)
		t.and(mask, hi)
	} else {
		if t.lanes == 16 {
			VPANDD(mask, hi, lo)
		} else {
			VPAND(mask, hi, lo)
		}
		VPSRLD(Imm(4), hi, hi)
	}
	return []reg.VecVirtual{lo, hi}
}

// add adds the sums to the output.
func (t *valueTile) add(out, col reg.GPVirtual, r int) {
	d := param("d")
	for i := range r {
		to := rowOf(out, i)
		for half := range 2 {
			for c := range t.count {
				t.addTo(Mem{Base: to, Index: col, Scale: 4, Disp: 4 * t.lanes * c}, t.acc[(i*t.count+c)*2+half])
			}
			if half == 0 {
				LEAQ(Mem{Base: to, Index: d, Scale: 2}, to) // d/2 floats
			}
		}
	}
}
