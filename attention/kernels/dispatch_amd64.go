package kernels

import "golang.org/x/sys/cpu"

func supported(v Variant) bool {
	x := &cpu.X86
	switch v {
	case AVX512:
		return x.HasAVX512F && x.HasAVX512BW && x.HasAVX512DQ && x.HasAVX512VL && x.HasAVX512VNNI && supported(AVX2)
	case AVX2:
		return x.HasAVX2 && x.HasFMA
	case AMX:
		return x.HasAMXTile && x.HasAMXInt8 && supported(AVX512) && mayUseTiles()
	}
	return v == Go
}

// variant is the one in use for rows of d elements.
func variant(d int) Variant {
	if !vectorDim(d) {
		return Go
	}
	return vectors()
}

// vectors is the one in use where there are no tiles.
func vectors() Variant { return min(AVX512, Variant(active.Load())) }

func dots(dst []float32, stride int, q, k []float32, rows, n, d int) {
	switch variant(d) {
	case AVX512:
		dotsAVX512(&dst[0], stride, &q[0], rows, &k[0], n, d)
	case AVX2:
		dotsAVX2(&dst[0], stride, &q[0], rows, &k[0], n, d)
	default:
		plainDots(dst, stride, q, k, rows, n, d)
	}
}

func dotsBF16(dst []float32, stride int, q []float32, k []byte, rows, n, pitch, d int) {
	switch variant(d) {
	case AVX512:
		dotsBF16AVX512(&dst[0], stride, &q[0], rows, &k[0], n, d, pitch)
	case AVX2:
		dotsBF16AVX2(&dst[0], stride, &q[0], rows, &k[0], n, d, pitch)
	default:
		plainDotsBF16(dst, stride, q, k, rows, n, pitch, d)
	}
}

// axpysBF16 goes through all columns of 4 KiB of values before the next ones: of what each tile of columns leaves to the
// others the processor has fetched most, and it is still in the first-level cache.
func axpysBF16(out [][]float32, w []float32, stride int, v []byte, n, pitch, d int) {
	step := max(1, 4096/(2*d))
	for at := 0; at < n; at += step {
		n := min(step, n-at)
		switch variant(d) {
		case AVX512:
			axpysBF16AVX512(&out[0], &w[at], stride, len(out), &v[2*at*pitch], n, d, d, pitch)
		case AVX2:
			axpysBF16AVX2(&out[0], &w[at], stride, len(out), &v[2*at*pitch], n, d, d, pitch)
		default:
			plainAxpysBF16(out, w[at:], stride, v[2*at*pitch:], n, pitch, d)
		}
	}
}

func toWords(x *wordRows, q []float32, rows, d int) {
	switch variant(d) {
	case AVX512:
		toWordsAVX512(&x.words[0], &x.scale[0], &q[0], rows, d)
	case AVX2:
		toWordsAVX2(&x.words[0], &x.scale[0], &q[0], rows, d)
	default:
		plainToWords(x, q, rows, d)
	}
}

func dotsWords(dst []float32, stride int, x *wordRows, k []byte, rows, n, d int) {
	switch variant(d) {
	case AVX512:
		dotsWordsAVX512(&dst[0], stride, &x.words[0], &x.scale[0], rows, &k[0], n, d)
	case AVX2:
		dotsWordsAVX2(&dst[0], stride, &x.words[0], &x.scale[0], rows, &k[0], n, d)
	default:
		plainDotsWords(dst, stride, x, k, rows, n, d)
	}
}

func axpys(out [][]float32, w []float32, stride int, v []float32, n, d, cols int) {
	switch variant(d) {
	case AVX512:
		axpysAVX512(&out[0], &w[0], stride, len(out), &v[0], n, d, cols)
	case AVX2:
		axpysAVX2(&out[0], &w[0], stride, len(out), &v[0], n, d, cols)
	default:
		plainAxpys(out, w, stride, v, n, d, cols)
	}
}

func axpysInt8(out [][]float32, w []float32, stride int, v []byte, n, d int) {
	switch variant(d) {
	case AVX512:
		axpysInt8AVX512(&out[0], &w[0], stride, len(out), &v[0], n, d, d)
	case AVX2:
		axpysInt8AVX2(&out[0], &w[0], stride, len(out), &v[0], n, d, d)
	default:
		plainAxpysInt8(out, w, stride, v, n, d)
	}
}

