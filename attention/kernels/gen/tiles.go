package main

import (
	. "github.com/mmcloughlin/avo/build"
	"github.com/mmcloughlin/avo/ir"
	. "github.com/mmcloughlin/avo/operand"
	"github.com/mmcloughlin/avo/reg"
)

// Tile registers hold up to 16 rows of 64 bytes. One instruction multiplies a tile of signed bytes, [2 rows of words][64],
// with one of unsigned bytes, [16][16][4], of which the last index goes on with the first, and adds to one of 32-bit sums, [2 rows][16]. A
// word of 16 bits is two signed bytes: 256 times the high one, plus the low one. The assembler does not know these instructions.

// tile is a tile register.
type tile byte

// Tiles by what they hold.
const (
	sums0 tile = 0 // to 3
	words tile = 4 // and 5
	codes tile = 6 // and 7
)

const (
	tileRow  = 64
	tileSize = 16 * tileRow
	// tileRows is how many query rows a tile of words holds.
	tileRows = 8
)

// encoded emits an instruction that reads the registers in.
func encoded(code []byte, in ...Op) {
	for _, b := range code {
		Instruction(&ir.Instruction{Opcode: "BYTE", Operands: []Op{U8(b)}, Inputs: in})
	}
}

// Prefixes of the encoding.
const (
	prefixNone = iota
	prefix66
	prefixF3
	prefixF2
)

func vex(prefix int, third tile, code ...byte) []byte {
	return append([]byte{0xc4, 0xe2, byte(^third&15)<<3 | byte(prefix)}, code...)
}

// tileMemory emits an instruction of a tile and the 16 rows at from.
func tileMemory(prefix int, t tile, from Mem) {
	LEAQ(from, reg.RAX)
	MOVQ(U32(tileRow), reg.RCX)
	encoded(vex(prefix, 0, 0x4b, byte(t)<<3|4, 0x08), reg.RAX, reg.RCX)
}

func tileLoad(t tile, from Mem) { tileMemory(prefixF2, t, from) }
func tileStore(t tile, to Mem)  { tileMemory(prefixF3, t, to) }
func tileZero(t tile)           { encoded(vex(prefixF2, 0, 0x49, 0xc0|byte(t)<<3)) }

// tileProducts adds the products of words and codes to sums.
func tileProducts(sums, words, codes tile) {
	encoded(vex(prefixF3, codes, 0x5e, 0xc0|byte(sums)<<3|byte(words)))
}

// tileShapes emits the tiles' shapes for every number of query rows.
func (v isa) tileShapes() Mem {
	table := GLOBL("shapes"+v.suffix, RODATA|NOPTR)
	for n := range tileRows + 1 {
		at := tileRow * n
		for i := range tileRow {
			x := byte(0)
			switch t := tile(i - 48); {
			case i == 0:
				x = 1 // the palette
			case i >= 16 && i < 32 && i%2 == 0:
				x = tileRow // bytes of a row
			case i >= 48 && i < 56 && t < codes:
				x = byte(max(1, 2*n)) // rows
			case i >= 48 && i < 56:
				x = 16
			}
			DATA(at+i, U8(x))
		}
	}
	return table
}

// tileBegin shapes the tiles for so many query rows.
func tileBegin(shapes Mem, rows reg.GPVirtual) {
	LEAQ(shapes, reg.RAX)
	n := GP64()
	MOVQ(rows, n)
	SHLQ(Imm(6), n)
	ADDQ(n, reg.RAX)
	encoded(vex(prefixNone, 0, 0x49, 0x00), reg.RAX)
}

// tileEnd gives the tiles back.
func tileEnd() {
	encoded(vex(prefixNone, 0, 0x49, 0xc0))
	end()
}

// roomBytes is the size of what calls get for tiles in memory (tileRoom); on the stack of a goroutine it would have to be
// made for each.
const roomBytes = 20 << 10

// room returns the first aligned byte of it, of which size are needed.
func room(size int) reg.GPVirtual {
	if size+tileRow > roomBytes {
		panic("tiles need more room")
	}
	base := param("room")
	ADDQ(Imm(tileRow-1), base)
	ANDQ(I8(-tileRow), base)
	return base
}

// highBytes returns the high bytes of words, of which the low ones are signed; half is 128 in each.
func highBytes(words, half reg.VecVirtual, high reg.VecVirtual) reg.VecVirtual {
	VPADDW(half, words, high)
	VPSRLW(Imm(8), high, high)
	return high
}

