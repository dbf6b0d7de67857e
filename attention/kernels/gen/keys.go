package main

import (
	"fmt"

	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
	"github.com/mmcloughlin/avo/reg"
)

// planes unpacks groups of channels: it walks along the places of lines, each
// two words, plane and offset, and along the numbers of lines of the groups.
type planes struct {
	isa
	planes, lines, levels, level reg.GPVirtual
	leaf                         *leafPlanes  // nil: planes are slices, those of one leaf
	masks                        map[byte]Op  // those in registers, by the byte that they repeat
	ahead                        reg.Register // how far ahead of a line memory is fetched; nil: it is not
}

func (v isa) newPlanes() *planes {
	p := &planes{isa: v, level: GP64(), masks: map[byte]Op{}}
	if v.lanes == 16 { // else there are too few
		for _, x := range []byte{0xc0, 0x33, 0xf0} {
			p.masks[x] = v.repeated(uint32(x) * 0x01010101)
		}
	}
	return p
}

// ofSlices has lines lie in the parameter planes.
func (p *planes) ofSlices() *planes {
	p.planes = param("planes")
	p.first()
	return p
}

// first goes to the first group.
func (p *planes) first() { p.lines, p.levels = param("lines"), param("levels") }

// place loads the place of a line of the group: its plane's number and its offset in there.
func (p *planes) place(level int, plane, at reg.GPVirtual) {
	MOVWQZX(Mem{Base: p.lines, Disp: 4 * level}, plane)
	MOVWQZX(Mem{Base: p.lines, Disp: 4*level + 2}, at)
}

// base is where a plane begins.
func (p *planes) base(plane reg.GPVirtual) Mem {
	if p.leaf != nil {
		return p.leaf.at.Idx(plane, 8)
	}
	LEAQ(Mem{Base: plane, Index: plane, Scale: 2}, plane) // a slice is three words
	return Mem{Base: p.planes, Index: plane, Scale: 8}
}

// leafPlanes is a table of where the planes of a leaf lie, for leaves one after the other.
type leafPlanes struct{ at Mem }

const mostPlanes = 8

// newLeafPlanes makes that of the first leaf from the parameters planes and numPlanes.
func newLeafPlanes(label string) *leafPlanes {
	t := &leafPlanes{AllocLocal(8 * mostPlanes)}
	from, i, x := param("planes"), param("numPlanes"), GP64()
	Label(label)
	LEAQ(Mem{Base: i, Index: i, Scale: 2}, x)
	MOVQ(Mem{Base: from, Index: x, Scale: 8, Disp: -sliceSize}, x)
	MOVQ(x, t.at.Offset(-8).Idx(i, 8))
	DECQ(i)
	JNZ(LabelRef(label))
	return t
}

// set takes over another's.
func (t *leafPlanes) set(label string, from *leafPlanes) {
	i, x := param("numPlanes"), GP64()
	Label(label)
	MOVQ(from.at.Offset(-8).Idx(i, 8), x)
	MOVQ(x, t.at.Offset(-8).Idx(i, 8))
	DECQ(i)
	JNZ(LabelRef(label))
}

// next goes on to the next leaf, by the parameter steps.
func (t *leafPlanes) next(label string) {
	steps, i, x := param("steps"), param("numPlanes"), GP64()
	Label(label)
	MOVQ(Mem{Base: steps, Index: i, Scale: 8, Disp: -8}, x)
	ADDQ(x, t.at.Offset(-8).Idx(i, 8))
	DECQ(i)
	JNZ(LabelRef(label))
}

// repeated returns an operand that repeats 32 bits: a register if there are many.
func (v isa) repeated(x uint32) Op {
	m := v.constant(U32(x))
	if v.lanes < 16 {
		return m
	}
	r := ZMM()
	VMOVUPS(m, r)
	return r
}

// group unpacks the next group's codes: lane t of the r-th result holds those
// of channels 4r..4r+3 of token t, bytes in order. part is which of a line's tokens.
func (p *planes) group(label string, part int) []reg.VecVirtual {
	codes := p.newCodes()
	p.eachLevel(label, func(level int) {
		var lines []reg.VecVirtual
		for l := range level {
			plane, at := GP64(), GP64()
			p.place(l, plane, at)
			ADDQ(p.base(plane), at)
			line := p.vec()
			VMOVUPS(Mem{Base: at, Disp: 4 * p.lanes * part}, line)
			if p.ahead != nil && part == 0 {
				PREFETCHT0(Mem{Base: at, Index: p.ahead, Scale: 1})
			}
			lines = append(lines, line)
		}
		p.unpack(codes, lines)
	})
	return codes
}

