package kernels

// Assembly checks nothing: what it may touch is checked here.

// must panics with what, unless ok.
func must(ok bool, what string) {
	if !ok {
		panic("kernels: " + what)
	}
}

// mustHold checks that a table of rows of n elements, every stride, fits into size elements.
func mustHold(size, rows, stride, n int, what string) {
	must(rows <= 1 || stride >= n && stride <= (size-n)/(rows-1), what)
	must(rows < 1 || size >= n, what)
}

// vectorDim says whether assembly handles rows of d elements.
func vectorDim(d int) bool { return d%16 == 0 }

// mustAdd checks that n rows of cols columns can be added to out by so many weights.
func mustAdd(out [][]float32, weights, stride, n, cols int) {
	mustHold(weights, len(out), stride, n, "w is too short")
	for _, row := range out {
		must(len(row) >= cols, "a row of out is too short")
	}
}