// largest and weights take multiples of 16 scores.
func largest(x []float32, least float32) float32 {
	switch variant(len(x)) {
	case AVX512:
		return largestAVX512(&x[0], len(x), least)
	case AVX2:
		return largestAVX2(&x[0], len(x), least)
	}
	return plainLargest(x, least)
}

func weights(dst, x []float32, top float32) float32 {
	switch variant(len(x)) {
	case AVX512:
		return weightsAVX512(&dst[0], &x[0], len(x), top)
	case AVX2:
		return weightsAVX2(&dst[0], &x[0], len(x), top)
	}
	return plainWeights(dst, x, top)
}

func leafWeights(x, sums, offsets []float32, least float32) {
	switch vectors() {
	case AVX512:
		leafWeightsAVX512(&x[0], &sums[0], &offsets[0], len(x)/LineTokens, least)
	case AVX2:
		leafWeightsAVX2(&x[0], &sums[0], &offsets[0], len(x)/LineTokens, least)
	default:
		plainLeafWeights(x, sums, offsets, least)
	}
}

func sumRuns(dst []RunSum, x []float32) {
	switch vectors() {
	case AVX512:
		sumRunsAVX512(&dst[0].Mean, &x[0], len(dst))
	case AVX2:
		sumRunsAVX2(&dst[0].Mean, &x[0], len(dst))
	default:
		plainSumRuns(dst, x)
	}
}

func squaresInt8(dst []float32, c []byte, n, d int) {
	switch variant(d) {
	case AVX512:
		squaresInt8AVX512(&dst[0], &c[0], n, d)
	case AVX2:
		squaresInt8AVX2(&dst[0], &c[0], n, d)
	default:
		plainSquaresInt8(dst, c, n, d)
	}
}

func fold(dst KeyQuery, q []float32, rows, d int, lo, step []float32, l *Layout) {
	switch vectors() {
	case AVX512:
		foldAVX512(&dst.Words[0], &dst.Scale[0], &q[0], d, rows, &lo[0], &step[0], &l.levels[0], l.groups)
	case AVX2:
		foldAVX2(&dst.Words[0], &dst.Scale[0], &q[0], d, rows, &lo[0], &step[0], &l.levels[0], l.groups)
	default:
		plainFold(dst, q, rows, d, lo, step, l)
	}
}

func foldBins(dst KeyQuery, q []float32, rows, d int, src []byte, unit float32, l *Layout) bool {
	switch vectors() {
	case AVX512:
		return foldBinsAVX512(&dst.Words[0], &dst.Scale[0], &q[0], d, rows, &src[0], unit, &l.levels[0], l.groups) == 0
	case AVX2:
		return foldBinsAVX2(&dst.Words[0], &dst.Scale[0], &q[0], d, rows, &src[0], unit, &l.levels[0], l.groups) == 0
	}
	return plainFoldBins(dst, q, rows, d, src, unit, l)
}

func readBins(lo, step []float32, src []byte, unit float32) bool {
	switch vectors() {
	case AVX512:
		return readBinsAVX512(&lo[0], &step[0], &src[0], len(lo)/LineTokens, unit) == 0
	case AVX2:
		return readBinsAVX2(&lo[0], &step[0], &src[0], len(lo)/LineTokens, unit) == 0
	}
	return plainReadBins(lo, step, src, unit)
}

func binSquares(dst, q []float32, rows int, step []float32) {
	switch vectors() {
	case AVX512:
		binSquaresAVX512(&dst[0], &q[0], rows, &step[0], len(step))
	case AVX2:
		binSquaresAVX2(&dst[0], &q[0], rows, &step[0], len(step))
	default:
		plainBinSquares(dst, q, rows, step)
	}
}

func gains(gain, w []float32, rows []GainRow) {
	switch vectors() {
	case AVX512:
		gainsAVX512(&gain[0], &w[0], &rows[0].OfSquare, len(rows))
	case AVX2:
		gainsAVX2(&gain[0], &w[0], &rows[0].OfSquare, len(rows))
	default:
		plainGains(gain, w, rows)
	}
}