// eachLevel emits code for each number of lines that the next group may have.
func (p *planes) eachLevel(label string, body func(level int)) {
	MOVBQZX(Mem{Base: p.levels}, p.level)
	for level := 1; level <= 4; level++ {
		next := fmt.Sprintf("%smore%d", label, level)
		if level < 4 {
			CMPQ(p.level, Imm(uint64(level)))
			JNE(LabelRef(next))
		}
		body(level)
		if level < 4 {
			JMP(LabelRef(label + "unpacked"))
			Label(next)
		}
	}
	Label(label + "unpacked")
}

func (p *planes) newCodes() []reg.VecVirtual {
	codes := make([]reg.VecVirtual, 4)
	for r := range codes {
		codes[r] = p.vec()
	}
	return codes
}

// unpack makes the codes of four quads of 1 to 4 lines, which it may use for something else. Of two lines, nibbles of the quads 0 and 2 and
// those of 1 and 3 lie together, in one vector each; of four, two such nibbles make a byte.
func (p *planes) unpack(codes, lines []reg.VecVirtual) {
	if len(lines) == 1 {
		for r, x := range codes {
			p.andOf(p.bits(0xc0), p.shifted(lines[0], 6-2*r), x)
		}
		return
	}
	even, odd := p.shifted(lines[0], 2), lines[0]
	p.choose(0x33, lines[1], even)
	p.choose(0x33, p.shifted(lines[1], -2), odd)
	if len(lines) == 2 {
		for r, x := range []reg.VecVirtual{p.shifted(even, 4), p.shifted(odd, 4), even, odd} {
			p.andOf(p.bits(0xf0), x, codes[r])
		}
		return
	}
	p.shift(lines[2], 2, codes[0])
	if len(lines) == 3 {
		p.and(p.bits(0xcc), codes[0])
		p.andOf(p.bits(0xcc), lines[2], codes[1])
	} else {
		p.choose(0x33, lines[3], codes[0])
		VMOVAPS(lines[2], codes[1])
		p.choose(0x33, p.shifted(lines[3], -2), codes[1])
	}
	p.shift(codes[0], -4, codes[2])
	p.shift(codes[1], -4, codes[3])
	for r, x := range []reg.VecVirtual{p.shifted(even, 4), p.shifted(odd, 4), even, odd} {
		p.choose(0xf0, x, codes[r])
	}
}

// bits returns an operand that repeats a byte.
func (p *planes) bits(x byte) Op {
	if m, ok := p.masks[x]; ok {
		return m
	}
	return p.constant(U32(uint32(x) * 0x01010101))
}

// choose takes those bits of x into y that a byte's mask says.
func (p *planes) choose(mask byte, x, y reg.VecVirtual) {
	if p.lanes == 16 {
		const maskChooses = 0xb8
		VPTERNLOGD(Imm(maskChooses), x, p.bits(mask), y)
		return
	}
	t := p.vec()
	VPAND(p.bits(mask), x, t)
	VPAND(p.bits(^mask), y, y)
	VPOR(t, y, y)
}

// next goes on to the next group.
func (p *planes) next() {
	LEAQ(Mem{Base: p.lines, Index: p.level, Scale: 4}, p.lines)
	INCQ(p.levels)
}

// scoreLeaves: codes are split into words of even and of odd channels, whose
// products with the query's words are added in 32 bits.
func (v isa) scoreLeaves() {
	v.function("scoreLeaves", "dst *float32, leafStride int, stride int, q *int16, scale *float32, rows int, planes *[]byte, steps *int, numPlanes int, leaves int, lines *uint16, levels *byte, groups int, ahead int")
	leaf := newLeafPlanes("planes")
	first, pitch := param("dst"), param("rows") // from group to group of the query
	SHLQ(Imm(5), pitch)
	even, left := v.repeated(0x00ff00ff), slot()
	MOVQ(param("leaves"), left)
	Label("leaf")
	dst, q, scale, rows := GP64(), param("q"), param("scale"), param("rows")
	MOVQ(first, dst)
	rowBlocksUntil("nextLeaf", 4, rows, func(r int) {
		for part := range 16 / v.lanes {
			v.scorePart(leaf, q, pitch, even, r, part, func(acc []reg.VecVirtual) {
				stride := param("stride")
				stride3 := triple(stride)
				for i, a := range acc {
					v.placeScores(a, scale, i)
					to := strided(dst, stride, stride3, 4, i)
					to.Disp += 32 * part
					VMOVUPS(a, to)
				}
			})
		}
		stride := param("stride")
		for range r {
			LEAQ(Mem{Base: dst, Index: stride, Scale: 4}, dst)
		}
		ADDQ(Imm(uint64(8*r)), scale)
		ADDQ(U32(uint64(32*r)), q)
	})
	DECQ(left)
	JZ(LabelRef("done"))
	leafStride := param("leafStride")
	LEAQ(Mem{Base: first, Index: leafStride, Scale: 4}, first)
	leaf.next("nextPlanes")
	JMP(LabelRef("leaf"))
	Label("done")
	end()
}

