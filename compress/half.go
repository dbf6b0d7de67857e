package compress

import "math"

const (
	f16Inf  = 0x7c00
	f16Max  = 0x7bff // 65504
	f16Sign = 0x8000
)

// f16To32 widens an IEEE binary16; exact, NaN payloads included.
func f16To32(h uint16) float32 {
	sign := uint32(h&f16Sign) << 16
	exp, mant := uint32(h>>10&31), uint32(h&0x3ff)
	switch exp {
	case 0: // subnormal: mant * 2^-24 is exact in float32
		return math.Float32frombits(sign | math.Float32bits(float32(mant)*0x1p-24))
	case 31:
		return math.Float32frombits(sign | 0x7f800000 | mant<<13)
	}
	return math.Float32frombits(sign | (exp+112)<<23 | mant<<13)
}

// f16From32 rounds to the nearest binary16, ties to even; overflow becomes Inf.
func f16From32(x float32) uint16 {
	b := math.Float32bits(x)
	sign := uint16(b >> 16 & f16Sign)
	b &^= 1 << 31
	switch {
	case b > 0x7f800000: // NaN: keep what fits of the payload, and keep it a NaN
		m := uint16(b >> 13 & 0x3ff)
		if m == 0 {
			m = 0x200
		}
		return sign | f16Inf | m
	case b >= 0x47800000: // 65536 and above
		return sign | f16Inf
	case b < 0x38800000: // below 2^-14: adding 1/2 rounds the value to a multiple of 2^-24
		return sign | uint16(math.Float32bits(math.Float32frombits(b)+.5)-0x3f000000)
	}
	b += 0xfff + b>>13&1
	return sign | uint16((b-0x38000000)>>13) // a carry out of the mantissa lands on the next exponent, or on Inf
}

// f16Floor and f16Ceil are the nearest binary16 not above and not below x,
// kept finite. x is finite.
func f16Floor(x float64) uint16 {
	h := f16From32(float32(x))
	for h != f16Sign|f16Max && float64(f16To32(h)) > x {
		h = f16Down(h)
	}
	return f16Clamp(h)
}

func f16Ceil(x float64) uint16 { return f16Floor(-x) ^ f16Sign }

// f16Down is the next binary16 below h.
func f16Down(h uint16) uint16 {
	switch {
	case h&^f16Sign == 0:
		return f16Sign | 1
	case h&f16Sign == 0:
		return h - 1
	}
	return h + 1
}

func f16Clamp(h uint16) uint16 {
	if h&^f16Sign > f16Max {
		return h&f16Sign | f16Max
	}
	return h
}
