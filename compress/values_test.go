package compress

import (
	"bytes"
	"encoding/binary"
	"math"
	"slices"
	"testing"

	"pgregory.net/rapid"
)

func TestRotationIsOrthonormal(t *testing.T) {
	for _, d := range allDims {
		n := 7
		x := normal(int64(d), n, d)
		y := slices.Clone(x)
		Rotate(y, d)
		for i := range n {
			near(t, "norm", norm(y[i*d:][:d]), norm(x[i*d:][:d]), 0, 4*norm(x[i*d:][:d]))
		}
		if d > 16 && relativeError(y, x) < .5 {
			t.Errorf("d %d: the rotation hardly moves", d)
		}
		Unrotate(y, d)
		if e := relativeError(y, x); e > 1e-6 {
			t.Errorf("d %d: relative error %v", d, e)
		}
	}
}

// The matrix itself, against Sylvester's definition: entry (r, c) of a block is
// (-1)^popcount(r&c) / sqrt(block).
func TestRotationMatrix(t *testing.T) {
	for _, d := range allDims {
		block := rotationBlock(d)
		for c := range d {
			x := make([]float32, d)
			x[c] = 1
			Rotate(x, d)
			for r, got := range x {
				want := 0.
				if r/block == c/block {
					want = float64(signs[c]) / math.Sqrt(float64(block))
					for b := r & c & (block - 1); b != 0; b &= b - 1 {
						want = -want
					}
				}
				near(t, "entry", float64(got), want, 0, 1)
			}
		}
	}
}

func TestValuesWithinHalfABin(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		x, n, d := drawRows(t, 64)
		scales, hi, lo := PackValues(x, n, d)
		want := slices.Clone(x)
		Rotate(want, d)
		w := ValueRowBytes(d)
		got := make([]float32, d)
		for i := range n {
			scale, row := scales[3*i:][:3], want[i*d:][:d]
			step := float64(math.Float32frombits(uint32(binary.LittleEndian.Uint16(scale)) << 15))
			if zero, span := float64(scale[2]), float64(slices.Max(row)-slices.Min(row)); step*250 > max(span,
				math.Abs(float64(slices.Max(row))), math.Abs(float64(slices.Min(row))))+1e-37 || zero < 0 {
				t.Fatalf("step %v for a span of %v", step, span)
			}
			UnpackValue(got, scale, hi[i*w:][:w], lo[i*w:][:w], d)
			for j, v := range got {
				near(t, "8-bit value", float64(v), float64(row[j]), step/2, 256*step)
			}
			UnpackValue(got, scale, hi[i*w:][:w], nil, d)
			for j, v := range got {
				near(t, "4-bit value", float64(v), float64(row[j]), 8*step, 256*step)
			}
		}
	})
}

func TestExtremeValues(t *testing.T) {
	for name, x := range extremes {
		scales, hi, lo := PackValues(x, 4, 16)
		got := make([]float32, 16)
		for i := range 4 {
			for _, low := range [][]byte{nil, lo[8*i:][:8]} {
				UnpackValue(got, scales[3*i:], hi[8*i:][:8], low, 16)
				Unrotate(got, 16)
				if !Finite(got) {
					t.Fatalf("%s: %v", name, got)
				}
				if row := x[16*i:][:16]; low != nil && norm(row) > 1e-30 && norm(row) < 1e36 && relativeError(got, row) > .01 {
					t.Errorf("%s: %v instead of %v", name, got, row)
				}
			}
		}
	}
}

func TestZeroRowsCostNothing(t *testing.T) {
	scales, hi, lo := PackValues(make([]float32, 64), 1, 64)
	got := make([]float32, 64)
	UnpackValue(got, scales, hi, lo, 64)
	if norm(got) > 1e-36 {
		t.Fatalf("zero became %v", got)
	}
}

func TestPackValuesLeavesRowsAlone(t *testing.T) {
	x := normal(1, 3, 48)
	y := slices.Clone(x)
	s1, h1, l1 := PackValues(x, 3, 48)
	if !slices.Equal(x, y) {
		t.Fatal("rows changed")
	}
	s2, h2, l2 := PackValues(x[48:], 2, 48)
	if !bytes.Equal(s1[3:], s2) || !bytes.Equal(h1[24:], h2) || !bytes.Equal(l1[24:], l2) {
		t.Fatal("a row's codes depend on other rows")
	}
}