// splitWords writes the high and low signed bytes of 16 words at from, brought into an order.
func (v isa) splitWords(from Mem, half, order reg.VecVirtual, high, low Mem) {
	w := YMM()
	VMOVDQU(from, w)
	h := highBytes(w, half, YMM())
	for _, x := range []struct {
		from reg.VecVirtual
		to   Mem
	}{{h, high}, {w, low}} {
		b := XMM()
		VPMOVWB(x.from, b)
		VPSHUFB(order, b, b)
		VMOVDQU(b, x.to)
	}
}

// Of scoreLeafTiles' room.
const (
	mostBlocks = 4                     // of 64 channels
	scoreCodes = mostBlocks * tileSize // behind the words
	scoreSums  = scoreCodes + 2*mostBlocks*tileSize
	scoresRoom = scoreSums + 2*tileSize
)

// scoreLeafTiles: codes of two leaves are unpacked to memory and multiplied with all rows at once.
func (v isa) scoreLeafTiles(shapes Mem) {
	order := GLOBL("naturally"+v.suffix, RODATA|NOPTR) // of the words of a group, see Place
	for c := range 16 {
		DATA(c, U8(byte(c&^3|c&1<<1|c>>1&1)))
	}
	v.function("scoreLeafTiles", "dst *float32, leafStride int, stride int, q *int16, pitch int, scale *float32, rows int, planes *[]byte, steps *int, numPlanes int, leaves int, lines *uint16, levels *byte, groups int, ahead int, room *byte")
	frame, rows := room(scoresRoom), param("rows")
	tileBegin(shapes, rows)
	v.queryTiles(frame, rows, order)
	p := v.newPlanes()
	p.leaf = newLeafPlanes("planes")
	second := &leafPlanes{AllocLocal(8 * mostPlanes)}
	dst, left := param("dst"), slot()
	t := param("leaves")
	MOVQ(t, left)
	Label("pair")
	v.unpackPair(p, second, frame, left)
	v.multiplyPair(frame)
	v.writePair(frame, dst, left)
	CMPQ(left, Imm(0))
	JG(LabelRef("pair"))
	tileEnd()
}

// slot returns a word of the stack, for what there is no register for.
func slot() Mem { return AllocLocal(8) }

// queryTiles makes tiles of the query's words, one for each 64 channels.
func (v isa) queryTiles(frame, rows reg.GPVirtual, order Mem) {
	q, pitch, groups, to, lowAt := param("q"), param("pitch"), param("groups"), GP64(), GP64()
	half, shuffle, zero := YMM(), XMM(), ZMM()
	VMOVDQU(v.constant(U32(0x00800080)), half)
	VMOVDQU(order, shuffle)
	v.zero(zero)
	MOVQ(frame, to)
	MOVQ(rows, lowAt)
	SHLQ(Imm(6), lowAt)
	// What the last block has no group for counts nothing.
	last := GP64()
	LEAQ(Mem{Base: groups, Disp: -1}, last)
	SHRQ(Imm(2), last)
	SHLQ(Imm(10), last)
	ADDQ(frame, last)
	for r := range 16 {
		VMOVDQU64(zero, Mem{Base: last, Disp: tileRow * r})
	}
	at := GP64()
	XORQ(at, at)
	Label("split")
	from, into, r := GP64(), GP64(), GP64()
	MOVQ(q, from)
	LEAQ(Mem{Base: to, Index: at, Scale: 1}, into)
	MOVQ(rows, r)
	Label("splitRow")
	v.splitWords(Mem{Base: from}, half, shuffle, Mem{Base: into}, Mem{Base: into, Index: lowAt, Scale: 1})
	ADDQ(Imm(32), from)
	ADDQ(Imm(tileRow), into)
	DECQ(r)
	JNZ(LabelRef("splitRow"))
	ADDQ(pitch, q)
	ADDQ(Imm(16), at)
	CMPQ(at, Imm(tileRow))
	JNE(LabelRef("sameBlock"))
	XORQ(at, at)
	ADDQ(U32(tileSize), to)
	Label("sameBlock")
	DECQ(groups)
	JNZ(LabelRef("split"))
}

