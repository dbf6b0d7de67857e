package kernels

// What is stored is made of these: all variants compute the same bits.

// Extremes lowers lo [d] and raises hi [d] to the least and the largest of each channel of rows x [n][d], which are finite.
func Extremes(lo, hi, x []float32) {
	d := len(lo)
	must(d > 0 && len(hi) >= d, "hi is too short")
	if n := len(x) / d; n > 0 {
		extremes(lo, hi, x, n, d)
	}
}

// Quantise writes the codes of rows x [n][d], which are finite: (x - lo) times inverse plus zero, rounded down and clipped to 0..255. lo and
// inverse are [d]; every step is rounded.
func Quantise(dst []byte, x, lo, inverse []float32, zero float32) {
	d := len(lo)
	must(d > 0 && len(inverse) >= d && len(dst) >= len(x)/d*d, "dst or inverse is too short")
	if n := len(x) / d; n > 0 {
		quantise(dst, x, n, lo, inverse, zero)
	}
}

// Hadamard multiplies x, of 16 or more and a power of two elements, by
// Sylvester's Hadamard matrix: butterflies at distance 1, 2, 4 and so on.
func Hadamard(x []float32) {
	must(len(x) >= 16 && len(x)&(len(x)-1) == 0, "the length is no power of two from 16 on")
	hadamard(x)
}

func plainExtremes(lo, hi, x []float32, n, d int) {
	for t := range n {
		for j, y := range x[t*d:][:d] {
			lo[j] = min(lo[j], y)
			hi[j] = max(hi[j], y)
		}
	}
}

func plainQuantise(dst []byte, x []float32, n int, lo, inverse []float32, zero float32) {
	d := len(lo)
	for t := range n {
		codes := dst[t*d:][:d]
		for j, y := range x[t*d:][:d] {
			// Clipping before converting: Go leaves a conversion out of range undefined.
			codes[j] = uint8(int32(min(max(float32((y-lo[j])*inverse[j])+zero, 0), 255)))
		}
	}
}

func plainHadamard(x []float32) {
	for i := 0; i+4 <= len(x); i += 4 { // distances 1 and 2 at once
		y := x[i : i+4]
		a, b := y[0]+y[1], y[0]-y[1]
		c, d := y[2]+y[3], y[2]-y[3]
		y[0], y[1], y[2], y[3] = a+c, b+d, a-c, b-d
	}
	for h := 4; h < len(x); h *= 2 {
		for i := 0; i < len(x); i += 2 * h {
			lo, hi := x[i:i+h], x[i+h:i+2*h]
			for j, a := range lo {
				b := hi[j]
				lo[j], hi[j] = a+b, a-b
			}
		}
	}
}
