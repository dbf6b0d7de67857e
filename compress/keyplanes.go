package compress

import "encoding/binary"

// Shrink2 draws 2-bit midpoints towards the centre of the range: the centroid of
// a bell's quarter lies nearer the centre than its midpoint (measured on real keys).
const Shrink2 = .89

// KeyCodes writes the 8-bit floor codes of rows [n][d] to dst [n][d]:
// (x - Lo) / Step, rounded down and clipped to 0..255. s is that of the group
// of up to 256 tokens to which all the rows belong.
func KeyCodes(dst []uint8, rows []float32, d int, s KeySteps) {
	lo, inv := s.Lo[:d], make([]float32, d)
	for j, w := range s.Step[:d] {
		inv[j] = 1 / w
	}
	for ; len(rows) >= d; rows, dst = rows[d:], dst[d:] {
		for j, x := range rows[:d] {
			// Clipping before converting: Go leaves a conversion out of range undefined.
			dst[j] = uint8(int32(min(max((x-lo[j])*inv[j], 0), 255)))
		}
	}
}

// KeyPlaneLeafBytes is the size of a leaf of 16 tokens in each key plane.
func KeyPlaneLeafBytes(d int) (k2, k4, k8 int) { return 4 * d, 4 * d, 8 * d }

// PackKeyPlanes cuts codes [n][d] into planes: bits 7..6, bits 5..4, bits 3..0.
// Each plane holds ceil(n/16) leaves; the last one is padded with zero codes.
//
// A leaf of a 2-bit plane is d/16 lines of 64 bytes. Line i holds a
// little-endian 32-bit word for each of the 16 tokens, with the token's dims
// 16i to 16i+15: dim 16i + 4r + b in bits 2r and 2r+1 of byte b. A leaf of the
// 4-bit plane is d/8 lines; word t of line i holds dims 8i to 8i+7: dim
// 8i + 4r + b in bits 4r to 4r+3 of byte b. So one mask and one dot product of
// bytes handles 4 dims of 16 tokens, and no lane is summed across.
func PackKeyPlanes(codes []uint8, n, d int) (k2, k4, k8 []byte) {
	leaves := (n + leafTokens - 1) / leafTokens
	b2, b4, b8 := KeyPlaneLeafBytes(d)
	k2, k4, k8 = make([]byte, leaves*b2), make([]byte, leaves*b4), make([]byte, leaves*b8)
	for i := range n {
		leaf, t, row := i/leafTokens, i%leafTokens, codes[i*d:][:d]
		packWords(k2[leaf*b2:][:b2], t, row, 6, 2)
		packWords(k4[leaf*b4:][:b4], t, row, 4, 2)
		packWords(k8[leaf*b8:][:b8], t, row, 0, 4)
	}
	return k2, k4, k8
}

// packWords writes the words of token t of a leaf: bits shift to shift+bits-1
// of each code. Four codes at a time are the four bytes of a word, so that the
// r-th four of them need only move up by bits*r.
func packWords(leaf []byte, t int, codes []uint8, shift, bits uint) {
	dims, mask := 32/int(bits), fourOf(bits)
	for i := 0; i < len(codes)/dims; i++ {
		var w uint32
		line := codes[i*dims:][:dims]
		for r := uint(0); len(line) >= 4; r, line = r+bits, line[4:] {
			w |= binary.LittleEndian.Uint32(line) >> shift & mask << r
		}
		binary.LittleEndian.PutUint32(leaf[64*i+4*t:], w)
	}
}

// unpackWords adds the bits of a plane of one leaf to codes [16][d], shifted
// to where they lie in an 8-bit code.
func unpackWords(codes []uint8, leaf []byte, d int, shift, bits uint) {
	dims, mask := 32/int(bits), fourOf(bits)
	for i := 0; i < d/dims; i++ {
		line := leaf[64*i:][:64]
		for t := range leafTokens {
			w := binary.LittleEndian.Uint32(line[4*t:])
			out := codes[t*d+i*dims:][:dims]
			for ; len(out) >= 4; out, w = out[4:], w>>bits {
				c := binary.LittleEndian.Uint32(out)
				binary.LittleEndian.PutUint32(out, c|w&mask<<shift)
			}
		}
	}
}

// fourOf is the mask of the low bits of each byte of a word.
func fourOf(bits uint) uint32 { return (1<<bits - 1) * 0x01010101 }

// UnpackKeys reconstructs one leaf: dst is [16][d], the planes are those of one
// leaf, of at least KeyPlaneLeafBytes. A nil k4 (k8 is then ignored) or k8
// means that fewer bits were read. The result is the midpoint of the bin that
// is known: lo + (c + 1/2) w at 8 and 4 bits; at 2 bits Shrink2 of the way from
// the range's centre to it. The rows of padding tokens are the midpoints of code 0.
func UnpackKeys(dst []float32, k2, k4, k8 []byte, d int, s KeySteps) {
	var buf [leafTokens * MaxHeadDim]uint8
	codes := buf[:leafTokens*d]
	unpackWords(codes, k2, d, 6, 2)
	half := float32(32) // half a bin, in 8-bit bins
	if k4 != nil {
		unpackWords(codes, k4, d, 4, 2)
		half = 8
		if k8 != nil {
			unpackWords(codes, k8, d, 0, 4)
			half = .5
		}
	}
	dequantise(dst, codes, d, s, half)
}

// UnpackKeyCodes reconstructs row-major 8-bit codes [n][d], as KeyCodes writes them.
func UnpackKeyCodes(dst []float32, codes []uint8, d int, s KeySteps) {
	dequantise(dst, codes, d, s, .5)
}

// dequantise places codes [n][d] half bins above their lower ends; at 2 bits
// (half = 32) it shrinks the distance to the centre, 128 bins above Lo.
func dequantise(dst []float32, codes []uint8, d int, s KeySteps, half float32) {
	lo, step := s.Lo[:d], s.Step[:d]
	for ; len(codes) >= d; codes, dst = codes[d:], dst[d:] {
		for j, c := range codes[:d] {
			bins := float32(c) + half
			if half == 32 {
				bins = 128 + float32((bins-128)*Shrink2)
			}
			dst[j] = lo[j] + float32(bins*step[j])
		}
	}
}
