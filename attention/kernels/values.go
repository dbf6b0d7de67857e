package kernels

// AddValues adds to each row of out, at least [d], the values of n tokens,
// weighted by its row of w [rows][n]. A value has codes x of 8 bits, of which the
// high 4 lie in high, [n] rows of d/2 bytes: byte j holds channel j in its low and channel
// j + d/2 in its high nibble; the low 4 lie in low in the same way, or are 0 if
// low is nil. The value is (x + offset) step: scale is [n][2], step and offset.
func AddValues(out [][]float32, w []float32, stride int, scale []float32, high, low [][]byte, d int) {
	must(d > 0 && d%2 == 0, "d is odd")
	n := len(high)
	mustAdd(out, len(w), stride, n, d)
	must(len(scale) >= 2*n && (low == nil || len(low) >= n), "scales or codes are missing")
	for t, b := range high {
		must(len(b) >= d/2 && (low == nil || len(low[t]) >= d/2), "a row of codes is too short")
	}
	if len(out) > 0 && n > 0 {
		addValues(out, w, stride, scale, high, low, d)
	}
}