// weigh and addValues take padded batches.
func weigh(x *valueWeights, b *ValueBatch, rows int, w []float32, stride int) {
	words, place, step, offset, n := &x.words[0][0], &x.place[0].scale, &b.step[0], &b.offset[0], b.padded()
	switch vectors() {
	case AVX512:
		weighAVX512(words, place, &w[0], stride, rows, step, offset, n, b.unit())
	case AVX2:
		weighAVX2(words, place, &w[0], stride, rows, step, offset, n, b.unit())
	}
}

func addValues(out [][]float32, r *room, b *ValueBatch) {
	words, place, high, n, d := &r.weights.words[0][0], &r.weights.place[0].scale, &b.high[0], b.n, 2*b.row // four at a time
	var low *uintptr
	if b.all {
		low = &b.low[0]
	}
	switch {
	case Variant(active.Load()) == AMX && n*b.row >= tileBytes && len(out)*d >= tileProducts:
		for i := range out {
			clear(r.weights.words[i][b.padded() : (n+tileChannels-1)&^(tileChannels-1)])
		}
		addValueTilesAMX(&out[0], words, place, len(out), high, low, n, d, b.ahead, &r.tiles[0])
	case vectors() == AVX512:
		addValuesAVX512(&out[0], words, place, len(out), high, low, n, d, b.ahead)
	case vectors() == AVX2:
		addValuesAVX2(&out[0], words, place, len(out), high, low, n, d, b.ahead)
	}
}

// readValueScales: vectors take 4 tokens at a time.
func readValueScales(step, offset []float32, src []byte, all bool) {
	n := len(step) &^ 3
	if n > 0 {
		switch vectors() {
		case AVX512:
			readValueScalesAVX512(&step[0], &offset[0], &src[0], n, binMiddle(all))
		case AVX2:
			readValueScalesAVX2(&step[0], &offset[0], &src[0], n, binMiddle(all))
		default:
			n = 0
		}
	}
	plainReadValueScales(step[n:], offset[n:], src[n*ValueScale:], all)
}

// tileProducts is from how many products a token on, of all rows and channels, tiles may be faster than vectors at all.
const tileProducts = 512

// tileGroups is from how many groups of channels of how many leaves on tiles are faster than vectors.
const tileGroups = 64

// tileChannels is how many channels, or tokens, a row of a tile has.
const tileChannels = 64

// tileBytes is from how many bytes of values on tiles are faster than vectors.
const tileBytes = 8192

func scoreLeaves(dst []float32, leafStride, stride int, q KeyQuery, l *Layout, planes [][]byte, steps []int, leaves, rows, ahead int) {
	var none int // steps of one leaf
	by := &none
	if leaves > 1 {
		by = &steps[0]
	}
	switch v := vectors(); {
	case Variant(active.Load()) == AMX && l.groups*leaves >= tileGroups && rows*l.groups*LineTokens >= tileProducts:
		room := rooms.Get().(*room)
		defer rooms.Put(room)
		for r := 0; r < rows; r += tileRows {
			scoreLeafTilesAMX(&dst[r*stride], leafStride, stride, &q.Words[r*LineTokens], 2*rows*LineTokens, &q.Scale[2*r], min(tileRows, rows-r),
				&planes[0], by, l.planes, leaves, &l.lines[0].Plane, &l.levels[0], l.groups, ahead, &room.tiles[0])
		}
	case v == AVX512:
		scoreLeavesAVX512(&dst[0], leafStride, stride, &q.Words[0], &q.Scale[0], rows, &planes[0], by, l.planes, leaves, &l.lines[0].Plane, &l.levels[0], l.groups, ahead)
	case v == AVX2:
		scoreLeavesAVX2(&dst[0], leafStride, stride, &q.Words[0], &q.Scale[0], rows, &planes[0], by, l.planes, leaves, &l.lines[0].Plane, &l.levels[0], l.groups, ahead)
	default:
		plainScoreLeaves(dst, leafStride, stride, q, l, planes, steps, leaves, rows)
	}
}

