package compress

import (
	"bytes"
	"errors"
	"testing"
)

func FuzzParseKeySteps(f *testing.F) {
	x := normal(1, 20, 16)
	f.Add(FitKeySteps(x, 16, KeyExp(x)).Append(nil, KeyExp(x)), 16, KeyExp(x), []byte{1, 2, 3})
	f.Add([]byte{}, 0, 0, []byte{})
	f.Fuzz(func(t *testing.T, b []byte, d, exp int, codes []byte) {
		s, err := ParseKeySteps(b, d, exp)
		if err != nil {
			if !errors.Is(err, ErrCorrupt) {
				t.Fatal(err)
			}
			return
		}
		if got := s.Append(nil, exp); len(got) != KeyStepsBytes(d) {
			t.Fatalf("%d bytes", len(got))
		}
		// Whatever parses decodes to finite keys, at every precision.
		var planes [][]byte
		dst := make([]float32, 16*d)
		for _, n := range KeyPlaneBytes(d) {
			b := make([]byte, n)
			copy(b, codes)
			planes = append(planes, b)
			UnpackKeys(dst, d, anyOrder(d).Lines, s, planes...)
			if !Finite(dst) {
				t.Fatalf("not finite: %v", s)
			}
		}
	})
}

// Every order that parses can be used.
func FuzzParseKeyOrder(f *testing.F) {
	f.Add(anyOrder(16).Append(nil), 16)
	f.Add(anyOrder(256).Append(nil), 256)
	f.Fuzz(func(t *testing.T, b []byte, d int) {
		o, err := ParseKeyOrder(b, d)
		if err != nil {
			if !errors.Is(err, ErrCorrupt) {
				t.Fatal(err)
			}
			return
		}
		x := normal(1, 16, d)
		s := FitKeySteps(x, d, KeyExp(x))
		codes, got := make([]uint8, 16*d), make([]float32, 16*d)
		KeyCodes(codes, x, d, s, nil)
		p := PackKeyPlanes(codes, 16, d, o.Lines)
		if known := UnpackKeys(got, d, o.Lines, s, p[:]...); known != d {
			t.Fatalf("%d channels known", known)
		}
		o.Restore(x, got)
	})
}

func FuzzUnpackExactPage(f *testing.F) {
	for _, typ := range elementTypes {
		rows := make([]byte, 5*16*typ.Size())
		FromFloat32(rows, normal(1, 5, 16), typ)
		f.Add(PackExact(rows, 5, 16, typ), 0, 5, uint8(0), uint8(typ))
	}
	dst := make([]byte, 4*pageTokens*MaxHeadDim)
	f.Fuzz(func(t *testing.T, b []byte, page, n int, dim, typ uint8) {
		d, e := (int(dim)+1)*16, ElementType(typ) // one of 16 dims is valid
		if err := UnpackExactPage(dst, b, page, n, d, e); err != nil && !errors.Is(err, ErrCorrupt) {
			t.Fatal(err)
		}
		if err := DecodeExactPage(dst, b, n, d, e); err != nil && !errors.Is(err, ErrCorrupt) {
			t.Fatal(err)
		}
		if err := DecodeExactPage(dst, b, n&15+1, 16, e&3); err != nil && !errors.Is(err, ErrCorrupt) {
			t.Fatal(err)
		}
	})
}

func FuzzPackExact(f *testing.F) {
	f.Add([]byte("sixteen elements of some kind or other"), uint8(2), uint8(0))
	f.Fuzz(func(t *testing.T, b []byte, typ, dim uint8) {
		e := ElementType(typ%3 + 1)
		d := (int(dim)%16 + 1) * 16
		n := (len(b) + d*e.Size() - 1) / (d * e.Size())
		rows := make([]byte, n*d*e.Size())
		copy(rows, b)
		if n > 0 {
			checkExact(t, rows, n, d, e)
		}
	})
}

func FuzzUnpackBlob(f *testing.F) {
	f.Add(PackBlob([]byte("abc")))
	f.Add(PackBlob(bytes.Repeat([]byte("abcdefgh"), 100)))
	f.Fuzz(func(t *testing.T, b []byte) {
		got, err := UnpackBlob(b, 1<<16)
		if err != nil && !errors.Is(err, ErrCorrupt) {
			t.Fatal(err)
		}
		if len(got) > 1<<16 {
			t.Fatalf("%d bytes", len(got))
		}
	})
}

func FuzzUnpackValue(f *testing.F) {
	f.Add([]byte{1, 2, 3, 4, 5, 6, 7, 8, 9})
	f.Fuzz(func(t *testing.T, b []byte) {
		var in [ValueScaleBytes + 2*8]byte
		copy(in[:], b)
		dst := make([]float32, 16)
		UnpackValue(dst, in[:3], in[3:11], in[11:], 16)
		UnpackValue(dst, in[:3], in[3:11], nil, 16)
	})
}
