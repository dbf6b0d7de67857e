package compress

import (
	"encoding/binary"
	"math"
	"slices"

	"kvtier/attention/kernels"
)

// ValueScaleBytes is the stored size of a token's value scale: two bytes of
// step, one byte of zero point.
//
// The step is the width of an 8-bit bin, bits 15 to 30 of a float32: its sign is
// always 0 and needs no bit, so 8 bits of exponent and 8 of mantissa remain. It
// covers all of float32's range, and rounding it up costs less than .4 % of precision.
// Code c stands for [(c - zero) step, (c - zero + 1) step).
const ValueScaleBytes = kernels.ValueScale

// maxValue bounds what values are stored as; rotation of up to 256 of them stays finite.
const maxValue = 0x1p120

// ValueRowBytes is the size of one nibble plane of one token: byte j holds dim
// j in its low nibble and dim j + d/2 in its high nibble.
func ValueRowBytes(d int) int { return d / 2 }

// PackValues rotates a copy of rows [n][d] and quantises each token: scales is
// [n][3], hi and lo [n][d/2] are the planes of the codes' high and low nibbles.
// Rows are finite; magnitudes above 2^120 are stored as 2^120.
func PackValues(rows []float32, n, d int) (scales, hi, lo []byte) {
	w := ValueRowBytes(d)
	scales, hi, lo = make([]byte, n*ValueScaleBytes), make([]byte, n*w), make([]byte, n*w)
	var buf, zeros, inverse [MaxHeadDim]float32
	var codes [MaxHeadDim]uint8
	row := buf[:d]
	for i := range n {
		for j, x := range rows[i*d:][:d] {
			row[j] = min(max(x, -maxValue), maxValue)
		}
		Rotate(row, d)
		step, zero := fitValue(row)
		binary.LittleEndian.PutUint16(scales[i*ValueScaleBytes:], uint16(math.Float32bits(step)>>15))
		scales[i*ValueScaleBytes+2] = zero
		h, l := hi[i*w:][:w], lo[i*w:][:w]
		for j, x := 0, 1/step; j < d; j++ {
			inverse[j] = x
		}
		kernels.Quantise(codes[:], row, zeros[:d], inverse[:d], float32(zero))
		for j := 0; j < w; j += 8 { // eight bytes at a time: d is a multiple of 16
			a, b := binary.LittleEndian.Uint64(codes[j:]), binary.LittleEndian.Uint64(codes[w+j:])
			binary.LittleEndian.PutUint64(h[j:], a>>4&lowNibbles|b&^lowNibbles)
			binary.LittleEndian.PutUint64(l[j:], a&lowNibbles|b<<4&^lowNibbles)
		}
	}
	return scales, hi, lo
}

// lowNibbles is a mask of the low nibble of each byte.
const lowNibbles = 0x0f0f0f0f0f0f0f0f

// fitValue finds the bins that cover a row and 0: zero bins below 0, 256 in all.
func fitValue(row []float32) (step float32, zero uint8) {
	var least, most [groupDims]float32
	kernels.Extremes(least[:], most[:], row) // of every 16th channel, and 0
	lo, hi := slices.Min(least[:]), slices.Max(most[:])
	// Of 256 bins one is lost to 0 being a bin's edge: at most 255 are needed
	// for the range, and the parts below and above 0 fill the last between them.
	step = max((hi-lo)/255, minStep)
	step = math.Float32frombits((math.Float32bits(step) + 0x7fff) &^ 0x7fff)
	return step, uint8(math.Ceil(float64(-lo / step)))
}

// UnpackValue reconstructs one token's value in rotated space: dst is [d], hi
// and lo are ValueRowBytes(d) long. lo may be nil: then dst are the midpoints of the
// 4-bit bins. Unrotate brings values, or any weighted sum of them, back.
func UnpackValue(dst []float32, scale, hi, lo []byte, d int) {
	step, offset := kernels.ParseValueScale(scale, lo != nil)
	w := ValueRowBytes(d)
	for j, b := range hi[:w] {
		x, y := b<<4, b&0xf0
		if lo != nil {
			x |= lo[j] & 15
			y |= lo[j] >> 4
		}
		dst[j] = (float32(x) + offset) * step
		dst[j+w] = (float32(y) + offset) * step
	}
}