// unpackPair writes the codes of the next two leaves to their tiles, those of 64 channels side by side. If there is
// only one left, it is the second one, too.
func (v isa) unpackPair(p *planes, second *leafPlanes, frame reg.GPVirtual, left Mem) {
	second.set("second", p.leaf)
	CMPQ(left, Imm(1))
	JE(LabelRef("last"))
	second.next("secondPlanes")
	Label("last")
	to, groups, inBlock := GP64(), GP64(), GP64()
	LEAQ(Mem{Base: frame, Disp: scoreCodes}, to)
	p.first()
	MOVQ(param("groups"), groups)
	MOVQ(U32(4), inBlock)
	p.ahead = param("ahead")
	Label("group")
	p.eachLevel("lines", func(level int) {
		var lines [2][]reg.VecVirtual
		for l := range level {
			plane, at := GP64(), GP64()
			p.place(l, plane, at)
			for i, leaf := range []*leafPlanes{p.leaf, second} {
				line, from := ZMM(), GP64()
				MOVQ(at, from)
				ADDQ(leaf.at.Idx(plane, 8), from)
				VMOVDQU64(Mem{Base: from}, line)
				PREFETCHT0(Mem{Base: from, Index: p.ahead, Scale: 1})
				lines[i] = append(lines[i], line)
			}
		}
		for i := range lines {
			codes := p.newCodes()
			p.unpack(codes, lines[i])
			for r, x := range codes {
				VMOVDQU64(x, Mem{Base: to, Disp: tileSize*i + tileRow*r})
			}
		}
	})
	p.next()
	ADDQ(U32(4*tileRow), to)
	DECQ(inBlock)
	JNZ(LabelRef("sameTiles"))
	MOVQ(U32(4), inBlock)
	ADDQ(U32(tileSize), to) // the second leaf's
	Label("sameTiles")
	DECQ(groups)
	JNZ(LabelRef("group"))
	p.leaf.set("first", second)
	p.leaf.next("firstPlanes")
}

// multiplyPair multiplies the pair's codes.
func (v isa) multiplyPair(frame reg.GPVirtual) {
	w, from, blocks := GP64(), GP64(), param("groups")
	MOVQ(frame, w)
	LEAQ(Mem{Base: frame, Disp: scoreCodes}, from)
	tileZero(sums0)
	tileZero(sums0 + 1)
	Label("multiply")
	tileLoad(words, Mem{Base: w})
	for i := range tile(2) {
		tileLoad(codes+i, Mem{Base: from, Disp: tileSize * int(i)})
		tileProducts(sums0+i, words, codes+i)
	}
	ADDQ(U32(tileSize), w)
	ADDQ(U32(2*tileSize), from)
	SUBQ(Imm(4), blocks)
	JG(LabelRef("multiply"))
	for i := range tile(2) {
		tileStore(sums0+i, Mem{Base: frame, Disp: scoreSums + tileSize*int(i)})
	}
}

// writePair makes scores of the pair's sums, and goes on to the next one.
func (v isa) writePair(frame, dst reg.GPVirtual, left Mem) {
	from, two := GP64(), GP64()
	LEAQ(Mem{Base: frame, Disp: scoreSums}, from)
	MOVQ(U32(2), two)
	Label("scores")
	row, into, scale, r, lowAt, stride := GP64(), GP64(), param("scale"), param("rows"), GP64(), param("stride")
	MOVQ(from, row)
	MOVQ(dst, into)
	MOVQ(r, lowAt)
	SHLQ(Imm(6), lowAt)
	Label("scoreRow")
	x := ZMM()
	VMOVDQU32(Mem{Base: row}, x)
	VPSLLD(Imm(8), x, x)
	VPADDD(Mem{Base: row, Index: lowAt, Scale: 1}, x, x)
	v.placeScores(x, scale, 0)
	VMOVUPS(x, Mem{Base: into})
	ADDQ(Imm(tileRow), row)
	ADDQ(Imm(8), scale)
	LEAQ(Mem{Base: into, Index: stride, Scale: 4}, into)
	DECQ(r)
	JNZ(LabelRef("scoreRow"))
	ADDQ(U32(tileSize), from)
	leafStride := param("leafStride")
	LEAQ(Mem{Base: dst, Index: leafStride, Scale: 4}, dst)
	DECQ(left)
	JZ(LabelRef("written"))
	DECQ(two)
	JNZ(LabelRef("scores"))
	Label("written")
}
