package main

import (
	"fmt"

	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
	"github.com/mmcloughlin/avo/reg"
)

// element is a type that rows are stored as.
type element struct {
	suffix, goType string
	size           uint8
}

// Rows of bfloat16 lie pitch elements apart, others side by side.
var elements = []element{{"", "float32", 4}, {"BF16", "byte", 2}, {"Int8", "byte", 1}}

// load reads a vector of elements as floats.
func (e element) load(m Mem, x reg.VecVirtual) {
	switch e.size {
	case 4:
		VMOVUPS(m, x)
	case 2:
		VPMOVZXWD(m, x)
		VPSLLD(Imm(16), x, x)
	default:
		VPMOVSXBD(m, x)
		VCVTDQ2PS(x, x)
	}
}

// pitch is the parameter that only rows of bfloat16 have.
func (e element) pitch() string {
	if e.size == 2 {
		return ", pitch int"
	}
	return ""
}

// loadPitch returns how many elements rows lie apart.
func (e element) loadPitch(d reg.GPVirtual) reg.GPVirtual {
	if e.size == 2 {
		return param("pitch")
	}
	return d
}

// ahead is how many bytes before their use rows are fetched.
const ahead = 8 << 10

// dots: four tokens at a time are multiplied with v.rows query rows, so that
// each key is loaded once for all of them, and four sums are added across at once.
func (v isa) dots(e element) {
	v.function("dots"+e.suffix, "dst *float32, stride int, q *float32, rows int, k *"+e.goType+", n int, d int"+e.pitch())
	dst, stride, q, rows, d := param("dst"), param("stride"), param("q"), param("rows"), param("d")
	pitch := e.loadPitch(d)
	pitch3 := triple(pitch)
	v.tokenTiles(dst, stride, rows, pitch, pitch3, e.size, dotTiles{
		sums: func(label string, k reg.GPVirtual, r, tokens int) []reg.VecVirtual {
			return v.dotTile(e, label, q, k, d, pitch, pitch3, r, tokens)
		},
		dots: func(_ int, sums []reg.VecVirtual) reg.VecVirtual { return v.across(sums, VADDPS) },
		next: func(r int) {
			for range r {
				LEAQ(Mem{Base: q, Index: d, Scale: 4}, q)
			}
		},
	})
}

// dotTiles says how tokenTiles multiplies.
type dotTiles struct {
	// sums emits the sums of products of r rows and some tokens, [r][tokens] vectors of parts.
	sums func(label string, k reg.GPVirtual, r, tokens int) []reg.VecVirtual
	// dots makes of row i's sums the products.
	dots func(i int, sums []reg.VecVirtual) reg.VecVirtual
	// next goes on to the next r rows.
	next func(r int)
}

// tokenTiles goes through all tokens, which lie pitch elements of some size apart, for v.rows rows at a time; four tokens at
// once as long as there are as many.
func (v isa) tokenTiles(dst, stride, rows, pitch, pitch3 reg.GPVirtual, size uint8, t dotTiles) {
	stride3 := triple(stride)
	rowBlocks(v.rows, rows, func(r int) {
		to, k, left := GP64(), param("k"), param("n")
		MOVQ(dst, to)
		for _, tokens := range []int{4, 1} {
			label := fmt.Sprintf("tokens%dx%d", tokens, r)
			Label(label)
			CMPQ(left, Imm(uint64(tokens)))
			JL(LabelRef(label + "end"))
			acc := t.sums(label, k, r, tokens)
			LEAQ(Mem{Base: k, Index: pitch, Scale: size}, k)
			if tokens == 4 {
				LEAQ(Mem{Base: k, Index: pitch3, Scale: size}, k)
			}
			for i := range r {
				x, at := t.dots(i, acc[i*tokens:(i+1)*tokens]), strided(to, stride, stride3, 4, i)
				if tokens == 4 {
					VMOVUPS(x, at)
				} else {
					VMOVSS(x, at)
				}
			}
			ADDQ(Imm(uint64(4*tokens)), to)
			SUBQ(Imm(uint64(tokens)), left)
			JMP(LabelRef(label))
			Label(label + "end")
		}
		for range r {
			LEAQ(Mem{Base: dst, Index: stride, Scale: 4}, dst)
		}
		t.next(r)
	})
}

// across reduces four vectors to one of 128 bits, one lane each, or a single one to its lowest lane.
func (v isa) across(x []reg.VecVirtual, add func(...Op)) reg.VecVirtual {
	if len(x) == 1 {
		return v.scalar(x[0], add)
	}
	return v.narrow(v.transposed(x, add), add)
}

