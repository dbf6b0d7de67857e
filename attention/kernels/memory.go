package kernels

// Sweep reads all of b and returns the sum of its little-endian 64-bit words;
// bytes behind the last whole 256 are not read. It is what the other kernels' speed is compared
// with: nothing reads memory faster.
func Sweep(b []byte) uint64 {
	b = b[:len(b)&^255]
	if len(b) == 0 {
		return 0
	}
	return sweep(b)
}

// Prefetch has the processor fetch b into its second-level cache while it does
// something else. Rows of Dots and Axpys are fetched ahead without it.
func Prefetch(b []byte) {
	if len(b) > 0 {
		prefetch(b)
	}
}

// WidenBF16 writes len(dst) bfloat16 of src, little-endian, to dst, bit for bit.
func WidenBF16(dst []float32, src []byte) {
	must(len(src)/2 >= len(dst), "src is too short")
	whole := len(dst) &^ 15
	if whole > 0 {
		widenBF16(dst[:whole], src)
	}
	plainWidenBF16(dst[whole:], src[2*whole:])
}
