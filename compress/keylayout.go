package compress

import (
	"math"

	"kvtier/attention/kernels"
)

// KeyLayout is where the lines of a leaf's first planes lie, by group of
// channels. It is made once for a head's KeyOrder and a number of planes.
type KeyLayout struct {
	d     int
	lines kernels.Layout
}

// NewKeyLayout lays out the first planes. lines is KeyOrder.Lines, d the head dimension.
func NewKeyLayout(d int, lines []uint8, planes int) KeyLayout {
	const most = MaxHeadDim / groupDims
	var known [most]uint8
	groups := 0
	eachLine(d, lines, planes, func(_, _, group, _ int) {
		known[group]++
		groups = max(groups, group+1)
	})
	var next [most + 1]int // where the group's next line comes
	for g, n := range known {
		next[g+1] = next[g] + int(n)
	}
	var places [levels * most]kernels.LinePlace
	n := next[most]
	eachLine(d, lines, planes, func(p, at, group, _ int) {
		places[next[group]] = kernels.LinePlace{Plane: uint16(p), At: uint16(at)}
		next[group]++
	})
	return KeyLayout{d: d, lines: kernels.NewLayout(known[:groups], places[:n])}
}

// Known returns how many channels are known, the first in stored order: a multiple of 16.
func (l *KeyLayout) Known() int { return len(l.Levels()) * groupDims }

// Levels returns how many pairs of bits are known of each known group's channels.
func (l *KeyLayout) Levels() []uint8 { return l.lines.Levels() }

// Unpack reconstructs what the planes say of a leaf's keys: dst is [16][d],
// channels in stored order, of which the first Known are written. There are at least as
// many planes as the layout was made for, each of at least KeyPlaneBytes. A key is read as the midpoint of the bin that is known:
// lo + (c + 1/2) w; of a 2-bit bin, as Shrink2 of the way from the range's
// centre to it. The rows of padding tokens are the midpoints of code 0.
func (l *KeyLayout) Unpack(dst []float32, s KeySteps, planes [][]byte) {
	kernels.UnpackKeys(dst, l.d, &l.lines, planes, s.Lo, s.Step)
}

// Score writes the products of query rows and a leaf's keys, as far as these
// are known, to dst [rows][16], a row beginning every stride scores. q is what Fold made of the rows and the leaf's steps.
func (l *KeyLayout) Score(dst []float32, stride int, q kernels.KeyQuery, planes [][]byte) {
	kernels.ScoreKeys(dst, stride, q, &l.lines, planes)
}

// Fold prepares query rows q [rows][d], channels in stored order, for Score:
// the bins of keys with steps s are multiplied into them. The products of
// queries and steps are rounded to 16 bits, which the offset makes up for where
// codes are in the middle of their range: a score then errs by about .00002 of
// what the channel that matters most can change it by.
func (l *KeyLayout) Fold(q []float32, s KeySteps) kernels.KeyQuery {
	rows, known := len(q)/l.d, l.Known()
	out := kernels.KeyQuery{Words: make([]int16, rows*known), Scale: make([]float32, 2*rows)}
	var products [MaxHeadDim]float64
	for r := range rows {
		var offset, most float64
		for g, level := range l.Levels() {
			at := g * groupDims
			o, m := foldGroup((*[groupDims]float64)(products[at:]), q[r*l.d+at:], s.Lo[at:], s.Step[at:], &binPlaces[level])
			offset += o
			most = max(most, m)
		}
		unit := float32(most / math.MaxInt16)
		if unit > leastUnit && finite(unit) { // else there is nothing to tell keys apart by, or no number
			for g, level := range l.Levels() {
				words := (*[groupDims]int16)(out.Words[(g*rows+r)*groupDims:])
				offset += roundWords(words, (*[groupDims]float64)(products[g*groupDims:]), float64(unit)) * binPlaces[level].middle
			}
		}
		out.Scale[2*r], out.Scale[2*r+1] = unit, float32(offset)
	}
	return out
}

// leastUnit bounds units where float32 is precise.
const leastUnit = 0x1p-100

// foldGroup writes the products of a query and the bins of a group of channels,
// and returns what the query makes of the bins' places and the largest product.
func foldGroup(products *[groupDims]float64, q, lo, step []float32, bins *binPlace) (offset, most float64) {
	q, lo, step = q[:groupDims], lo[:groupDims], step[:groupDims]
	for j := range products {
		x, w := float64(q[j]), float64(step[j])
		p := x * w * bins.scale
		products[j] = p
		offset += x * (float64(lo[j]) + w*bins.offset)
		if p = math.Abs(p); p > most { // what is no number shows in the offset
			most = p
		}
	}
	return offset, most
}

// roundWords writes a group's words, x in units, and returns the sum of what rounding took.
func roundWords(words *[groupDims]int16, x *[groupDims]float64, unit float64) (rest float64) {
	inverse := 1 / unit
	for c, x := range x {
		word := math.RoundToEven(x * inverse)
		words[kernels.Place(c)&(groupDims-1)] = int16(word)
		rest += x - unit*word
	}
	return rest
}

// binPlace is an entry of binPlaces.
type binPlace struct{ offset, scale, middle float64 }

// binPlaces says what codes mean of which so many levels are known: code c is
// at c times scale plus offset, in units of 8-bit bins; middle is the middle of all codes.
var binPlaces = func() (p [levels + 1]binPlace) {
	for level := 1; level <= levels; level++ {
		half := float64(uint(256)>>(2*level)) / 2
		p[level].offset, p[level].scale, p[level].middle = half, 1, 128-half
	}
	p[1].offset, p[1].scale = 128+(p[1].offset-128)*Shrink2, Shrink2
	return p
}()
