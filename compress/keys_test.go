package compress

import (
	"bytes"
	"math"
	"testing"

	"pgregory.net/rapid"
)

// reconstruct packs one group's rows and unpacks them at bits 2, 4 or 8.
func reconstruct(rows []float32, n, d, bits int) ([]float32, KeySteps) {
	s := FitKeySteps(rows, d, KeyExp(rows))
	codes := make([]uint8, n*d)
	KeyCodes(codes, rows, d, s)
	k2, k4, k8 := PackKeyPlanes(codes, n, d)
	return unpackAll(k2, k4, k8, n, d, bits, s), s
}

func unpackAll(k2, k4, k8 []byte, n, d, bits int, s KeySteps) []float32 {
	b2, b4, b8 := KeyPlaneLeafBytes(d)
	var out []float32
	for leaf := range (n + 15) / 16 {
		var p4, p8 []byte
		if bits > 2 {
			p4 = k4[leaf*b4:][:b4]
		}
		if bits > 4 {
			p8 = k8[leaf*b8:][:b8]
		}
		dst := make([]float32, 16*d)
		UnpackKeys(dst, k2[leaf*b2:][:b2], p4, p8, d, s)
		out = append(out, dst...)
	}
	return out[:n*d]
}

func TestKeysWithinHalfABin(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		x, n, d := drawRows(t, 256)
		for _, bits := range []int{4, 8} {
			got, s := reconstruct(x, n, d, bits)
			for i, want := range x {
				w := float64(s.Step[i%d]) * float64(int(1)<<(8-bits))
				near(t, "key", float64(got[i]), float64(want), w/2, math.Abs(float64(want))+math.Abs(float64(s.Lo[i%d])))
			}
		}
		got, s := reconstruct(x, n, d, 2)
		for i, want := range x {
			// The outer midpoints move by .11 of their 96 bins to the centre.
			near(t, "2-bit key", float64(got[i]), float64(want), (32+.11*96)*float64(s.Step[i%d]),
				math.Abs(float64(want))+math.Abs(float64(s.Lo[i%d])))
		}
	})
}

func TestStepsCoverAndSurviveStorage(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		x, _, d := drawRows(t, 256)
		exp := KeyExp(x)
		s := FitKeySteps(x, d, exp)
		for i, v := range x {
			lo, w := float64(s.Lo[i%d]), float64(s.Step[i%d])
			if w <= 0 || float64(v) < lo || float64(v) > lo+256*w {
				t.Fatalf("%v is outside %v + 256 * %v", v, lo, w)
			}
		}
		checkStorage(t, s, d, exp)
	})
}

func checkStorage(t interface{ Fatalf(string, ...any) }, s KeySteps, d, exp int) {
	b := s.Append(nil, exp)
	got, err := ParseKeySteps(b, d, exp)
	if err != nil || len(b) != KeyStepsBytes(d) {
		t.Fatalf("%d bytes: %v", len(b), err)
	}
	for j := range d {
		if got.Lo[j] != s.Lo[j] || got.Step[j] != s.Step[j] {
			t.Fatalf("channel %d: %v, %v instead of %v, %v", j, got.Lo[j], got.Step[j], s.Lo[j], s.Step[j])
		}
	}
}

func TestExtremeKeys(t *testing.T) {
	for name, x := range extremes {
		t.Run(name, func(t *testing.T) {
			exp := KeyExp(x)
			checkStorage(t, FitKeySteps(x, 16, exp), 16, exp)
			for _, bits := range []int{2, 4, 8} {
				got, _ := reconstruct(x, 4, 16, bits)
				if !Finite(got) {
					t.Fatalf("%d bits: %v", bits, got)
				}
			}
		})
	}
	for name, rel := range map[string]float64{"constant": 1e-5, "huge bias": 1e-5, "max": .76, "-max": .76, "positive": 1e-3, "negative": 1e-3} {
		got, _ := reconstruct(extremes[name], 4, 16, 8)
		if e := relativeError(got, extremes[name]); e > rel {
			t.Errorf("%s: relative error %v", name, e)
		}
	}
}

