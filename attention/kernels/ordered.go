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

// Dot returns the dot product of two vectors of equal length, of four sums:
// every fourth product goes to the same one, and what is left over to the first.
func Dot(a, b []float32) float32 {
	var s0, s1, s2, s3 float32
	b = b[:len(a)]
	i := 0
	for ; i+4 <= len(a); i += 4 {
		s0 += a[i] * b[i]
		s1 += a[i+1] * b[i+1]
		s2 += a[i+2] * b[i+2]
		s3 += a[i+3] * b[i+3]
	}
	for ; i < len(a); i++ {
		s0 += a[i] * b[i]
	}
	return (s0 + s1) + (s2 + s3)
}

// Axpy is y += a*x, of vectors of equal length.
func Axpy(y []float32, a float32, x []float32) {
	x = x[:len(y)]
	i := 0
	for ; i+4 <= len(y); i += 4 {
		y[i] += a * x[i]
		y[i+1] += a * x[i+1]
		y[i+2] += a * x[i+2]
		y[i+3] += a * x[i+3]
	}
	for ; i < len(y); i++ {
		y[i] += a * x[i]
	}
}