func unpackKeys(dst []float32, d int, l *Layout, planes [][]byte, lo, step []float32) {
	switch vectors() {
	case AVX512:
		unpackKeysAVX512(&dst[0], d, &planes[0], &l.lines[0].Plane, &l.levels[0], l.groups, &lo[0], &step[0])
	case AVX2:
		unpackKeysAVX2(&dst[0], d, &planes[0], &l.lines[0].Plane, &l.levels[0], l.groups, &lo[0], &step[0])
	default:
		plainUnpackKeys(dst, d, l, planes, lo, step)
	}
}

func sumCodes(out [][]float32, w []float32, stride int, l *Layout, planes [][]byte) {
	switch vectors() {
	case AVX512:
		sumCodesAVX512(&out[0], &w[0], stride, len(out), &planes[0], &l.lines[0].Plane, &l.levels[0], l.groups)
	case AVX2:
		sumCodesAVX2(&out[0], &w[0], stride, len(out), &planes[0], &l.lines[0].Plane, &l.levels[0], l.groups)
	default:
		plainSumCodes(out, w, stride, l, planes)
	}
}

func addBins(out, spread, codes [][]float32, mass, lo, step []float32, levels []uint8, noise *[mostLevels + 1]float32) {
	switch vectors() {
	case AVX512:
		addBinsAVX512(&out[0], &spread[0], &codes[0], &mass[0], len(out), &lo[0], &step[0], &levels[0], len(levels), &noise[0])
	case AVX2:
		addBinsAVX2(&out[0], &spread[0], &codes[0], &mass[0], len(out), &lo[0], &step[0], &levels[0], len(levels), &noise[0])
	default:
		plainAddBins(out, spread, codes, mass, lo, step, levels, noise)
	}
}

func sweep(b []byte) uint64 {
	switch vectors() {
	case AVX512:
		return sweepAVX512(&b[0], len(b))
	case AVX2:
		return sweepAVX2(&b[0], len(b))
	}
	return plainSweep(b)
}

func prefetch(b []byte) {
	switch vectors() {
	case AVX512:
		prefetchAVX512(&b[0], len(b))
	case AVX2:
		prefetchAVX2(&b[0], len(b))
	}
}

// dot takes a multiple of 16 elements.
func dot(a, b []float32) float32 {
	switch vectors() {
	case AVX512:
		return dotAVX512(&a[0], &b[0], len(a))
	case AVX2:
		return dotAVX2(&a[0], &b[0], len(a))
	}
	return plainDot(a, b)
}

func matMul(dst, a []float32, aRow, aCol int, b []float32, m, k, n int) {
	switch variant(n) {
	case AVX512:
		matMulAVX512(&dst[0], &a[0], aRow, aCol, &b[0], m, k, n)
	case AVX2:
		matMulAVX2(&dst[0], &a[0], aRow, aCol, &b[0], m, k, n)
	default:
		plainMatMul(dst, a, aRow, aCol, b, m, k, n)
	}
}

func gatherDots(dst, x []float32, tokens []int, w []float32) {
	switch variant(len(w)) {
	case AVX512:
		gatherDotsAVX512(&dst[0], &x[0], &tokens[0], len(tokens), len(w), &w[0])
	case AVX2:
		gatherDotsAVX2(&dst[0], &x[0], &tokens[0], len(tokens), len(w), &w[0])
	default:
		plainGatherDots(dst, x, tokens, w)
	}
}

func gatherAxpy(out, w, x []float32, tokens []int) {
	switch variant(len(out)) {
	case AVX512:
		gatherAxpyAVX512(&out[0], &w[0], &x[0], &tokens[0], len(tokens), len(out))
	case AVX2:
		gatherAxpyAVX2(&out[0], &w[0], &x[0], &tokens[0], len(tokens), len(out))
	default:
		plainGatherAxpy(out, w, x, tokens)
	}
}

// widenBF16 takes a multiple of 16 numbers.
func widenBF16(dst []float32, src []byte) {
	switch variant(len(dst)) {
	case AVX512:
		widenBF16AVX512(&dst[0], &src[0], len(dst))
	case AVX2:
		widenBF16AVX2(&dst[0], &src[0], len(dst))
	default:
		plainWidenBF16(dst, src)
	}
}

func addRows(sum []float64, x []float32, n int) {
	d := len(sum)
	switch variant(d) {
	case AVX512:
		addRowsAVX512(&sum[0], &x[0], n, d)
	case AVX2:
		addRowsAVX2(&sum[0], &x[0], n, d)
	default:
		plainAddRows(sum, x, n)
	}
}