// placeScores turns sums of products into scores of the i-th row from scale.
func (v isa) placeScores(x reg.VecVirtual, scale reg.GPVirtual, i int) {
	y := v.vec()
	VCVTDQ2PS(x, x)
	VBROADCASTSS(Mem{Base: scale, Disp: 8 * i}, y)
	VMULPS(y, x, x)
	VBROADCASTSS(Mem{Base: scale, Disp: 8*i + 4}, y)
	VADDPS(y, x, x)
}

// scorePart sums a group's products of r rows and a part of a leaf's tokens.
func (v isa) scorePart(leaf *leafPlanes, q, pitch reg.GPVirtual, even Op, r, part int, use func(acc []reg.VecVirtual)) {
	label := fmt.Sprintf("part%dx%d", part, r)
	// Even and odd channels have sums of their own: one would be waited for at each product.
	chains := 1
	if v.lanes == 16 {
		chains = 2
	}
	acc := v.zeros(chains * r)
	p, left, at := v.newPlanes(), param("groups"), GP64()
	p.leaf, p.ahead = leaf, param("ahead")
	p.first()
	MOVQ(q, at)
	Label(label)
	for quad, codes := range p.group(label, part) {
		odd := v.vec()
		VPSRLW(Imm(8), codes, odd)
		v.and(even, codes)
		for i := range r {
			for j, x := range []reg.VecVirtual{codes, odd} {
				v.addWords(acc[chains*i+j%chains], x, Mem{Base: at, Disp: 32*i + 8*quad + 4*j})
			}
		}
	}
	p.next()
	ADDQ(pitch, at)
	DECQ(left)
	JNZ(LabelRef(label))
	for i := range r {
		for _, more := range acc[chains*i+1 : chains*(i+1)] {
			VPADDD(more, acc[chains*i], acc[chains*i])
		}
		acc[i] = acc[chains*i]
	}
	use(acc[:r])
}

// addWords adds to acc the products of two words of each lane with those at m.
func (v isa) addWords(acc, x reg.VecVirtual, m Mem) {
	if v.lanes == 16 {
		VPDPWSSD_BCST(m, x, acc)
		return
	}
	y := v.vec()
	VPBROADCASTD(m, y)
	VPMADDWD(x, y, y)
	VPADDD(y, acc, acc)
}

// bins says how the codes of 1 to 4 lines become bins: (code + first) times second, plus third.
var bins = [][3]F32{{}, {32 - 128, .89, 128}, {8, 1, 0}, {2, 1, 0}, {.5, 1, 0}}

// unpackKeys: four lanes' words are brought together to 16 channels of a token.
func (v isa) unpackKeys() {
	table := GLOBL("bins"+v.suffix, RODATA|NOPTR)
	for l, x := range bins {
		for i, f := range x {
			DATA(16*l+4*i, f)
		}
		DATA(16*l+12, F32(0))
	}
	v.function("unpackKeys", "dst *float32, d int, planes *[]byte, lines *uint16, levels *byte, groups int, lo *float32, step *float32")
	dst, d, lo, step, left := param("dst"), param("d"), param("lo"), param("step"), param("groups")
	d3 := triple(d)
	p := v.newPlanes().ofSlices()
	Label("group")
	row := GP64()
	MOVQ(dst, row)
	for part := range 16 / v.lanes {
		codes := p.group(fmt.Sprintf("part%d", part), part)
		v.transpose(codes)
		to, entry := GP64(), GP64()
		LEAQ(table, to)
		MOVQ(p.level, entry)
		SHLQ(Imm(4), entry)
		place := v.binConstants(to, entry)
		for lane := range v.lanes / 4 {
			for i := range 4 {
				v.dequantise(codes[i], lane, place, lo, step, strided(row, d, d3, 4, i))
			}
			LEAQ(Mem{Base: row, Index: d, Scale: 8}, row)
			LEAQ(Mem{Base: row, Index: d, Scale: 8}, row)
		}
	}
	p.next()
	ADDQ(Imm(64), dst)
	ADDQ(Imm(64), lo)
	ADDQ(Imm(64), step)
	DECQ(left)
	JNZ(LabelRef("group"))
	end()
}

