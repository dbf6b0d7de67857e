package compress

import (
	"encoding/binary"
	"fmt"
)

// Exact rows are cut into pages of 64 tokens, each packed on its own. After a
// table of where each page ends (32 bits a page, from the start of packed), a
// page is
//
//	1 byte          width w of an exponent code in bits, 0..7; rawPage: the rows follow as they are
//	d bytes         largest exponent of each channel in the page
//	n*d*w/8 bytes   codes: largest exponent - exponent; 2^w-1 means that an escape says the exponent
//	n*d*k bytes     the k whole bytes of sign and mantissa, little-endian, sign on top
//	n*d*r/8 bytes   the r bits above them (3 for F16, else 0)
//	the rest        escapes: one byte of exponent each, in the order of the codes
//
// in row-major order throughout. Eight codes share w bytes: code i lies in bits
// i*w and up of a little-endian number. w is the width that makes the page least.
const rawPage = 0xff

// split says how an element divides: exponent bits, mantissa bits, and how many
// whole bytes and further bits sign and mantissa take.
type split struct{ exp, mant, bytes, bits int }

func splitOf(t ElementType) split {
	switch t {
	case F32:
		return split{8, 23, 3, 0}
	case BF16:
		return split{8, 7, 1, 0}
	}
	return split{5, 10, 1, 3}
}

// fixedBytes is the size of a page of v values without escapes.
func (s split) fixedBytes(v, d, width int) int {
	return 1 + d + v/8*(width+s.bits) + v*s.bytes
}

// ExactPages is the number of pages of n rows.
func ExactPages(n int) int { return (n + pageTokens - 1) / pageTokens }

// PackExact packs rows, n of them with d elements each, so that
// UnpackExactPage returns them bit for bit, whatever they hold. It is below
// 4 GiB.
func PackExact(rows []byte, n, d int, t ElementType) []byte {
	size := t.Size()
	out := make([]byte, 4*ExactPages(n), 4*ExactPages(n)+n*d*size)
	for page := range ExactPages(n) {
		m := min(pageTokens, n-page*pageTokens)
		out = appendExactPage(out, rows[page*pageTokens*d*size:][:m*d*size], d, t)
		binary.LittleEndian.PutUint32(out[4*page:], uint32(len(out)))
	}
	return out
}

// appendExactPage packs the rows of one page.
func appendExactPage(out, rows []byte, d int, t ElementType) []byte {
	s, v := splitOf(t), len(rows)/t.Size()
	var expBuf [pageTokens * MaxHeadDim]uint8
	var restBuf [pageTokens * MaxHeadDim]uint32
	exps, rest := expBuf[:v], restBuf[:v]
	splitRows(exps, rest, rows, t)

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

	out = append(out, byte(width))
	out = append(out, top[:d]...)
	var escapes []byte
	escape := uint8(1)<<width - 1
	for i := 0; i < v; i += 8 {
		var w uint64
		for k, e := range exps[i : i+8] {
			c := top[i%d+k] - e
			if c >= escape {
				c = escape
				escapes = append(escapes, e)
			}
			w |= uint64(c) << (k * width)
		}
		out = appendBits(out, w, width)
	}
	for _, r := range rest {
		for k := range s.bytes {
			out = append(out, byte(r>>(8*k)))
		}
	}
	for i := 0; i < v && s.bits > 0; i += 8 {
		var w uint64
		for k, r := range rest[i : i+8] {
			w |= uint64(r>>(8*s.bytes)) << (k * s.bits)
		}
		out = appendBits(out, w, s.bits)
	}
	return append(out, escapes...)
}

// bestWidth is the code width that makes a page least, and the page's size then.
// count is how many values lie how far below their channel's largest exponent.
func bestWidth(count [256]int, s split, v, d int) (width, size int) {
	size = 1 << 30
	escapes := v // at width 0 every value escapes
	for w := range 8 {
		if w > 0 {
			for c := 1<<(w-1) - 1; c < 1<<w-1; c++ {
				escapes -= count[c]
			}
		}
		if n := s.fixedBytes(v, d, w) + escapes; n < size {
			width, size = w, n
		}
	}
	return width, size
}

// splitRows cuts elements into exponents, and signs above mantissas.
func splitRows(exps []uint8, rest []uint32, rows []byte, t ElementType) {
	switch t {
	case F32:
		for i := range exps {
			b := binary.LittleEndian.Uint32(rows[4*i:])
			exps[i], rest[i] = uint8(b>>23), b>>31<<23|b&0x7fffff
		}
	case BF16:
		for i := range exps {
			b := binary.LittleEndian.Uint16(rows[2*i:])
			exps[i], rest[i] = uint8(b>>7), uint32(b>>15<<7|b&0x7f)
		}
	case F16:
		for i := range exps {
			b := binary.LittleEndian.Uint16(rows[2*i:])
			exps[i], rest[i] = uint8(b>>10&31), uint32(b>>15<<10|b&0x3ff)
		}
	}
}

// joinRow is the inverse of splitRows.
func joinRows(rows []byte, exps []uint8, rest []uint32, t ElementType) {
	switch t {
	case F32:
		for i, r := range rest {
			binary.LittleEndian.PutUint32(rows[4*i:], r>>23<<31|uint32(exps[i])<<23|r&0x7fffff)
		}
	case BF16:
		for i, r := range rest {
			binary.LittleEndian.PutUint16(rows[2*i:], uint16(r>>7<<15|uint32(exps[i])<<7|r&0x7f))
		}
	case F16:
		for i, r := range rest {
			binary.LittleEndian.PutUint16(rows[2*i:], uint16(r>>10<<15|uint32(exps[i]&31)<<10|r&0x3ff))
		}
	}
}

