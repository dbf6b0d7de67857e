package kernels

const (
	// Line is the size of a line of keys: 2 bits of 16 channels, a group, of 16
	// tokens, a leaf. A little-endian 32-bit word for each token has channel
	// 4r + b of the group in bits 2r and 2r+1 of byte b.
	Line = 64
	// LineTokens is how many tokens and how many channels a line holds.
	LineTokens = 16
	// Shrink2 draws 2-bit midpoints towards the centre of the range: the centroid of
	// a bell's quarter lies nearer the centre than its midpoint (measured on real keys).
	Shrink2 = .89
)

const (
	// mostGroups bounds sums of products to 32 bits.
	mostGroups = 16
	mostLevels = 4
	mostLines  = mostLevels * mostGroups
	mostPlanes = 8
)

// LinePlace is where a line lies in a leaf: offset At of plane Plane.
type LinePlace struct{ Plane, At uint16 }

// Layout says where a leaf's lines lie that are known. A code has 8 bits; those
// that no line holds are 0.
type Layout struct {
	groups int
	levels [mostGroups]uint8
	lines  [mostLines]LinePlace
	planes int
	need   [mostPlanes]int // the least size of each plane
}

// NewLayout lays out groups of channels, at most 16, of which levels says how many lines each has, 1 to 4.
// lines are those of the first group, from the codes' top bits down, then those of the next one and so on.
func NewLayout(levels []uint8, lines []LinePlace) (l Layout) {
	must(len(levels) <= mostGroups, "more than 16 groups")
	sum := 0
	for _, n := range levels {
		must(n >= 1 && n <= mostLevels, "a group has no lines or too many")
		sum += int(n)
	}
	must(sum == len(lines), "lines and levels differ")
	l.groups = copy(l.levels[:], levels)
	copy(l.lines[:], lines)
	for _, x := range lines {
		must(x.Plane < mostPlanes, "more than 8 planes")
		l.planes = max(l.planes, int(x.Plane)+1)
		l.need[x.Plane] = max(l.need[x.Plane], int(x.At)+Line)
	}
	return l
}

// Levels returns how many lines each group has.
func (l *Layout) Levels() []uint8 { return l.levels[:l.groups] }

// mustFit checks that the planes hold all lines.
func (l *Layout) mustFit(planes [][]byte) {
	must(len(planes) >= l.planes, "planes are missing")
	for p, n := range l.need[:l.planes] {
		must(len(planes[p]) >= n, "a plane is too short")
	}
}

// mustFitAll checks that the planes hold all lines of some leaves, from leaf to leaf steps bytes apart.
func (l *Layout) mustFitAll(planes [][]byte, steps []int, leaves int) {
	l.mustFit(planes)
	if leaves == 1 {
		return
	}
	must(len(steps) >= l.planes, "steps are missing")
	for p, n := range l.need[:l.planes] {
		must(steps[p] >= 0 && steps[p] <= (len(planes[p])-n)/(leaves-1), "a plane is too short")
	}
}

// line returns the i-th line.
func (l *Layout) line(planes [][]byte, i int) *[Line]byte {
	return (*[Line]byte)(planes[l.lines[i].Plane][l.lines[i].At:])
}

// KeyQuery is what query rows ask of codes, in integers: row r's score of a
// token is Scale[r] times the sum of words times codes, then plus Offset.
type KeyQuery struct {
	// Words is [groups][rows][16], of magnitudes up to mostWord; channel c is at Place(c).
	Words []int16
	// Scale is [rows][2]: scale and offset.
	Scale []float32
}

// Place returns where channel c of a group stands among its words: of each 4,
// the second and the third change places. It is its own inverse.
func Place(c int) int { return c&^3 | c&1<<1 | c>>1&1 }

// tileRows is how many rows tiles take at a time.
const tileRows = 8

// Ahead is how many bytes before their use codes are fetched that lie one after the other: far enough for memory to
// answer, near enough for the first-level cache.
const Ahead = 2048

// ScoreKeys writes the scores of a leaf's 16 tokens, of which planes holds the lines, to
// dst [rows][16], a row beginning every stride scores.
func ScoreKeys(dst []float32, stride int, q KeyQuery, l *Layout, planes [][]byte) {
	ScoreLeaves(dst, 0, stride, q, l, planes, nil, 1, 0)
}

// ScoreLeaves is ScoreKeys of some leaves: each plane has the lines of a leaf steps bytes behind those of the one before, and scores of
// a leaf begin leafStride behind those of the one before. What lies ahead bytes behind each line is fetched, for later.
func ScoreLeaves(dst []float32, leafStride, stride int, q KeyQuery, l *Layout, planes [][]byte, steps []int, leaves, ahead int) {
	rows := len(q.Scale) / 2
	must(len(q.Words) >= l.groups*rows*LineTokens, "the query is too short")
	if leaves == 0 || rows == 0 {
		return
	}
	must(leaves > 0 && (leaves == 1 || leafStride >= 0 && leafStride <= len(dst)/(leaves-1)), "dst is too short")
	mustHold(len(dst)-(leaves-1)*leafStride, rows, stride, LineTokens, "dst is too short")
	l.mustFitAll(planes, steps, leaves)
	if l.groups > 0 {
		scoreLeaves(dst, leafStride, stride, q, l, planes, steps, leaves, rows, ahead)
		return
	}
	for i := range leaves {
		for r := range rows {
			for t := range LineTokens {
				dst[i*leafStride+r*stride+t] = q.Scale[2*r+1]
			}
		}
	}
}

// UnpackKeys writes what a leaf's lines say of its keys to dst [16][d], of each
// key the channels of the layout's groups. A code c of at most 4, 6 or 8 bits is read as the
// midpoint of the bin that they stand for, lo + (c + half a bin) step; of 2 bits, as .89 of
// the way from the range's centre, 128 steps above lo, to it. Products are rounded before they are added.
func UnpackKeys(dst []float32, d int, l *Layout, planes [][]byte, lo, step []float32) {
	channels := l.groups * LineTokens
	must(channels <= d && len(lo) >= channels && len(step) >= channels, "more groups than channels")
	must(len(dst) >= (LineTokens-1)*d+channels, "dst is too short")
	l.mustFit(planes)
	if channels > 0 {
		unpackKeys(dst, d, l, planes, lo, step)
	}
}

// SumCodes adds to each row of out, of each channel of the layout's groups, the codes of a leaf's 16 tokens,
// weighted by its row of w [rows][16], a row beginning every stride. Bits of codes that no line holds are 0.
func SumCodes(out [][]float32, w []float32, stride int, l *Layout, planes [][]byte) {
	mustAdd(out, len(w), stride, LineTokens, l.groups*LineTokens)
	l.mustFit(planes)
	if len(out) > 0 && l.groups > 0 {
		sumCodes(out, w, stride, l, planes)
	}
}
