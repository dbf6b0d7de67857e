package kernels

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

// DotsBF16 is Dots for n keys that are bfloat16, little-endian, pitch elements from one to the next.
func DotsBF16(dst []float32, stride int, q []float32, k []byte, n, pitch, d int) {
	must(d > 0, "d is not positive")
	rows := len(q) / d
	mustHold(len(dst), rows, stride, n, "dst is too short")
	mustHold(len(k)/2, n, pitch, d, "k is too short")
	if rows > 0 && n > 0 {
		dotsBF16(dst, stride, q, k, rows, n, pitch, d)
	}
}

// AxpysBF16 is Axpys of all d columns for n values that are bfloat16, little-endian, pitch elements from one to the next.
func AxpysBF16(out [][]float32, w []float32, stride int, v []byte, n, pitch, d int) {
	must(d > 0, "d is not positive")
	mustHold(len(v)/2, n, pitch, d, "v is too short")
	mustAdd(out, len(w), stride, n, d)
	if len(out) > 0 && n > 0 {
		axpysBF16(out, w, stride, v, n, pitch, d)
	}
}

// DotsInt8 is Dots for keys that are signed bytes, d being 256 at most. Rows of q are rounded to 15 bits of their largest magnitude.
func DotsInt8(dst []float32, stride int, q []float32, k []byte, d int) {
	must(d > 0 && d <= mostWordDim, "d is not positive, or too large")
	rows, n := len(q)/d, len(k)/d
	mustHold(len(dst), rows, stride, n, "dst is too short")
	if n == 0 {
		return
	}
	for first := 0; first < rows; first += wordRowsAtOnce {
		var x wordRows
		some := min(wordRowsAtOnce, rows-first)
		toWords(&x, q[first*d:], some, d)
		dotsWords(dst[first*stride:], stride, &x, k, some, n, d)
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

// SquaresInt8 writes the squares of the norms of c [n][d], signed bytes, to dst [n].
func SquaresInt8(dst []float32, c []byte, d int) {
	must(d > 0, "d is not positive")
	n := len(c) / d
	must(len(dst) >= n, "dst is too short")
	if n > 0 {
		squaresInt8(dst, c, n, d)
	}
}

const (
	mostWordDim    = 256 // channels: sums of their products fit 32 bits
	wordRowsAtOnce = 4
)

// wordRows are rows of floats as whole numbers: words times scale. scale is infinite or NaN if one of them is.
type wordRows struct {
	words [wordRowsAtOnce * mostWordDim]int16 // [rows][d]
	scale [wordRowsAtOnce]float32
}