// appendBits appends 8 codes of width bits, which w holds: width bytes.
func appendBits(out []byte, w uint64, width int) []byte {
	for k := range width {
		out = append(out, byte(w>>(8*k)))
	}
	return out
}

// loadBits is the inverse of appendBits.
func loadBits(b []byte, width int) (w uint64) {
	for k, x := range b[:width] {
		w |= uint64(x) << (8 * k)
	}
	return w
}

// ExactPage is where page lies in packed, of n rows with d elements each: a
// reader needs the table (4*ExactPages(n) bytes) and these bytes. The table alone
// is looked at; the end may lie past what is in memory. The error is ErrCorrupt.
func ExactPage(table []byte, page, n, d int, t ElementType) (off, size int, err error) {
	pages := ExactPages(n)
	if t.Size() == 0 || !validDim(d) || page < 0 || page >= pages || len(table) < 4*pages {
		return 0, 0, fmt.Errorf("exact page %d of %d rows: %w", page, n, ErrCorrupt)
	}
	off = 4 * pages
	if page > 0 {
		off = int(binary.LittleEndian.Uint32(table[4*(page-1):]))
	}
	size = int(binary.LittleEndian.Uint32(table[4*page:])) - off
	rows := min(pageTokens, n-page*pageTokens)
	if off < 4*pages || size < 1 || size > 1+rows*d*t.Size() {
		return 0, 0, fmt.Errorf("exact page %d of %d rows: bytes %d to %d: %w", page, n, off, off+size, ErrCorrupt)
	}
	return off, size, nil
}

// UnpackExactPage writes the rows of a page of 64 tokens, fewer in the last one,
// to the start of dst. packed is what PackExact made of n rows with d
// elements of type t. The error is ErrCorrupt.
func UnpackExactPage(dst, packed []byte, page, n, d int, t ElementType) error {
	off, size, err := ExactPage(packed, page, n, d, t)
	if err != nil {
		return err
	}
	if off+size > len(packed) {
		return fmt.Errorf("exact page %d ends at %d of %d bytes: %w", page, off+size, len(packed), ErrCorrupt)
	}
	return DecodeExactPage(dst, packed[off:off+size], min(pageTokens, n-page*pageTokens), d, t)
}

// DecodeExactPage is UnpackExactPage on the bytes of one page of m rows, 1 to 64.
func DecodeExactPage(dst, body []byte, m, d int, t ElementType) error {
	if t.Size() == 0 || !validDim(d) || m < 1 || m > pageTokens || len(dst) < m*d*t.Size() || len(body) < 1 {
		return fmt.Errorf("exact page of %d rows, %d bytes: %w", m, len(body), ErrCorrupt)
	}
	dst = dst[:m*d*t.Size()]
	width := int(body[0])
	if width == rawPage {
		if len(body) != 1+len(dst) {
			return fmt.Errorf("raw exact page of %d bytes for %d: %w", len(body), len(dst), ErrCorrupt)
		}
		copy(dst, body[1:])
		return nil
	}
	s, v := splitOf(t), m*d
	if width > 7 || len(body) < s.fixedBytes(v, d, width) {
		return fmt.Errorf("exact page of %d bytes with codes of %d bits: %w", len(body), width, ErrCorrupt)
	}
	cut := func(n int) (b []byte) {
		b, body = body[:n:n], body[n:]
		return b
	}
	cut(1)
	top, codes, whole, bits := cut(d), cut(v/8*width), cut(v*s.bytes), cut(v/8*s.bits)
	var expBuf [pageTokens * MaxHeadDim]uint8
	var restBuf [pageTokens * MaxHeadDim]uint32
	exps, rest := expBuf[:v], restBuf[:v]
	if !unpackExponents(exps, top, codes, body, width, d) {
		return fmt.Errorf("exact page with %d escapes: %w", len(body), ErrCorrupt)
	}
	unpackRest(rest, whole, bits, s)
	joinRows(dst, exps, rest, t)
	return nil
}

// unpackExponents turns codes into exponents. It says whether there are as many
// escapes as the codes ask for.
func unpackExponents(exps, top, codes, escapes []uint8, width, d int) bool {
	escape := uint8(1)<<width - 1
	used := 0
	for i := 0; i < len(exps); i += 8 {
		w := loadBits(codes[i/8*width:], width)
		t := top[i%d:][:8]
		for k := range exps[i : i+8] {
			c := uint8(w>>(k*width)) & escape
			if c == escape {
				if used == len(escapes) {
					return false
				}
				exps[i+k] = escapes[used]
				used++
				continue
			}
			exps[i+k] = t[k] - c
		}
	}
	return used == len(escapes)
}

// unpackRest reads signs and mantissas.
func unpackRest(rest []uint32, whole, bits []byte, s split) {
	switch s.bytes {
	case 1:
		for i := range rest {
			rest[i] = uint32(whole[i])
		}
	case 3:
		for i := range rest {
			b := whole[3*i:][:3]
			rest[i] = uint32(b[0]) | uint32(b[1])<<8 | uint32(b[2])<<16
		}
	}
	for i := 0; i < len(rest) && s.bits > 0; i += 8 {
		w := loadBits(bits[i/8*s.bits:], s.bits)
		for k := range 8 {
			rest[i+k] |= uint32(w>>(k*s.bits)) & (1<<s.bits - 1) << (8 * s.bytes)
		}
	}
}
