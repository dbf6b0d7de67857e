package compress

import (
	"encoding/binary"
	"fmt"
	"math"

	"kvtier/attention/kernels"
)

// Bounds on key exponents: at the lower one the smallest step is a normal
// float32, so that its reciprocal is finite; the upper one is that of the
// largest float32.
const (
	minKeyExp = -110
	maxKeyExp = 113
	minStep   = 0x1p-126
	// maxKey bounds what keys are stored as: float32 holds their differences.
	maxKey = 0x1p126
)

// KeySteps are the bins of the keys of a group of up to 256 tokens, by channel:
// code c stands for [Lo + c*Step, Lo + (c+1)*Step), c in 0..255. Both [d]
// slices are exactly what the stored form decodes to; Step is positive.
type KeySteps struct{ Lo, Step []float32 }

// NewKeySteps returns room for the bins of d channels.
func NewKeySteps(d int) KeySteps {
	both := make([]float32, 2*d)
	return KeySteps{both[:d:d], both[d:]}
}

// KeyStepsBytes is the stored size of the steps of a group of tokens: for each 16 channels, a line, their lower ends, then
// their steps, binary16 in units of 2^exp.
func KeyStepsBytes(d int) int { return d / groupDims * lineBytes }

// KeyExp is the exponent to store steps of rows with: the largest magnitude
// lies in [2^14, 2^15) units of 2^exp, so that binary16 overflows nowhere and
// channels 2^20 times smaller still have steps. It is in -110..113, and 0 if
// rows are all zero. Rows are finite.
func KeyExp(rows []float32) int {
	var m uint32 // the bits of non-negative floats order as the floats do
	for _, x := range rows {
		m = max(m, math.Float32bits(x)&^(1<<31))
	}
	if m == 0 {
		return 0
	}
	_, e := math.Frexp(float64(math.Float32frombits(m))) // in [2^(e-1), 2^e)
	return min(max(e-15, minKeyExp), maxKeyExp)
}

// FitKeySteps covers the least to the largest value of each channel of rows
// [n][d], n at least 0, after rounding lower ends down and steps up to their
// stored form. exp comes from KeyExp over these rows and any others.
//
// Rows are finite; magnitudes above 2^126 are stored as 2^126.
func FitKeySteps(rows []float32, d, exp int) KeySteps {
	s := NewKeySteps(d)
	hi := make([]float32, d)
	if len(rows) > 0 {
		copy(s.Lo, rows[:d])
		copy(hi, rows[:d])
	}
	kernels.Extremes(s.Lo, hi, rows)
	for j := range d {
		// Of zeros of both signs kernels find either: a lower end is never -0.
		low, high := min(max(s.Lo[j]+0, -maxKey), maxKey), min(max(hi[j], -maxKey), maxKey)
		s.Lo[j] = stored(f16Floor(math.Ldexp(float64(low), -exp)), exp)
		width := (float64(high) - float64(s.Lo[j])) / 256
		s.Step[j] = stored(f16Ceil(math.Ldexp(max(width, minStep), -exp)), exp)
	}
	return s
}

// stored is the meaning of a stored binary16: h * 2^exp, exact.
func stored(h uint16, exp int) float32 {
	return float32(math.Ldexp(float64(f16To32(h)), exp))
}

// Append appends the stored form, KeyStepsBytes(d) bytes. exp is that of FitKeySteps.
func (s KeySteps) Append(b []byte, exp int) []byte {
	for at := 0; at < len(s.Lo); at += groupDims {
		for _, v := range [2][]float32{s.Lo, s.Step} {
			for _, x := range v[at : at+groupDims] {
				b = binary.LittleEndian.AppendUint16(b, f16From32(float32(math.Ldexp(float64(x), -exp))))
			}
		}
	}
	return b
}

// ParseKeySteps reads the first KeyStepsBytes(d) bytes of b. The error is ErrCorrupt.
func ParseKeySteps(b []byte, d, exp int) (KeySteps, error) {
	if !validDim(d) {
		return KeySteps{}, fmt.Errorf("key steps: %d channels: %w", d, ErrCorrupt)
	}
	s := NewKeySteps(d)
	return s, s.Parse(b, exp)
}

// Of returns the steps of channels [lo, hi).
func (s KeySteps) Of(lo, hi int) KeySteps { return KeySteps{s.Lo[lo:hi], s.Step[lo:hi]} }

// Parse reads the first KeyStepsBytes(d) bytes of b into s, of d channels, a multiple of 16. The
// error is ErrCorrupt, and then s may hold anything.
func (s KeySteps) Parse(b []byte, exp int) error {
	return parseSteps(b, len(s.Lo), exp, func(unit float32) bool { return kernels.Bins(s.Lo, s.Step, b, unit) })
}

// parseSteps checks what is stored of the bins of d channels, and has read read them.
func parseSteps(b []byte, d, exp int, read func(unit float32) (ok bool)) error {
	if exp < minKeyExp || exp > maxKeyExp || len(b) < KeyStepsBytes(d) {
		return fmt.Errorf("key steps: %d bytes for %d channels, exponent %d: %w", len(b), d, exp, ErrCorrupt)
	}
	if !read(float32(math.Ldexp(1, exp))) {
		return fmt.Errorf("key steps: a channel's bins are out of range: %w", ErrCorrupt)
	}
	return nil
}

func finite(x float32) bool { return x-x == 0 }
