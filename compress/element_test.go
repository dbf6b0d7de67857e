package compress

import (
	"encoding/binary"
	"math"
	"testing"

	"pgregory.net/rapid"
)

func TestEveryHalfSurvives(t *testing.T) {
	src, dst := make([]byte, 2), make([]byte, 2)
	x := make([]float32, 1)
	for _, typ := range []ElementType{BF16, F16} {
		for h := range 1 << 16 {
			binary.LittleEndian.PutUint16(src, uint16(h))
			ToFloat32(x, src, typ)
			if FromFloat32(dst, x, typ); dst[0] != src[0] || dst[1] != src[1] {
				t.Fatalf("%v %#04x became %x as %v", typ, h, dst, x[0])
			}
			if !Lossless(x, typ) {
				t.Fatalf("%v %#04x = %v counts as lossy", typ, h, x[0])
			}
		}
	}
}

func TestRounding(t *testing.T) {
	f := func(typ ElementType, x float32, want uint16) {
		t.Helper()
		b := make([]byte, 2)
		FromFloat32(b, []float32{x}, typ)
		if got := binary.LittleEndian.Uint16(b); got != want {
			t.Errorf("%v of %v is %#04x, not %#04x", typ, x, got, want)
		}
	}
	f(F16, 1, 0x3c00)
	f(F16, 1+0x1p-11, 0x3c00)         // tie to even
	f(F16, 1+0x3p-11, 0x3c02)         // tie to even, upwards
	f(F16, 1+0x1p-11+0x1p-20, 0x3c01) // above the tie
	f(F16, 65504, 0x7bff)             // the largest
	f(F16, 65519.99, 0x7bff)          // below the tie with Inf
	f(F16, 65520, 0x7c00)             // the tie with Inf
	f(F16, -1e30, 0xfc00)             // overflow
	f(F16, 0x1p-14, 0x0400)           // the least normal
	f(F16, 0x1p-14-0x1p-26, 0x0400)   // rounds into the normals
	f(F16, 0x1p-24, 0x0001)           // the least subnormal
	f(F16, 0x1p-25, 0x0000)           // tie to zero
	f(F16, 0x1.8p-25, 0x0001)         // above the tie
	f(F16, -0x1p-30, 0x8000)          // minus zero
	f(F16, float32(math.NaN()), 0x7e00)
	f(BF16, 1+0x1p-8, 0x3f80)
	f(BF16, 1+0x3p-8, 0x3f82)
	f(BF16, math.MaxFloat32, 0x7f80)
	f(BF16, float32(math.Inf(-1)), 0xff80)
	f(BF16, math.Float32frombits(0x7f800001), 0x7fc0) // NaN whose payload is cut off
}

func TestHalfFloorAndCeil(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		x := rapid.Float64Range(-65504, 65504).Draw(t, "x") * math.Pow(2, -float64(rapid.IntRange(0, 40).Draw(t, "e")))
		lo, hi := float64(f16To32(f16Floor(x))), float64(f16To32(f16Ceil(x)))
		if lo > x || hi < x {
			t.Fatalf("%v is not within %v, %v", x, lo, hi)
		}
		if lo != hi && float64(f16To32(f16Down(f16Ceil(x)))) > lo {
			t.Fatalf("%v and %v are not neighbours", lo, hi)
		}
	})
}

func TestFinite(t *testing.T) {
	f := func(want bool, x ...float32) {
		t.Helper()
		if Finite(x) != want {
			t.Errorf("Finite(%v) is %v", x, !want)
		}
	}
	inf := float32(math.Inf(1))
	f(true)
	f(true, 0, -1, math.MaxFloat32, -math.MaxFloat32, math.SmallestNonzeroFloat32)
	f(false, 0, inf)
	f(false, -inf, 0)
	f(false, 1, float32(math.NaN()), 1)
	f(false, math.Float32frombits(0xffffffff))
}

func TestLossless(t *testing.T) {
	f := func(typ ElementType, want bool, x ...float32) {
		t.Helper()
		if Lossless(x, typ) != want {
			t.Errorf("Lossless(%v, %v) is %v", x, typ, !want)
		}
	}
	f(F32, true, 1.1)
	f(BF16, false, 1, 1.1)
	f(BF16, true, 1, 0x1p100, 0x1p-130)
	f(F16, true, 1, 65504, 0x1p-24)
	f(F16, false, 65536)
	f(F16, false, 0x1p-25)
	f(ElementType(0), false, 1)
}