// dotTile sums products of r rows and some tokens.
func (v isa) dotTile(e element, label string, q, k, d, pitch, pitch3 reg.GPVirtual, r, tokens int) []reg.VecVirtual {
	acc := v.zeros(r * tokens)
	qq, kk, i, d3 := GP64(), GP64(), GP64(), triple(d)
	MOVQ(q, qq)
	MOVQ(k, kk)
	MOVQ(d, i)
	Label(label + "dims")
	key := make([]reg.VecVirtual, tokens)
	for t := range key {
		key[t] = v.vec()
		m := strided(kk, pitch, pitch3, e.size, t)
		e.load(m, key[t])
		m.Disp = ahead
		PREFETCHT0(m)
	}
	for j := range r {
		x := v.vec()
		VMOVUPS(strided(qq, d, d3, 4, j), x)
		for t := range key {
			VFMADD231PS(key[t], x, acc[j*tokens+t])
		}
	}
	ADDQ(Imm(uint64(4*v.lanes)), qq)
	ADDQ(Imm(uint64(int(e.size)*v.lanes)), kk)
	SUBQ(Imm(uint64(v.lanes)), i)
	JNZ(LabelRef(label + "dims"))
	return acc
}

// transposed reduces four vectors by add so that lane i of each 128-bit part holds what comes of the i-th.
func (v isa) transposed(a []reg.VecVirtual, add func(...Op)) reg.VecVirtual {
	pair := func(x, y reg.VecVirtual) reg.VecVirtual {
		lo, hi := v.vec(), v.vec()
		VUNPCKLPS(y, x, lo)
		VUNPCKHPS(y, x, hi)
		add(hi, lo, lo)
		return lo
	}
	ab, cd := pair(a[0], a[1]), pair(a[2], a[3])
	lo, hi := v.vec(), v.vec()
	VSHUFPS(Imm(0x44), cd, ab, lo)
	VSHUFPS(Imm(0xee), cd, ab, hi)
	add(hi, lo, lo)
	return lo
}

// axpys: sums of a tile of columns stay in registers over all tokens.
func (v isa) axpys(e element) {
	v.function("axpys"+e.suffix, "out *[]float32, w *float32, stride int, rows int, v *"+e.goType+", n int, d int, cols int"+e.pitch())
	out, w, stride, rows, d := param("out"), param("w"), param("stride"), param("rows"), param("d")
	pitch := e.loadPitch(d)
	stride3 := triple(stride)
	rowBlocks(v.rows, rows, func(r int) {
		col, from, left := GP64(), param("v"), param("cols")
		XORQ(col, col)
		for _, tile := range []int{4, 1} {
			label := fmt.Sprintf("cols%dx%d", tile, r)
			columns := uint64(tile * v.lanes)
			Label(label)
			CMPQ(left, Imm(columns))
			JL(LabelRef(label + "end"))
			acc := v.axpyTile(e, label, w, stride, stride3, from, pitch, r, tile)
			for i := range r {
				row := rowOf(out, i)
				for j := range tile {
					v.addTo(Mem{Base: row, Index: col, Scale: 4, Disp: 4 * v.lanes * j}, acc[i*tile+j])
				}
			}
			ADDQ(Imm(columns), col)
			ADDQ(U32(uint64(e.size)*columns), from)
			SUBQ(Imm(columns), left)
			JMP(LabelRef(label))
			Label(label + "end")
		}
		nextRows(out, w, stride, r)
	})
}

// sliceSize is that of a slice's header, of which the pointer comes first.
const sliceSize = 24

// rowOf returns the pointer of the i-th slice from out.
func rowOf(out reg.Register, i int) reg.GPVirtual {
	row := GP64()
	MOVQ(Mem{Base: out, Disp: sliceSize * i}, row)
	return row
}

// nextRows moves on by r rows of output and of weights.
func nextRows(out, w, stride reg.GPVirtual, r int) {
	ADDQ(Imm(uint64(sliceSize*r)), out)
	for range r {
		LEAQ(Mem{Base: w, Index: stride, Scale: 4}, w)
	}
}

// addTo adds x to what lies at m.
func (v isa) addTo(m Mem, x reg.VecVirtual) {
	VADDPS(m, x, x)
	VMOVUPS(x, m)
}

func (v isa) axpyTile(e element, label string, w, stride, stride3, from, pitch reg.GPVirtual, r, tile int) []reg.VecVirtual {
	acc := v.zeros(r * tile)
	ww, row, n := GP64(), GP64(), param("n")
	MOVQ(w, ww)
	MOVQ(from, row)
	Label(label + "tokens")
	x := make([]reg.VecVirtual, tile)
	for j := range x {
		x[j] = v.vec()
		m := Mem{Base: row, Disp: int(e.size) * v.lanes * j}
		e.load(m, x[j])
		m.Disp += ahead
		PREFETCHT0(m)
	}
	for i := range r {
		weight := v.vec()
		VBROADCASTSS(strided(ww, stride, stride3, 4, i), weight)
		for j := range x {
			VFMADD231PS(x[j], weight, acc[i*tile+j])
		}
	}
	LEAQ(Mem{Base: row, Index: pitch, Scale: e.size}, row)
	ADDQ(Imm(4), ww)
	DECQ(n)
	JNZ(LabelRef(label + "tokens"))
	return acc
}
