package compress

import (
	"encoding/binary"
	"math"

	"kvtier/attention/kernels"
)

// ElementType is the type of a value of an unquantised row. The numbers are
// those of the protocol and of the format.
type ElementType uint8

// The element types, little-endian in memory.
const (
	F32  ElementType = 1
	BF16 ElementType = 2
	F16  ElementType = 3
)

// Size is the size of an element in bytes; 0 if the type is unknown.
func (t ElementType) Size() int {
	switch t {
	case F32:
		return 4
	case BF16, F16:
		return 2
	}
	return 0
}

func (t ElementType) String() string {
	switch t {
	case F32:
		return "f32"
	case BF16:
		return "bf16"
	case F16:
		return "f16"
	}
	return "unknown"
}

// ToFloat32 widens len(dst) elements of src; exact for every type.
func ToFloat32(dst []float32, src []byte, t ElementType) {
	src = src[:len(dst)*t.Size()]
	switch t {
	case F32:
		for i := range dst {
			dst[i] = math.Float32frombits(binary.LittleEndian.Uint32(src[4*i:]))
		}
	case BF16:
		kernels.WidenBF16(dst, src)
	case F16:
		for i := range dst {
			dst[i] = f16To32(binary.LittleEndian.Uint16(src[2*i:]))
		}
	}
}

// FromFloat32 rounds src to elements, to nearest with ties to even. What is too
// large becomes Inf: callers check with Lossless or Finite. NaN stays NaN.
func FromFloat32(dst []byte, src []float32, t ElementType) {
	dst = dst[:len(src)*t.Size()]
	switch t {
	case F32:
		for i, x := range src {
			binary.LittleEndian.PutUint32(dst[4*i:], math.Float32bits(x))
		}
	case BF16:
		for i, x := range src {
			binary.LittleEndian.PutUint16(dst[2*i:], bf16From32(x))
		}
	case F16:
		for i, x := range src {
			binary.LittleEndian.PutUint16(dst[2*i:], f16From32(x))
		}
	}
}

// bf16From32 rounds to the nearest bfloat16, ties to even.
func bf16From32(x float32) uint16 {
	b := math.Float32bits(x)
	if b&^(1<<31) > 0x7f800000 { // NaN: rounding must not turn it into Inf
		h := uint16(b >> 16)
		if h&0x7f == 0 {
			h |= 0x40
		}
		return h
	}
	return uint16((b + 0x7fff + b>>16&1) >> 16)
}

// Lossless says whether every value is representable in t, bit for bit.
func Lossless(src []float32, t ElementType) bool {
	switch t {
	case F32:
		return true
	case BF16:
		var low uint32
		for _, x := range src {
			low |= math.Float32bits(x)
		}
		return low&0xffff == 0
	case F16:
		for _, x := range src {
			if math.Float32bits(f16To32(f16From32(x))) != math.Float32bits(x) {
				return false
			}
		}
		return true
	}
	return false
}

// Finite says whether src holds no NaN and no Inf.
func Finite(src []float32) bool {
	var bad uint32
	for _, x := range src {
		// An exponent of all ones, and no other, carries into bit 31.
		bad |= math.Float32bits(x)&0x7f800000 + 0x00800000
	}
	return bad>>31 == 0
}
