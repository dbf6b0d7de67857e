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

// Keys is a leaf's lines that are known. A code has 8 bits; those that no line
// holds are 0.
type Keys struct {
	// Lines of the first group, from the codes' top bits down, then those of the next one and so on.
	Lines []*[Line]byte
	// Levels is how many lines each group has, 1 to 4.
	Levels []uint8
}

func (k Keys) check() {
	sum := 0
	for _, l := range k.Levels {
		must(l >= 1 && l <= 4, "a group has no lines or too many")
		sum += int(l)
	}
	must(sum <= len(k.Lines), "lines are missing")
}

// KeyQuery is what query rows ask of codes, in integers: row r's score of a
// token is Scale[r] times the sum of words times codes, then plus Offset.
type KeyQuery struct {
	// Words is [groups][rows][16], not -32768; channel c is at Place(c).
	Words []int16
	// Scale is [rows][2]: scale and offset.
	Scale []float32
}

// Place returns where channel c of a group stands among its words: of each 4,
// the second and the third change places. It is its own inverse.
func Place(c int) int { return c&^3 | c&1<<1 | c>>1&1 }

// mostGroups bounds sums of products to 32 bits.
const mostGroups = 16

// ScoreKeys writes the scores of a leaf's 16 tokens to dst [rows][16].
func ScoreKeys(dst []float32, q KeyQuery, k Keys) {
	rows, groups := len(q.Scale)/2, len(k.Levels)
	must(groups <= mostGroups && len(q.Words) >= groups*rows*LineTokens, "the query is too short")
	must(len(dst) >= rows*LineTokens, "dst is too short")
	k.check()
	switch {
	case rows == 0:
	case groups == 0:
		for i := range dst[:rows*LineTokens] {
			dst[i] = q.Scale[i/LineTokens*2+1]
		}
	default:
		scoreKeys(dst, q, k, rows)
	}
}

// UnpackKeys writes what a leaf's lines say of its keys to dst [16][d], of each
// key the channels that Levels has. A code c of at most 4, 6 or 8 bits is read as the
// midpoint of the bin that they stand for, lo + (c + half a bin) step; of 2 bits, as .89 of
// the way from the range's centre, 128 steps above lo, to it. Products are rounded before they are added.
func UnpackKeys(dst []float32, d int, k Keys, lo, step []float32) {
	channels := len(k.Levels) * LineTokens
	must(channels <= d && len(lo) >= channels && len(step) >= channels, "more groups than channels")
	must(len(dst) >= (LineTokens-1)*d+channels, "dst is too short")
	k.check()
	if channels > 0 {
		unpackKeys(dst, d, k, lo, step)
	}
}
