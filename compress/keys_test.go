package compress

import (
	"bytes"
	"errors"
	"math"
	"slices"
	"testing"

	"pgregory.net/rapid"
)

// anyOrder is an order that depends on d only.
func anyOrder(d int) KeyOrder {
	importance := make([]float32, d)
	for i := range importance {
		importance[i] = 1 / float32(1+(i*7+3)%d)
	}
	return FitKeyOrder(importance, ones(d), 0)
}

func ones(n int) []float32 {
	x := make([]float32, n)
	for i := range x {
		x[i] = 1
	}
	return x
}

// dequantise places codes half a known bin above their lower ends; of 2-bit
// bins it shrinks the distance to the centre, 128 bins above Lo.
func dequantise(dst []float32, codes []uint8, lo, step []float32, level int) {
	half := float32(uint(256)>>(2*level)) / 2
	for j := range dst {
		bins := float32(codes[j]) + half
		if level == 1 {
			bins = 128 + float32((bins-128)*Shrink2)
		}
		dst[j] = lo[j] + float32(bins*step[j])
	}
}

// reconstruct packs one group's rows and unpacks the first planes, of which all
// channels are known.
func reconstruct(rows []float32, n, d, planes int) ([]float32, KeySteps) {
	s := FitKeySteps(rows, d, KeyExp(rows))
	codes := make([]uint8, n*d)
	KeyCodes(codes, rows, d, s, nil)
	lines := anyOrder(d).Lines
	return unpackAll(PackKeyPlanes(codes, n, d, lines), n, d, planes, lines, s), s
}

func unpackAll(packed [NumKeyPlanes][]byte, n, d, planes int, lines []uint8, s KeySteps) []float32 {
	size := KeyPlaneBytes(d)
	var out []float32
	for leaf := range (n + 15) / 16 {
		var leaves [][]byte
		for p := range planes {
			leaves = append(leaves, packed[p][leaf*size[p]:][:size[p]])
		}
		dst := make([]float32, 16*d)
		UnpackKeys(dst, d, lines, s, leaves...)
		out = append(out, dst...)
	}
	return out[:n*d]
}

// bitsKnown is how many bits of each channel the first planes hold.
func bitsKnown(d, planes int, lines []uint8) []int {
	bits := make([]int, d)
	eachLine(d, lines, planes, func(_, _, group, _ int) {
		for i := range groupDims {
			bits[group*groupDims+i] += 2
		}
	})
	return bits
}

func TestKeysWithinHalfABin(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		x, n, d := drawRows(t, 256)
		for planes := 1; planes <= NumKeyPlanes; planes++ {
			bits := bitsKnown(d, planes, anyOrder(d).Lines)
			got, s := reconstruct(x, n, d, planes)
			for i, want := range x {
				w := float64(s.Step[i%d])
				size := math.Abs(float64(want)) + math.Abs(float64(s.Lo[i%d]))
				switch b := bits[i%d]; b {
				case 0:
					if got[i] != 0 {
						t.Fatalf("channel %d is not known, yet %v", i%d, got[i])
					}
				case 2: // the outer midpoints move by .11 of their 96 bins to the centre
					near(t, "2-bit key", float64(got[i]), float64(want), (32+.11*96)*w, size)
				default:
					near(t, "key", float64(got[i]), float64(want), w*float64(int(1)<<(8-b))/2, size)
				}
			}
		}
	})
}

