package compress

import "kvtier/attention/kernels"

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

// ScoreLeaves is Score of some leaves, which are read in the order in which they lie: each plane has them one after the other, steps bytes apart. Scores
// of a leaf begin leafStride behind those of the one before; what lies ahead bytes behind each line is fetched, for later.
func (l *KeyLayout) ScoreLeaves(dst []float32, leafStride, stride int, q kernels.KeyQuery, planes [][]byte, steps []int, leaves, ahead int) {
	kernels.ScoreLeaves(dst, leafStride, stride, q, &l.lines, planes, steps, leaves, ahead)
}

// SumCodes adds to each row of out, at least [Known], the codes of a leaf's tokens, weighted by its row of
// w [rows][16], a row beginning every stride; kernels.AddBins makes sums of keys of them.
func (l *KeyLayout) SumCodes(out [][]float32, w []float32, stride int, planes [][]byte) {
	kernels.SumCodes(out, w, stride, &l.lines, planes)
}

// Fold prepares query rows q [rows][d], channels in stored order, for Score:
// the bins of keys with steps s are multiplied into them (kernels.Layout.Fold). dst has
// room for Known words and 2 numbers of scale a row.
func (l *KeyLayout) Fold(dst kernels.KeyQuery, q []float32, s KeySteps) {
	l.lines.Fold(dst, q, l.d, s.Lo, s.Step)
}

// FoldStored is Fold with steps as KeySteps.Parse reads them: the first KeyStepsBytes(Known) bytes of b. The error is ErrCorrupt, and then dst may
// hold anything.
func (l *KeyLayout) FoldStored(dst kernels.KeyQuery, q []float32, b []byte, exp int) error {
	return parseSteps(b, l.Known(), exp, func(unit float32) bool { return l.lines.FoldBins(dst, q, l.d, b, unit) })
}
