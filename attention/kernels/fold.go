package kernels

import "math"

// How codes of keys are brought into a query: bins are multiplied into it, a
// group of tokens at a time (compress.KeySteps).

// place says what codes of so many lines mean: code c is at c times scale plus
// offset, in units of 8-bit bins; middle is the middle of all codes.
type place struct{ offset, scale, middle float32 }

var places = func() (p [mostLevels + 1]place) {
	for level := 1; level <= mostLevels; level++ {
		half := float32(uint(256)>>(2*level)) / 2
		p[level] = place{half, 1, 128 - half}
	}
	p[1].offset, p[1].scale = 128+(p[1].offset-128)*Shrink2, Shrink2
	return p
}()

// mostWord is the largest word of a folded query: 127 times 256 and a signed byte more, so that
// units that multiply signed bytes take it in two.
const mostWord = 127<<8 | 127

// leastUnit bounds units where float32 is precise.
const leastUnit = 0x1p-100

// Fold prepares query rows q [rows][d] for ScoreKeys: the bins of keys, of lower ends lo [d] and size step [d], in those
// channels of which the layout's groups have lines, are multiplied into them. The products of
// queries and steps are rounded to words of 16 bits, which the offset makes up for where
// codes are in the middle of their range: a score then errs by about .00002 of
// what the channel that matters most can change it by. dst.Words is [groups][rows][16], dst.Scale [rows][2].
func (l *Layout) Fold(dst KeyQuery, q []float32, d int, lo, step []float32) {
	channels := l.groups * LineTokens
	must(len(lo) >= channels && len(step) >= channels, "lo or step is too short")
	if rows := l.mayFold(dst, q, d); rows > 0 {
		fold(dst, q, rows, d, lo, step, l)
	}
}

// FoldBins is Fold with bins as Bins reads them, of the channels of the layout's groups. Then ok says what that of Bins does; if it is
// false, dst may hold anything.
func (l *Layout) FoldBins(dst KeyQuery, q []float32, d int, src []byte, unit float32) (ok bool) {
	must(len(src)/binLine >= l.groups, "src is too short")
	rows := l.mayFold(dst, q, d)
	if rows == 0 {
		var lo, step [mostGroups * LineTokens]float32
		return Bins(lo[:l.groups*LineTokens], step[:], src, unit)
	}
	return foldBins(dst, q, rows, d, src, unit, l)
}

// mayFold checks what Fold may touch, and returns how many rows there are to fold.
func (l *Layout) mayFold(dst KeyQuery, q []float32, d int) (rows int) {
	must(d > 0, "d is not positive")
	rows, channels := len(q)/d, l.groups*LineTokens
	must(channels <= d, "more groups than channels")
	must(len(dst.Words) >= rows*channels && len(dst.Scale) >= 2*rows, "dst is too short")
	if l.groups == 0 {
		clear(dst.Scale[:2*rows])
		return 0
	}
	return rows
}

// binLine is the size of the bins of 16 channels.
const binLine = 4 * LineTokens

// Bins reads lower ends and sizes of bins, binary16 in units, of len(lo) channels, a multiple of 16: of each 16, first their lower ends, then their
// sizes. ok is false if one is not finite, a size less than 2^-126, or the upper end of the last of 256 bins not finite.
func Bins(lo, step []float32, src []byte, unit float32) (ok bool) {
	d := len(lo)
	must(vectorDim(d), "channels are no multiple of 16")
	must(len(step) >= d && len(src)/4 >= d, "step or src is too short")
	return d == 0 || readBins(lo, step, src, unit)
}

// BinSquares writes to dst [rows][d/16], by group of 16 channels, the squares of what
// products of q [rows][d] and keys change by if the keys move by 256 bins of size step [d]. d is a multiple of 16.
func BinSquares(dst, q, step []float32) {
	d := len(step)
	must(d > 0 && vectorDim(d), "d is no multiple of 16")
	rows := len(q) / d
	must(len(dst) >= rows*d/LineTokens, "dst is too short")
	if rows > 0 {
		binSquares(dst, q, rows, step)
	}
}

