package kernels

import "math"

// Dots writes the products of query rows q [rows][d] and keys k [n][d] to dst
// [rows][n].
func Dots(dst []float32, stride int, q, k []float32, d int) {
	must(d > 0, "d is not positive")
	rows, n := len(q)/d, len(k)/d
	mustHold(len(dst), rows, stride, n, "dst is too short")
	if rows > 0 && n > 0 {
		dots(dst, stride, q, k, rows, n, d)
	}
}

// DotsInt8 is Dots for keys that are signed bytes.
func DotsInt8(dst []float32, stride int, q []float32, k []byte, d int) {
	must(d > 0, "d is not positive")
	rows, n := len(q)/d, len(k)/d
	mustHold(len(dst), rows, stride, n, "dst is too short")
	if rows > 0 && n > 0 {
		dotsInt8(dst, stride, q, k, rows, n, d)
	}
}

// Axpys adds to each row of out, at least [cols], the rows of v [n][d], weighted by its row
// of w [rows][n]. Of all rows it touches the first cols elements only, a multiple of 16 if d is one.
func Axpys(out [][]float32, w []float32, stride int, v []float32, d, cols int) {
	must(d > 0 && cols >= 0 && cols <= d && (!vectorDim(d) || cols%16 == 0), "bad number of columns")
	n := len(v) / d
	mustAdd(out, len(w), stride, n, cols)
	if len(out) > 0 && n > 0 && cols > 0 {
		axpys(out, w, stride, v, n, d, cols)
	}
}

// AxpysInt8 is Axpys of all columns for values that are signed bytes.
func AxpysInt8(out [][]float32, w []float32, stride int, v []byte, d int) {
	must(d > 0, "d is not positive")
	n := len(v) / d
	mustAdd(out, len(w), stride, n, d)
	if len(out) > 0 && n > 0 {
		axpysInt8(out, w, stride, v, n, d)
	}
}

// Largest returns the largest of x and least; it ignores what is no number.
func Largest(x []float32, least float32) float32 {
	whole := len(x) &^ 15
	if whole > 0 {
		least = largest(x[:whole], least)
	}
	if whole < len(x) {
		tail := padded(x[whole:])
		least = largest(tail[:], least)
	}
	return least
}

// leastExponent is where exponentials are 0 from: below, they leave float32's normal range.
const leastExponent = -87

// Weights replaces scores x by their weights exp(x - top) and returns the
// weights' sum. No weight is more than 1: top is the largest score. It is 0 if
// x - top is below -87 or no number.
func Weights(x []float32, top float32) (sum float32) {
	whole := len(x) &^ 15
	if whole > 0 {
		sum = weights(x[:whole], top)
	}
	if whole < len(x) {
		tail := padded(x[whole:])
		sum += weights(tail[:], top)
		copy(x[whole:], tail[:])
	}
	return sum
}

// padded returns fewer than 16 scores with others that count for nothing.
func padded(x []float32) (out [16]float32) {
	for i := copy(out[:], x); i < len(out); i++ {
		out[i] = float32(math.Inf(-1))
	}
	return out
}
