package kernels

import "math"

// What a survey does with tables of all pages.

// Masses writes to dst the scores of pages, plus logs, plus spreads times half, of which no more than most counts. All have the length of dst.
func Masses(dst, scores, logs, spreads []float32, half, most float32) {
	n := len(dst)
	scores, logs, spreads = scores[:n], logs[:n], spreads[:n]
	whole := n &^ 15
	if whole > 0 {
		masses(dst[:whole], scores, logs, spreads, half, most)
	}
	plainMasses(dst[whole:], scores[whole:], logs[whole:], spreads[whole:], half, most)
}

// Presences writes x plus norm times surprise, which are as long as dst, to dst, and returns the largest of them and least; it ignores what is no number.
func Presences(dst, x, surprise []float32, norm, least float32) float32 {
	n := len(dst)
	x, surprise = x[:n], surprise[:n]
	whole := n &^ 15
	if whole > 0 {
		least = presences(dst[:whole], x, surprise, norm, least)
	}
	return plainPresences(dst[whole:], x[whole:], surprise[whole:], norm, least)
}

// Depths writes to dst how far below top each of x lies, which is as long and of which top is the largest: in units of 1/scale, rounded down, last at most.
// Of what is no number it writes last.
func Depths(dst []int32, x []float32, top, scale float32, last int32) {
	n := len(dst)
	x = x[:n]
	whole := n &^ 15
	if whole > 0 {
		depths(dst[:whole], x, top, scale, last)
	}
	plainDepths(dst[whole:], x[whole:], top, scale, last)
}

// Roots writes the square roots of the products of x and y, which are as long as dst, to dst.
func Roots(dst, x, y []float32) {
	n := len(dst)
	x, y = x[:n], y[:n]
	whole := n &^ 15
	if whole > 0 {
		roots(dst[:whole], x, y)
	}
	plainRoots(dst[whole:], x[whole:], y[whole:])
}

// Multiply multiplies x by y, which is as long.
func Multiply(x, y []float32) {
	y = y[:len(x)]
	whole := len(x) &^ 15
	if whole > 0 {
		multiply(x[:whole], y)
	}
	plainMultiply(x[whole:], y[whole:])
}

func plainMasses(dst, scores, logs, spreads []float32, half, most float32) {
	for i, score := range scores[:len(dst)] {
		raise := spreads[i] * half
		if raise > most { // min would look for what is no number
			raise = most
		}
		dst[i] = score + logs[i] + raise
	}
}

func plainPresences(dst, x, surprise []float32, norm, most float32) float32 {
	for i, y := range surprise[:len(dst)] {
		dst[i] = x[i] + float32(norm*y)
	}
	return plainLargest(dst, most)
}

func plainDepths(dst []int32, x []float32, top, scale float32, last int32) {
	for i, y := range x[:len(dst)] {
		dst[i] = last
		if below := (top - y) * scale; below < float32(last) {
			dst[i] = int32(below)
		}
	}
}

func plainRoots(dst, x, y []float32) {
	for i, z := range y[:len(dst)] {
		dst[i] = float32(math.Sqrt(float64(x[i] * z)))
	}
}

func plainMultiply(x, y []float32) {
	for i, z := range y[:len(x)] {
		x[i] *= z
	}
}
