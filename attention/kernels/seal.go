package kernels

// What is stored is made of these: all variants compute the same bits.

// AddRows adds to sum [d] the rows x [n][d], in order, each channel in float64.
func AddRows(sum []float64, x []float32) {
	d := len(sum)
	must(d > 0, "d is not positive")
	if n := len(x) / d; n > 0 {
		addRows(sum, x, n)
	}
}

// Deviations writes the rows x [n][d] less a row [d] to dst.
func Deviations(dst, x, row []float32) {
	d := len(row)
	must(d > 0 && len(dst) >= len(x)/d*d, "dst is too short")
	if n := len(x) / d; n > 0 {
		deviations(dst, x, row, n)
	}
}

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

// MostFeedback bounds feedback, in bins: a key stays near its code whatever other channels' errors are.
const MostFeedback = 4

// QuantiseWithFeedback is Quantise with zero 0, of bins of size step [d], where errors of a row's channels are carried to those behind: after channel i
// is coded, its error, x less the middle of the bin, times feedback [i][j] is added to what channel j > i is coded from. feedback is
// [d][d]. It moves no code by more than MostFeedback bins. Channels are coded one after the other; every step is rounded. Numbers and their sums have to stay finite.
func QuantiseWithFeedback(dst []byte, x, lo, step, inverse, feedback []float32) {
	d := len(lo)
	must(d > 0 && len(step) >= d && len(inverse) >= d && len(dst) >= len(x)/d*d, "dst, step or inverse is too short")
	must(len(feedback) >= d*d, "feedback is too short")
	if n := len(x) / d; n > 0 {
		quantiseWithFeedback(dst, x, n, lo, step, inverse, feedback)
	}
}

// Hadamard multiplies x, of 16 or more and a power of two elements, by
// Sylvester's Hadamard matrix: butterflies at distance 1, 2, 4 and so on.
func Hadamard(x []float32) {
	must(len(x) >= 16 && len(x)&(len(x)-1) == 0, "the length is no power of two from 16 on")
	hadamard(x)
}

func plainAddRows(sum []float64, x []float32, n int) {
	for t := range n {
		for j, y := range x[t*len(sum):][:len(sum)] {
			sum[j] += float64(y)
		}
	}
}

func plainDeviations(dst, x, row []float32, n int) {
	for at := 0; at < n*len(row); at += len(row) {
		to := dst[at:][:len(row)]
		for j, y := range x[at:][:len(row)] {
			to[j] = y - row[j]
		}
	}
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

func plainQuantiseWithFeedback(dst []byte, x []float32, n int, lo, step, inverse, feedback []float32) {
	d := len(lo)
	target := make([]float32, d)
	for t := range n {
		row, codes := x[t*d:][:d], dst[t*d:][:d]
		copy(target, row)
		for i, y := range target {
			bin := float32((row[i] - lo[i]) * inverse[i])
			c := int32(min(max(min(max(float32((y-lo[i])*inverse[i]), bin-MostFeedback), bin+MostFeedback), 0), 255))
			codes[i] = uint8(c)
			e := row[i] - float32(lo[i]+float32((float32(c)+.5)*step[i]))
			behind := target[i+1:]
			for j, f := range feedback[i*d+i+1:][:len(behind)] {
				behind[j] += float32(e * f)
			}
		}
	}
}

// blockwise has use code 16 rows at a time: x and target hold them as [d][16], codes is to be [d][16]. What
// follows the last rows in their block is old or zero.
func blockwise(dst []byte, x []float32, n, d int, use func(codes *byte, target, x *float32)) {
	const tokens = 16
	rows, target, codes := make([]float32, d*tokens), make([]float32, d*tokens), make([]byte, d*tokens)
	for at := 0; at < n; at += tokens {
		some := min(tokens, n-at)
		for t := range some {
			for j, y := range x[(at+t)*d:][:d] {
				rows[j*tokens+t] = y
			}
		}
		copy(target, rows)
		use(&codes[0], &target[0], &rows[0])
		for t := range some {
			to := dst[(at+t)*d:][:d]
			for j := range to {
				to[j] = codes[j*tokens+t]
			}
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
