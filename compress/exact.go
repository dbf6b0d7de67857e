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
//
// On keys and values of real models w is 3, and bfloat16 takes 11.3 bits: the
// same as bit planes under LZ4 (11.2 to 11.5), .7 above the entropy of the
// exponents, and there is no state to decode but the order of the escapes.
const rawPage = 0xff

// split says how many whole bytes and how many further bits the sign and the
// mantissa of an element take.
type split struct{ bytes, bits int }

func splitOf(t ElementType) split {
	switch t {
	case F32:
		return split{3, 0}
	case BF16:
		return split{1, 0}
	}
	return split{1, 3}
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
	if !decodePage(dst, top, codes, whole, bits, body, width, t) {
		return fmt.Errorf("exact page, %d bytes of escapes: %w", len(body), ErrCorrupt)
	}
	return nil
}