func deviations(dst, x, row []float32, n int) {
	d := len(row)
	switch variant(d) {
	case AVX512:
		deviationsAVX512(&dst[0], &x[0], &row[0], n, d)
	case AVX2:
		deviationsAVX2(&dst[0], &x[0], &row[0], n, d)
	default:
		plainDeviations(dst, x, row, n)
	}
}

func extremes(lo, hi, x []float32, n, d int) {
	switch variant(d) {
	case AVX512:
		extremesAVX512(&lo[0], &hi[0], &x[0], n, d)
	case AVX2:
		extremesAVX2(&lo[0], &hi[0], &x[0], n, d)
	default:
		plainExtremes(lo, hi, x, n, d)
	}
}

func quantise(dst []byte, x []float32, n int, lo, inverse []float32, zero float32) {
	switch variant(len(lo)) {
	case AVX512:
		quantiseAVX512(&dst[0], &x[0], n, len(lo), &lo[0], &inverse[0], zero)
	case AVX2:
		quantiseAVX2(&dst[0], &x[0], n, len(lo), &lo[0], &inverse[0], zero)
	default:
		plainQuantise(dst, x, n, lo, inverse, zero)
	}
}

func quantiseWithFeedback(dst []byte, x []float32, n int, lo, step, inverse, feedback []float32) {
	d := len(lo)
	switch vectors() {
	case AVX512:
		blockwise(dst, x, n, d, func(codes *byte, target, x *float32) {
			quantiseBlockAVX512(codes, target, x, d, &lo[0], &step[0], &inverse[0], &feedback[0])
		})
	case AVX2:
		blockwise(dst, x, n, d, func(codes *byte, target, x *float32) {
			quantiseBlockAVX2(codes, target, x, d, &lo[0], &step[0], &inverse[0], &feedback[0])
		})
	default:
		plainQuantiseWithFeedback(dst, x, n, lo, step, inverse, feedback)
	}
}

func hadamard(x []float32) {
	switch vectors() {
	case AVX512:
		hadamardAVX512(&x[0], len(x))
	case AVX2:
		hadamardAVX2(&x[0], len(x))
	default:
		plainHadamard(x)
	}
}

// masses, presences, depths, roots and multiply take multiples of 16.
func masses(dst, scores, logs, spreads []float32, half, most float32) {
	switch vectors() {
	case AVX512:
		massesAVX512(&dst[0], &scores[0], &logs[0], &spreads[0], len(dst), half, most)
	case AVX2:
		massesAVX2(&dst[0], &scores[0], &logs[0], &spreads[0], len(dst), half, most)
	default:
		plainMasses(dst, scores, logs, spreads, half, most)
	}
}

func presences(dst, x, surprise []float32, norm, least float32) float32 {
	switch vectors() {
	case AVX512:
		return presencesAVX512(&dst[0], &x[0], &surprise[0], len(dst), norm, least)
	case AVX2:
		return presencesAVX2(&dst[0], &x[0], &surprise[0], len(dst), norm, least)
	}
	return plainPresences(dst, x, surprise, norm, least)
}

func depths(dst []int32, x []float32, top, scale float32, last int32) {
	switch vectors() {
	case AVX512:
		depthsAVX512(&dst[0], &x[0], len(dst), top, scale, float32(last))
	case AVX2:
		depthsAVX2(&dst[0], &x[0], len(dst), top, scale, float32(last))
	default:
		plainDepths(dst, x, top, scale, last)
	}
}

func roots(dst, x, y []float32) {
	switch vectors() {
	case AVX512:
		rootsAVX512(&dst[0], &x[0], &y[0], len(dst))
	case AVX2:
		rootsAVX2(&dst[0], &x[0], &y[0], len(dst))
	default:
		plainRoots(dst, x, y)
	}
}

func multiply(x, y []float32) {
	switch vectors() {
	case AVX512:
		multiplyAVX512(&x[0], &y[0], len(x))
	case AVX2:
		multiplyAVX2(&x[0], &y[0], len(x))
	default:
		plainMultiply(x, y)
	}
}
