//go:build !amd64

package kernels

func supported(Variant) bool { return false }

func variant(int) Variant { return Go }

func dots(dst []float32, stride int, q, k []float32, rows, n, d int) {
	plainDots(dst, stride, q, k, rows, n, d)
}

func dotsBF16(dst []float32, stride int, q []float32, k []byte, rows, n, pitch, d int) {
	plainDotsBF16(dst, stride, q, k, rows, n, pitch, d)
}

func axpysBF16(out [][]float32, w []float32, stride int, v []byte, n, pitch, d int) {
	plainAxpysBF16(out, w, stride, v, n, pitch, d)
}

func toWords(x *wordRows, q []float32, rows, d int) { plainToWords(x, q, rows, d) }

func dotsWords(dst []float32, stride int, x *wordRows, k []byte, rows, n, d int) {
	plainDotsWords(dst, stride, x, k, rows, n, d)
}

func axpys(out [][]float32, w []float32, stride int, v []float32, n, d, cols int) {
	plainAxpys(out, w, stride, v, n, d, cols)
}

func axpysInt8(out [][]float32, w []float32, stride int, v []byte, n, d int) {
	plainAxpysInt8(out, w, stride, v, n, d)
}

func largest(x []float32, least float32) float32 { return plainLargest(x, least) }

func weights(dst, x []float32, top float32) float32 { return plainWeights(dst, x, top) }

func leafWeights(x, sums, offsets []float32, least float32) {
	plainLeafWeights(x, sums, offsets, least)
}

func sumRuns(dst []RunSum, x []float32) { plainSumRuns(dst, x) }

func squaresInt8(dst []float32, c []byte, n, d int) { plainSquaresInt8(dst, c, n, d) }

func fold(dst KeyQuery, q []float32, rows, d int, lo, step []float32, l *Layout) {
	plainFold(dst, q, rows, d, lo, step, l)
}

func foldBins(dst KeyQuery, q []float32, rows, d int, src []byte, unit float32, l *Layout) bool {
	return plainFoldBins(dst, q, rows, d, src, unit, l)
}

func readBins(lo, step []float32, src []byte, unit float32) bool {
	return plainReadBins(lo, step, src, unit)
}

func binSquares(dst, q []float32, rows int, step []float32) { plainBinSquares(dst, q, rows, step) }

func gains(gain, w []float32, rows []GainRow) { plainGains(gain, w, rows) }

// Of values, only batches that vectors take come here.
func weigh(*valueWeights, *ValueBatch, int, []float32, int) {}

func addValues([][]float32, *room, *ValueBatch) {}

func readValueScales(step, offset []float32, src []byte, all bool) {
	plainReadValueScales(step, offset, src, all)
}

func scoreLeaves(dst []float32, leafStride, stride int, q KeyQuery, l *Layout, planes [][]byte, steps []int, leaves, rows, _ int) {
	plainScoreLeaves(dst, leafStride, stride, q, l, planes, steps, leaves, rows)
}

func unpackKeys(dst []float32, d int, l *Layout, planes [][]byte, lo, step []float32) {
	plainUnpackKeys(dst, d, l, planes, lo, step)
}

func sumCodes(out [][]float32, w []float32, stride int, l *Layout, planes [][]byte) {
	plainSumCodes(out, w, stride, l, planes)
}

func addBins(out, spread, codes [][]float32, mass, lo, step []float32, levels []uint8, noise *[mostLevels + 1]float32) {
	plainAddBins(out, spread, codes, mass, lo, step, levels, noise)
}

func sweep(b []byte) uint64 { return plainSweep(b) }

func prefetch([]byte) {}

func dot(a, b []float32) float32 { return plainDot(a, b) }

func matMul(dst, a []float32, aRow, aCol int, b []float32, m, k, n int) {
	plainMatMul(dst, a, aRow, aCol, b, m, k, n)
}

func gatherDots(dst, x []float32, tokens []int, w []float32) { plainGatherDots(dst, x, tokens, w) }

func gatherAxpy(out, w, x []float32, tokens []int) { plainGatherAxpy(out, w, x, tokens) }

func widenBF16(dst []float32, src []byte) { plainWidenBF16(dst, src) }

func extremes(lo, hi, x []float32, n, d int) { plainExtremes(lo, hi, x, n, d) }

func quantise(dst []byte, x []float32, n int, lo, inverse []float32, zero float32) {
	plainQuantise(dst, x, n, lo, inverse, zero)
}

func quantiseWithFeedback(dst []byte, x []float32, n int, lo, step, inverse, feedback []float32) {
	plainQuantiseWithFeedback(dst, x, n, lo, step, inverse, feedback)
}

func addRows(sum []float64, x []float32, n int) { plainAddRows(sum, x, n) }
func deviations(dst, x, row []float32, n int)   { plainDeviations(dst, x, row, n) }
func hadamard(x []float32)                      { plainHadamard(x) }

func masses(dst, scores, logs, spreads []float32, half, most float32) {
	plainMasses(dst, scores, logs, spreads, half, most)
}

func presences(dst, x, surprise []float32, norm, least float32) float32 {
	return plainPresences(dst, x, surprise, norm, least)
}

func depths(dst []int32, x []float32, top, scale float32, last int32) {
	plainDepths(dst, x, top, scale, last)
}

func roots(dst, x, y []float32) { plainRoots(dst, x, y) }

func multiply(x, y []float32) { plainMultiply(x, y) }