// transpose makes of the words of four quads the 16 bytes of a token: part L of
// the i-th vector is that of token 4L + i.
func (v isa) transpose(x []reg.VecVirtual) {
	ab, cd := [2]reg.VecVirtual{v.vec(), v.vec()}, [2]reg.VecVirtual{v.vec(), v.vec()}
	VPUNPCKLDQ(x[1], x[0], ab[0])
	VPUNPCKHDQ(x[1], x[0], ab[1])
	VPUNPCKLDQ(x[3], x[2], cd[0])
	VPUNPCKHDQ(x[3], x[2], cd[1])
	for i := range 2 {
		VPUNPCKLQDQ(cd[i], ab[i], x[2*i])
		VPUNPCKHQDQ(cd[i], ab[i], x[2*i+1])
	}
}

func (v isa) binConstants(table, entry reg.GPVirtual) (c [3]reg.VecVirtual) {
	for i := range c {
		c[i] = v.vec()
		VBROADCASTSS(Mem{Base: table, Index: entry, Scale: 1, Disp: 4 * i}, c[i])
	}
	return c
}

// dequantise writes the 16 channels in a 128-bit lane of codes. Nothing is
// fused: all kernels compute the same bits.
func (v isa) dequantise(codes reg.VecVirtual, lane int, place [3]reg.VecVirtual, lo, step reg.GPVirtual, to Mem) {
	bytes := v.part(codes, lane)
	for at := 0; at < 64; at += 4 * v.lanes {
		x := v.vec()
		VPMOVZXBD(bytes, x)
		VCVTDQ2PS(x, x)
		VADDPS(place[0], x, x)
		VMULPS(place[1], x, x)
		VADDPS(place[2], x, x)
		VMULPS(Mem{Base: step, Disp: at}, x, x)
		VADDPS(Mem{Base: lo, Disp: at}, x, x)
		m := to
		m.Disp += at
		VMOVUPS(x, m)
		if v.lanes == 8 {
			VPSRLDQ(Imm(8), bytes, bytes)
		}
	}
}

// sumCodes: sums of a group's channels stay in registers over all tokens; groups are unpacked once for up to v.rows rows.
func (v isa) sumCodes() {
	v.function("sumCodes", "out *[]float32, w *float32, stride int, rows int, planes *[]byte, lines *uint16, levels *byte, groups int")
	out, w, stride, rows := param("out"), param("w"), param("stride"), param("rows")
	stride3 := triple(stride)
	rowBlocks(v.rows, rows, func(r int) {
		p, left, col := v.newPlanes().ofSlices(), param("groups"), GP64()
		XORQ(col, col)
		label := fmt.Sprintf("groups%d", r)
		Label(label)
		halves := 16 / v.lanes
		acc := v.zeros(r * halves)
		for part := range halves {
			codes := p.group(fmt.Sprintf("%spart%d", label, part), part)
			v.transpose(codes)
			for i, x := range codes {
				for lane := range v.lanes / 4 {
					token := v.lanes*part + 4*lane + i
					v.addCodes(acc, x, lane, r, func(row int) Mem {
						m := strided(w, stride, stride3, 4, row)
						m.Disp += 4 * token
						return m
					})
				}
			}
		}
		for i := range r {
			row := rowOf(out, i)
			for half := range halves {
				v.addTo(Mem{Base: row, Index: col, Scale: 4, Disp: 4 * v.lanes * half}, acc[i*halves+half])
			}
		}
		p.next()
		ADDQ(Imm(16), col)
		DECQ(left)
		JNZ(LabelRef(label))
		nextRows(out, w, stride, r)
	})
}

// addCodes adds the 16 channels in a 128-bit lane of codes, weighted by each row's number, to acc [rows][16/lanes].
func (v isa) addCodes(acc []reg.VecVirtual, codes reg.VecVirtual, lane, rows int, weight func(row int) Mem) {
	bytes := v.part(codes, lane)
	for half := range 16 / v.lanes {
		x := v.vec()
		VPMOVZXBD(bytes, x)
		VCVTDQ2PS(x, x)
		for r := range rows {
			a := acc[r*16/v.lanes+half]
			if v.lanes == 16 {
				VFMADD231PS_BCST(weight(r), x, a)
				continue
			}
			f := v.vec()
			VBROADCASTSS(weight(r), f)
			VFMADD231PS(f, x, a)
		}
		if v.lanes == 8 {
			VPSRLDQ(Imm(8), bytes, bytes)
		}
	}
}

// part returns a 128-bit lane.
func (v isa) part(x reg.VecVirtual, lane int) reg.VecVirtual {
	out := XMM()
	if v.lanes == 16 {
		VEXTRACTI32X4(U8(lane), x, out)
	} else {
		VEXTRACTI128(U8(lane), x, out)
	}
	return out
}
