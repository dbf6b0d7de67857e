package kernels

// What is stored depends on these, so that all variants compute the same bits.

// GatherDots writes to dst [len(tokens)] the products of w [d] and the rows of
// x [..][d] that tokens names: Dot of each.
func GatherDots(dst, x []float32, tokens []int, w []float32) {
	d := len(w)
	must(d > 0 && len(dst) >= len(tokens), "dst is too short")
	mustName(tokens, len(x)/d)
	if len(tokens) > 0 {
		gatherDots(dst, x, tokens, w)
	}
}

// GatherAxpy adds to out [d], in order, the rows of x [..][d] that tokens
// names, each times its weight of w [len(tokens)].
func GatherAxpy(out, w, x []float32, tokens []int) {
	d := len(out)
	must(d > 0 && len(w) >= len(tokens), "w is too short")
	mustName(tokens, len(x)/d)
	if len(tokens) > 0 {
		gatherAxpy(out, w, x, tokens)
	}
}

func mustName(tokens []int, rows int) {
	for _, t := range tokens {
		must(uint(t) < uint(rows), "no such row")
	}
}

// MatMul writes the products of the rows of a [m][k], element (i, j) of which lies at i aRow + j aCol, and of b [k][n] to
// dst [m][n]: each is a sum in order of k.
func MatMul(dst, a []float32, aRow, aCol int, b []float32, m, k, n int) {
	must(m >= 0 && k >= 0 && n >= 0 && aRow >= 0 && aCol >= 0, "bad shape")
	must(len(dst)/max(n, 1) >= m && len(b)/max(n, 1) >= k, "dst or b is too short")
	if m == 0 || n == 0 {
		return
	}
	if k == 0 {
		clear(dst[:m*n])
		return
	}
	const most = 1 << 40 // no product overflows
	must(m < most && k < most && aRow < 1<<20 && aCol < 1<<20 && (m-1)*aRow+(k-1)*aCol < len(a), "a is too short")
	matMul(dst, a, aRow, aCol, b, m, k, n)
}

// Dot returns the dot product of two vectors of equal length, of sixteen sums:
// every sixteenth product goes to the same one. These are added up in fours: the first and the third, the
// second and the fourth, and these two; then the four sums likewise; then what is left over.
func Dot(a, b []float32) float32 {
	b = b[:len(a)]
	whole := len(a) &^ 15
	var sum float32
	if whole > 0 {
		sum = dot(a[:whole], b)
	}
	for i := whole; i < len(a); i++ {
		sum += float32(a[i] * b[i])
	}
	return sum
}

func plainDot(a, b []float32) float32 {
	q0, q1 := plainDot8(a, b, 0)
	q2, q3 := plainDot8(a, b, 8)
	return (q0 + q2) + (q1 + q3)
}

// plainDot8 makes eight of the sixteen sums, and adds them up in fours.
func plainDot8(a, b []float32, from int) (float32, float32) {
	var s0, s1, s2, s3, s4, s5, s6, s7 float32
	for i := from; i+8 <= len(a); i += 16 {
		x, y := (*[8]float32)(a[i:]), (*[8]float32)(b[i:])
		s0 += float32(x[0] * y[0])
		s1 += float32(x[1] * y[1])
		s2 += float32(x[2] * y[2])
		s3 += float32(x[3] * y[3])
		s4 += float32(x[4] * y[4])
		s5 += float32(x[5] * y[5])
		s6 += float32(x[6] * y[6])
		s7 += float32(x[7] * y[7])
	}
	return (s0 + s2) + (s1 + s3), (s4 + s6) + (s5 + s7)
}

func plainMatMul(dst, a []float32, aRow, aCol int, b []float32, m, k, n int) {
	for i := range m {
		to := dst[i*n : (i+1)*n]
		clear(to)
		for l := range k {
			w := a[i*aRow+l*aCol]
			for j, x := range b[l*n : (l+1)*n] {
				to[j] += float32(w * x)
			}
		}
	}
}

// Axpy is y += a*x, of vectors of equal length.
func Axpy(y []float32, a float32, x []float32) {
	x = x[:len(y)]
	i := 0
	for ; i+4 <= len(y); i += 4 {
		y[i] += float32(a * x[i])
		y[i+1] += float32(a * x[i+1])
		y[i+2] += float32(a * x[i+2])
		y[i+3] += float32(a * x[i+3])
	}
	for ; i < len(y); i++ {
		y[i] += float32(a * x[i])
	}
}
