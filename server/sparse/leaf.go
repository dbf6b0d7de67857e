package sparse

import (
	"math"
	"slices"

	"kvtier/attention"
	"kvtier/compress"
	"kvtier/tiers"
)

var inf = float32(math.Inf(1))

// codes is how the keys of a segment's head are coded, and what that means for a query.
type codes struct {
	order  compress.KeyOrder
	q      []float32 // [rows][d], channels in stored order
	steps  []compress.KeySteps
	levels [compress.NumKeyPlanes][]uint8 // [groups of channels], pairs of bits known once a plane is read
	// coarse is the variance of what the unknown bits of known channels do to a
	// group's scores once so many planes are read, missing that of unknown
	// channels: [groups of tokens][planes - 1][rows].
	coarse, missing [][compress.NumKeyPlanes][]float32
}

func newCodes(order compress.KeyOrder, q []float32, groups int) *codes {
	c := &codes{order: order, q: make([]float32, len(q)), steps: make([]compress.KeySteps, groups),
		coarse: make([][compress.NumKeyPlanes][]float32, groups), missing: make([][compress.NumKeyPlanes][]float32, groups)}
	order.Permute(c.q, q)
	level, at := make([]uint8, 4*len(order.Lines)/16), 0
	for p, n := range compress.KeyPlaneLines(len(order.Channels)) {
		for range n {
			level[order.Lines[at]]++
			at++
		}
		c.levels[p] = slices.Clone(level)
	}
	return c
}

// knows says whether a group of tokens was added.
func (c *codes) knows(g int) bool { return len(c.steps[g].Step) > 0 }

func (c *codes) addGroup(g int, b []byte, exp int) (err error) {
	d := len(c.order.Channels)
	if c.steps[g], err = compress.ParseKeySteps(b, d, exp); err != nil {
		return err
	}
	for p, levels := range c.levels {
		for at := 0; at < len(c.q); at += d {
			coarse, missing := noise(c.q[at:at+d], c.steps[g].Step, levels)
			c.coarse[g][p], c.missing[g][p] = append(c.coarse[g][p], coarse), append(c.missing[g][p], missing)
		}
	}
	return nil
}

// noise is the variance of what a score of q lacks by the bits that are not
// known, channels erring independently.
func noise(q, step []float32, levels []uint8) (coarse, missing float32) {
	for g, l := range levels {
		var part float32
		for j := 16 * g; j < 16*g+16; j++ {
			x := q[j] * step[j] * 256
			part += x * x
		}
		if l == 0 {
			missing += part * compress.KeyNoise[l]
		} else {
			coarse += part * compress.KeyNoise[l]
		}
	}
	return min(coarse, mostNoise), min(missing, mostNoise)
}

// noise is the variance of what a leaf's scores for row r lack once so many planes are read.
func (u *run) noise(x *leaf, planes, r int) float32 {
	c := u.segs[x.seg].codes
	return c.coarse[x.group][planes-1][r] + c.missing[x.group][planes-1][r]
}

// mostNoise keeps what is computed from noise finite, whatever bins were stored.
const mostNoise = 1e4

// leaf is 16 tokens whose keys are read in part.
type leaf struct {
	page     int // index in run.pages
	seg, i   int
	place, n int // first token, number of tokens
	group    int // of steps
	planes   [][]byte
	most     int         // planes of keys that can be read: the last one of drains only
	log      [][]float32 // [rows][n], log weights of its tokens
	share    [][]float32 // [rows][n], the same as shares of the softmax
	// What reading more takes away of the error, as far as is known: by the number
	// of planes that are read then, and by token.
	keyGain   [compress.NumKeyPlanes]float32
	valueGain [tiers.LeafTokens]float32
	read      [tiers.LeafTokens]bool // tokens whose values were read
}

func (u *run) newLeaf(at, l int) leaf {
	p := &u.pages[at]
	v := u.segs[p.seg].view
	x := leaf{page: at, seg: p.seg, i: l, place: l * tiers.LeafTokens, n: v.LeafTokens(l), group: v.StepGroup(l), most: compress.NumKeyPlanes - 1}
	if v.IsDrain(l) && v.DrainKeys().Len > 0 {
		x.most++
	}
	all, rows := make([]float32, 2*u.rows*x.n), make([][]float32, 2*u.rows)
	for i := range rows {
		rows[i] = all[i*x.n : (i+1)*x.n]
	}
	x.log, x.share = rows[:u.rows], rows[u.rows:]
	return x
}

// scoreLeaf scores the leaf's tokens from the planes that were read. Channels of
// which nothing is known yet stand at the page's mean. What the unknown bits
// scatter raises a weight on average, as it does a mass (attention.Mass).
func (u *run) scoreLeaf(x *leaf) {
	s, d := u.segs[x.seg], u.d
	known, mean := u.unpack(x)
	for r, log := range x.log {
		q := s.codes.q[r*d : (r+1)*d]
		rest := attention.Dot(q[known:], mean[known:])
		raise := attention.Mass(1, 0, u.noise(x, len(x.planes), r))
		for t := range log {
			log[t] = raise + attention.Softcap(rest+attention.Dot(q[:known], u.keys[t*d:t*d+known]), u.q.Softcap)
		}
	}
}

// unpack reconstructs the keys of a leaf in u.keys, [16][d], channels in stored
// order; how many channels are known; and its page's mean key in that order.
func (u *run) unpack(x *leaf) (known int, mean []float32) {
	s, d := u.segs[x.seg], u.d
	known = compress.UnpackKeys(u.keys, d, s.codes.order.Lines, s.codes.steps[x.group], x.planes...)
	mean, row := u.row2[:d], u.row2[d:]
	s.keys.Row(row, u.pages[x.page].i)
	s.codes.order.Permute(mean, row)
	return known, mean
}