// Every order is a permutation that Parse takes back; the first planes hold the
// most important channels, and at least 2 bits of every channel.
func TestKeyOrder(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		d := rapid.SampledFrom(allDims).Draw(t, "d")
		importance := rapid.SliceOfN(rapid.Float32Range(0, 1e6), d, d).Draw(t, "importance")
		o := FitKeyOrder(importance, ones(d), 0)
		got, err := ParseKeyOrder(append(o.Append(nil), 1, 2, 3), d)
		if err != nil || !bytes.Equal(got.Channels, o.Channels) || !bytes.Equal(got.Lines, o.Lines) || !bytes.Equal(got.Scatter, o.Scatter) {
			t.Fatalf("%v: %v", o, err)
		}
		for i, c := range o.Channels[1:] {
			if importance[c] > importance[o.Channels[i]] {
				t.Fatalf("channel %d is before %d", o.Channels[i], c)
			}
		}
		for j, b := range bitsKnown(d, 4, o.Lines) {
			if b < 2 || b > 8 {
				t.Fatalf("channel %d has %d bits in four planes", j, b)
			}
		}
		for _, b := range bitsKnown(d, NumKeyPlanes, o.Lines) {
			if b != 8 {
				t.Fatalf("%d bits in all planes", b)
			}
		}
		x := normal(1, 3, d)
		y, back := make([]float32, 3*d), make([]float32, 3*d)
		o.Permute(y, x)
		o.Restore(back, y)
		if !slices.Equal(back, x) || y[0] != x[o.Channels[0]] {
			t.Fatal("permutation is not undone")
		}
	})
	for name, change := range map[string]func(b []byte) []byte{
		"short":     func(b []byte) []byte { return b[:len(b)-1] },
		"channel":   func(b []byte) []byte { b[3] = 64; return b },
		"twice":     func(b []byte) []byte { b[3] = b[4]; return b },
		"group":     func(b []byte) []byte { b[64] = 4; return b },
		"too often": func(b []byte) []byte { copy(b[64:], []byte{0, 0, 0, 0, 0}); return b },
		"late":      func(b []byte) []byte { copy(b[64:], []byte{0, 0, 0, 0, 1, 1, 2, 2}); return b },
	} {
		if _, err := ParseKeyOrder(change(anyOrder(64).Append(nil)), 64); !errors.Is(err, ErrCorrupt) {
			t.Errorf("%s: %v", name, err)
		}
	}
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
			for planes := 1; planes <= NumKeyPlanes; planes++ {
				got, _ := reconstruct(x, 4, 16, planes)
				if !Finite(got) {
					t.Fatalf("%d planes: %v", planes, got)
				}
			}
		})
	}
	for name, rel := range map[string]float64{"constant": 1e-5, "huge bias": 1e-5, "max": .76, "-max": .76, "positive": 1e-3, "negative": 1e-3} {
		got, _ := reconstruct(extremes[name], 4, 16, NumKeyPlanes)
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

// The layout, bit by bit, against the words of PackKeyPlanes' comment.
func TestKeyPlaneLayout(t *testing.T) {
	for _, d := range allDims {
		n := 37 // two leaves and a ragged one
		codes := make([]uint8, n*d)
		for i := range codes {
			codes[i] = uint8(i * 151 >> 2)
		}
		lines := anyOrder(d).Lines
		planes := PackKeyPlanes(codes, n, d, lines)
		var all []byte // leaf after leaf, lines in order
		for leaf := range 3 {
			for p, size := range KeyPlaneBytes(d) {
				if len(planes[p]) != 3*size {
					t.Fatalf("d %d: plane %d has %d bytes", d, p, len(planes[p]))
				}
				all = append(all, planes[p][leaf*size:][:size]...)
			}
		}
		for i := range 48 {
			for j := range d {
				var got, want uint8
				if i < n {
					want = codes[i*d+j]
				}
				for l, g := range lines {
					if int(g) == j/16 {
						word := all[(i/16*len(lines)+l)*64+i%16*4:]
						got = got<<2 | word[j%4]>>(j%16/4*2)&3
					}
				}
				if got != want {
					t.Fatalf("d %d, token %d, channel %d: %d instead of %d", d, i, j, got, want)
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
		KeyCodes(codes, x, d, s, nil)
		lines := anyOrder(d).Lines
		for i := 0; i < len(codes); i += d {
			dequantise(want[i:i+d], codes[i:], s.Lo, s.Step, levels)
		}
		for i, v := range unpackAll(PackKeyPlanes(codes, n, d, lines), n, d, NumKeyPlanes, lines, s) {
			if v != want[i] {
				t.Fatalf("value %d: %v from planes, %v from codes", i, v, want[i])
			}
		}
	})
}

// What bits leave unknown is what KeyNoise says, on a bell.
func TestKeyNoise(t *testing.T) {
	const n, d = 256, 256
	x := normal(7, n, d)
	s := FitKeySteps(x, d, KeyExp(x))
	codes, got := make([]uint8, n*d), make([]float32, n*d)
	KeyCodes(codes, x, d, s, nil)
	for level := 1; level <= levels; level++ {
		var err2, range2 float64
		for i := range n {
			row := codes[i*d:][:d]
			for j := range row {
				row[j] &^= 255 >> (2 * level)
			}
			dequantise(got[i*d:][:d], row, s.Lo, s.Step, level)
			for j := range d {
				e, r := float64(got[i*d+j]-x[i*d+j]), 256*float64(s.Step[j])
				err2, range2 = err2+e*e, range2+r*r
			}
		}
		if ratio := err2 / range2 / float64(KeyNoise[level]); ratio < .8 || ratio > 1.25 {
			t.Errorf("%d bits leave %v of what KeyNoise says", 2*level, ratio)
		}
		KeyCodes(codes, x, d, s, nil)
	}
}

func TestPaddingTokensAreCodeZero(t *testing.T) {
	d := 32
	x := normal(5, 3, d)
	s := FitKeySteps(x, d, KeyExp(x))
	codes := make([]uint8, 3*d)
	KeyCodes(codes, x, d, s, nil)
	lines := anyOrder(d).Lines
	p := PackKeyPlanes(codes, 3, d, lines)
	dst := make([]float32, 16*d)
	UnpackKeys(dst, d, lines, s, p[:]...)
	for i, v := range dst[3*d:] {
		if want := s.Lo[i%d] + float32(.5*s.Step[i%d]); v != want {
			t.Fatalf("padding %d: %v instead of %v", i, v, want)
		}
	}
}