// AddBins adds to each row of out, at least [d], what sums of weighted codes, codes [rows][d], mean as sums of
// keys, mass [rows] being the sums of weights: in those channels of which levels [d/16] says that lines are known; and to each row
// of spread the mass times the square of the bins' size step [d] times noise, by the number of lines known. lo [d] are bins' lower ends.
func AddBins(out, spread, codes [][]float32, mass, lo, step []float32, levels []uint8, noise *[mostLevels + 1]float32) {
	d := len(levels) * LineTokens
	rows := len(out)
	must(len(spread) >= rows && len(mass) >= rows && len(codes) >= rows, "rows are missing")
	must(len(lo) >= d && len(step) >= d, "lo or step is too short")
	for r := range out {
		must(len(out[r]) >= d && len(spread[r]) >= d && len(codes[r]) >= d, "a row is too short")
	}
	for _, l := range levels {
		must(l <= mostLevels, "too many lines")
	}
	if rows > 0 && d > 0 {
		addBins(out, spread, codes, mass, lo, step, levels, noise)
	}
}

func plainAddBins(out, spread, codes [][]float32, mass, lo, step []float32, levels []uint8, noise *[mostLevels + 1]float32) {
	d := len(levels) * LineTokens
	for r, m := range mass[:len(out)] {
		for j := range d {
			l := levels[j/LineTokens]
			spread[r][j] += m * min(step[j]*step[j]*noise[l], math.MaxFloat32)
			if p := places[l]; l > 0 {
				out[r][j] += m*lo[j] + step[j]*(p.scale*codes[r][j]+p.offset*m)
			}
		}
	}
}

func plainFold(dst KeyQuery, q []float32, rows, d int, lo, step []float32, l *Layout) {
	for r := range rows {
		x := q[r*d:][:l.groups*LineTokens]
		var offset, most float32
		for c, x := range x {
			p := places[l.levels[c/LineTokens]]
			offset += x * (lo[c] + step[c]*p.offset)
			if product := float32(math.Abs(float64(x * step[c] * p.scale))); product > most {
				most = product // what is no number shows in the offset
			}
		}
		unit := most / mostWord
		tells := unit > leastUnit && unit <= math.MaxFloat32 // else there is nothing to tell keys apart by, or no number
		inverse := 1 / unit
		for c, x := range x {
			word := &dst.Words[(c/LineTokens*rows+r)*LineTokens+Place(c%LineTokens)]
			if *word = 0; tells {
				p := places[l.levels[c/LineTokens]]
				product := x * step[c] * p.scale
				*word = int16(math.RoundToEven(float64(product * inverse)))
				offset += (product - float32(float32(*word)*unit)) * p.middle
			}
		}
		dst.Scale[2*r], dst.Scale[2*r+1] = unit, offset
	}
}

func plainFoldBins(dst KeyQuery, q []float32, rows, d int, src []byte, unit float32, l *Layout) bool {
	var lo, step [mostGroups * LineTokens]float32
	n := l.groups * LineTokens
	ok := plainReadBins(lo[:n], step[:n], src, unit)
	plainFold(dst, q, rows, d, lo[:n], step[:n], l)
	return ok
}

func plainReadBins(lo, step []float32, src []byte, unit float32) bool {
	ok := true
	for j := range lo {
		at := j/LineTokens*binLine + j%LineTokens*2
		a, w := widenF16(src[at:])*unit, widenF16(src[at+binLine/2:])*unit
		lo[j], step[j] = a, w
		top := 255.5 * w
		ok = ok && w >= 0x1p-126 && finite(top) && finite(a+top) && finite(a)
	}
	return ok
}

func finite(x float32) bool { return x-x == 0 }

// widenF16 reads a binary16. Its bits, moved to where a float32 has them, are the
// number at 2^-112 of its size; the largest exponent is kept for what is no finite number.
func widenF16(b []byte) float32 {
	h := uint32(b[0]) | uint32(b[1])<<8
	sign, rest := h&0x8000<<16, h&0x7fff<<13
	if rest >= 0x7c00<<13 {
		return math.Float32frombits(sign | rest | 0x7f800000)
	}
	return math.Float32frombits(sign|rest) * 0x1p112
}

func plainBinSquares(dst, q []float32, rows int, step []float32) {
	d := len(step)
	for r := range rows {
		for g := range d / LineTokens {
			var even, odd float32
			for c := g * LineTokens; c < (g+1)*LineTokens; c += 2 {
				x, y := q[r*d+c]*(step[c]*256), q[r*d+c+1]*(step[c+1]*256)
				even += x * x
				odd += y * y
			}
			dst[r*d/LineTokens+g] = even + odd
		}
	}
}
