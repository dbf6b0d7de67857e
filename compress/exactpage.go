package compress

import (
	"encoding/binary"
	"math/bits"
)

// eightOf is a byte in each byte of a word: values are handled in eights.
const eightOf = 0x0101010101010101

// appendExactPage packs the rows of one page.
func appendExactPage(out, rows []byte, d int, t ElementType) []byte {
	s, v := splitOf(t), len(rows)/t.Size()
	var buf [pageTokens * MaxHeadDim]uint8
	exps := buf[:v]
	exponents(exps, rows, t)
	var top [MaxHeadDim]uint8
	for i := 0; i < v; i += d {
		for j, e := range exps[i : i+d] {
			top[j] = max(top[j], e)
		}
	}
	var count [256]int
	for i := 0; i < v; i += d {
		for j, e := range exps[i : i+d] {
			count[top[j]-e]++
		}
	}
	width, size := bestWidth(count, s, v, d)
	if size >= 1+len(rows) {
		return append(append(out, rawPage), rows...)
	}

	at := len(out)
	out = append(out, make([]byte, size)...)
	page := out[at:]
	page[0] = byte(width)
	copy(page[1:], top[:d])
	codes := page[1+d:]
	whole := codes[v/8*width:]
	high := whole[v*s.bytes:]
	escapes := high[v/8*s.bits:]
	escape := uint8(1)<<width - 1
	for i := 0; i < v; i += 8 {
		var w uint64
		tops := top[i%d:][:8]
		for k, e := range exps[i : i+8] {
			c := tops[k] - e
			if c >= escape {
				c = escape
				escapes[0] = e
				escapes = escapes[1:]
			}
			w |= uint64(c) << (k * width & 63)
		}
		storeBits(codes[i/8*width:], w, width)
	}
	switch t {
	case F32:
		for i := range v {
			b := binary.LittleEndian.Uint32(rows[4*i:])
			r := whole[3*i:][:3]
			r[0], r[1], r[2] = byte(b), byte(b>>8), byte(b>>16)&0x7f|byte(b>>24)&0x80
		}
	case BF16:
		for i := range v {
			whole[i] = rows[2*i]&0x7f | rows[2*i+1]&0x80
		}
	case F16:
		for i := 0; i < v; i += 8 {
			var w uint64
			for k := range 8 {
				b := binary.LittleEndian.Uint16(rows[2*(i+k):])
				whole[i+k] = byte(b)
				w |= uint64(b>>8&3|b>>15<<2) << (3 * k)
			}
			storeBits(high[i/8*3:], w, 3)
		}
	}
	return out
}

// bestWidth is the code width that makes a page least, and the page's size then.
// count is how many values lie how far below their channel's largest exponent.
func bestWidth(count [256]int, s split, v, d int) (width, size int) {
	escapes := v // at width 0 every value escapes
	size = s.fixedBytes(v, d, 0) + escapes
	for w := 1; w < 8; w++ {
		for c := 1<<(w-1) - 1; c < 1<<w-1; c++ {
			escapes -= count[c]
		}
		if n := s.fixedBytes(v, d, w) + escapes; n < size {
			width, size = w, n
		}
	}
	return width, size
}

// exponents extracts the exponents of elements.
func exponents(exps []uint8, rows []byte, t ElementType) {
	switch t {
	case F32:
		for i := range exps {
			exps[i] = uint8(binary.LittleEndian.Uint32(rows[4*i:]) >> 23)
		}
	case BF16:
		for i := range exps {
			exps[i] = uint8(binary.LittleEndian.Uint16(rows[2*i:]) >> 7)
		}
	case F16:
		for i := range exps {
			exps[i] = uint8(binary.LittleEndian.Uint16(rows[2*i:]) >> 10 & 31)
		}
	}
}

