package compress

import (
	"math"

	"kvtier/attention/kernels"
)

// signs are the signs of the rotation: that of dim i is the top bit of the i-th
// output of splitmix64 seeded with 0 (set: minus). They are part of the format.
var signs = func() (s [MaxHeadDim]float32) {
	for i := range s {
		z := uint64(i+1) * 0x9e3779b97f4a7c15
		z = (z ^ z>>30) * 0xbf58476d1ce4e5b9
		z = (z ^ z>>27) * 0x94d049bb133111eb
		z ^= z >> 31
		s[i] = 1
		if z>>63 == 1 {
			s[i] = -1
		}
	}
	return s
}()

// rotationBlock is the largest power of two that divides d: the order of the
// Hadamard matrices on the diagonal of the rotation.
func rotationBlock(d int) int { return d & -d }

// Rotate applies the rotation of values to rows x [n][d] in place: it flips
// signs, then applies a Hadamard matrix to each block of the largest power of
// two that divides d. It is orthonormal, and spreads an outlier over its
// block. Magnitudes stay finite up to 2^120.
func Rotate(x []float32, d int) {
	block := rotationBlock(d)
	norm := float32(1 / math.Sqrt(float64(block)))
	for ; len(x) >= d; x = x[d:] {
		for j := range x[:d] {
			x[j] *= signs[j] * norm
		}
		for b := 0; b < d; b += block {
			kernels.Hadamard(x[b : b+block])
		}
	}
}

// Unrotate is the inverse of Rotate, its transpose, up to rounding.
func Unrotate(x []float32, d int) {
	block := rotationBlock(d)
	norm := float32(1 / math.Sqrt(float64(block)))
	for ; len(x) >= d; x = x[d:] {
		for b := 0; b < d; b += block {
			kernels.Hadamard(x[b : b+block])
		}
		for j := range x[:d] {
			x[j] *= signs[j] * norm
		}
	}
}