func TestKeyExpNormalises(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		x := rapid.Float32Range(0x1p-90, math.MaxFloat32).Draw(t, "x")
		if m := math.Ldexp(float64(x), -KeyExp([]float32{0, -x})); m < 1<<14 || m >= 1<<15 {
			t.Fatalf("%v is %v units", x, m)
		}
	})
	if KeyExp(nil) != 0 || KeyExp([]float32{0}) != 0 {
		t.Fatal("zero has an exponent")
	}
}

// A plane read without the finer ones is the plane of coarser codes.
func TestKeyPlanesNest(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		n, d := rapid.IntRange(1, 100).Draw(t, "n"), rapid.SampledFrom(allDims).Draw(t, "d")
		codes := make([]uint8, n*d)
		for i := range codes {
			codes[i] = uint8(i*37 ^ i>>5)
		}
		k2, k4, k8 := PackKeyPlanes(codes, n, d)
		for i := range codes {
			codes[i] &= 0xf0
		}
		c2, c4, c8 := PackKeyPlanes(codes, n, d)
		if !bytes.Equal(k2, c2) || !bytes.Equal(k4, c4) || !bytes.Equal(c8, make([]byte, len(k8))) {
			t.Fatal("the low nibble shows in the upper planes")
		}
	})
}

// The layout, bit by bit, against the words of PackKeyPlanes' comment.
func TestKeyPlaneLayout(t *testing.T) {
	for _, d := range allDims {
		n := 37 // two leaves and a ragged one
		codes := make([]uint8, n*d)
		for i := range codes {
			codes[i] = uint8(i * 151 >> 2)
		}
		k2, k4, k8 := PackKeyPlanes(codes, n, d)
		b2, b4, b8 := KeyPlaneLeafBytes(d)
		if len(k2) != 3*b2 || len(k4) != 3*b4 || len(k8) != 3*b8 {
			t.Fatalf("d %d: planes of %d, %d, %d bytes", d, len(k2), len(k4), len(k8))
		}
		for i := range 48 {
			for j := range d {
				var want uint8
				if i < n {
					want = codes[i*d+j]
				}
				leaf, tok := i/16, i%16
				at2 := leaf*b2 + 64*(j/16) + 4*tok + j%4
				at4 := leaf*b8 + 64*(j/8) + 4*tok + j%4
				got := k2[at2]>>(2*(j%16/4))&3<<6 | k4[at2]>>(2*(j%16/4))&3<<4 | k8[at4]>>(4*(j%8/4))&15
				if got != want {
					t.Fatalf("d %d, token %d, dim %d: %d instead of %d", d, i, j, got, want)
				}
			}
		}
	}
}

func TestKeyRoundTripOfCodes(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		n, d := rapid.IntRange(1, 2048).Draw(t, "n"), rapid.SampledFrom([]int{16, 48, 64, 80, 128, 256}).Draw(t, "d")
		x := normal(int64(n), n, d)
		s := FitKeySteps(x, d, KeyExp(x))
		codes, want := make([]uint8, n*d), make([]float32, n*d)
		KeyCodes(codes, x, d, s)
		k2, k4, k8 := PackKeyPlanes(codes, n, d)
		UnpackKeyCodes(want, codes, d, s)
		for i, v := range unpackAll(k2, k4, k8, n, d, 8, s) {
			if v != want[i] {
				t.Fatalf("value %d: %v from planes, %v from codes", i, v, want[i])
			}
		}
	})
}

func TestPaddingTokensAreCodeZero(t *testing.T) {
	d := 32
	x := normal(5, 3, d)
	s := FitKeySteps(x, d, KeyExp(x))
	codes := make([]uint8, 3*d)
	KeyCodes(codes, x, d, s)
	k2, k4, k8 := PackKeyPlanes(codes, 3, d)
	dst := make([]float32, 16*d)
	UnpackKeys(dst, k2, k4, k8, d, s)
	for i, v := range dst[3*d:] {
		if want := s.Lo[i%d] + float32(.5*s.Step[i%d]); v != want {
			t.Fatalf("padding %d: %v instead of %v", i, v, want)
		}
	}
}