// decodePage writes len(dst) bytes of elements from the parts of a page, whose
// sizes fit. It says whether there are exactly as many escapes as the codes ask for.
func decodePage(dst, top, codes, whole, high, escapes []byte, width int, t ElementType) bool {
	sp := newSpread(width)
	escape := uint64(1<<width-1) * eightOf
	values := len(dst) / t.Size()
	for i, channel := 0, 0; i < values; i += 8 {
		c := sp.bytes(loadBits(codes[i/8*width:], width))
		// Codes are below 128, so nothing borrows across bytes: bit 7 of a byte
		// says that it holds the escape.
		hit := (0x80*eightOf - (c ^ escape)) & (0x80 * eightOf)
		escaped := hit >> 7 * 0xff
		// In a sound page no code exceeds its channel's top, so nothing borrows here either.
		e := (binary.LittleEndian.Uint64(top[channel:]) - c&^escaped) &^ escaped
		for ; hit != 0; hit &= hit - 1 {
			if len(escapes) == 0 {
				return false
			}
			e |= uint64(escapes[0]) << (bits.TrailingZeros64(hit) - 7)
			escapes = escapes[1:]
		}
		if channel += 8; channel == len(top) {
			channel = 0
		}
		switch t {
		case F32:
			joinF32(dst[4*i:], e, whole[3*i:])
		case BF16:
			joinBF16(dst[2*i:], e, whole[i:])
		case F16:
			joinF16(dst[2*i:], e, whole[i:], loadBits(high[i/8*3:], 3))
		}
	}
	return len(escapes) == 0
}

// joinF32, joinBF16 and joinF16 write 8 elements: exponents are the bytes of e.
func joinF32(dst []byte, e uint64, whole []byte) {
	dst, whole = dst[:32], whole[:24]
	for k := range 8 {
		r := whole[3*k:][:3]
		x := uint32(r[0]) | uint32(r[1])<<8 | uint32(r[2]&0x7f)<<16 | uint32(r[2]>>7)<<31
		binary.LittleEndian.PutUint32(dst[4*k:], x|uint32(e>>(8*k)&0xff)<<23)
	}
}

func joinBF16(dst []byte, e uint64, whole []byte) {
	const sign, mantissa = 0x0080008000800080, 0x007f007f007f007f
	dst, r := dst[:16], binary.LittleEndian.Uint64(whole)
	lo, hi := widen(r), widen(r>>32) // 4 elements are 4 lanes of 16 bits
	binary.LittleEndian.PutUint64(dst, lo&sign<<8|widen(e)<<7|lo&mantissa)
	binary.LittleEndian.PutUint64(dst[8:], hi&sign<<8|widen(e>>32)<<7|hi&mantissa)
}

// widen moves the low 4 bytes of x to the low bytes of 4 lanes of 16 bits.
func widen(x uint64) uint64 {
	x = (x&0xffffffff | x<<16) & 0x0000ffff0000ffff
	return (x | x<<8) & 0x00ff00ff00ff00ff
}

func joinF16(dst []byte, e uint64, whole []byte, high uint64) {
	dst, whole = dst[:16], whole[:8]
	for k := range 8 {
		h := uint16(high >> (3 * k) & 7)
		binary.LittleEndian.PutUint16(dst[2*k:], uint16(whole[k])|h&3<<8|h>>2<<15|uint16(e>>(8*k)&31)<<10)
	}
}

// storeBits and loadBits move 8 codes of width bits each: width bytes, little-endian.
func storeBits(b []byte, w uint64, width int) {
	for k := range b[:width] {
		b[k] = byte(w >> (8 * k & 63))
	}
}

func loadBits(b []byte, width int) (w uint64) {
	if len(b) >= 8 {
		return binary.LittleEndian.Uint64(b) & (1<<(8*width&63) - 1)
	}
	for k, x := range b[:width] {
		w |= uint64(x) << (8 * k & 63)
	}
	return w
}

// spread moves 8 codes of some width, next to each other, to the low bits of
// 8 bytes, by halves: fours, twos, ones.
type spread struct {
	width          int
	four, two, one uint64
}

func newSpread(width int) spread {
	return spread{width, 1<<(4*width) - 1, (1<<(2*width) - 1) * 0x100000001, (1<<width - 1) * 0x1000100010001}
}

func (s spread) bytes(w uint64) uint64 {
	w = w&s.four | w&^s.four<<(32-4*s.width&63)
	w = w&s.two | w&^s.two<<(16-2*s.width&63)
	return w&s.one | w&^s.one<<(8-s.width&63)
}
