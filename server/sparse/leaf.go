package sparse

import (
	"math"
	"slices"

	"kvtier/attention"
	"kvtier/compress"
	"kvtier/kernels"
	"kvtier/tiers"
)

var inf = float32(math.Inf(1))

// codes is how the keys of a segment's head are coded, and what that means for a query.
type codes struct {
	order compress.KeyOrder
	q     []float32 // [rows][d], channels in stored order
	steps []compress.KeySteps
	// What is known of a leaf once so many planes - 1 are read.
	layouts [compress.NumKeyPlanes]compress.KeyLayout
	levels  [compress.NumKeyPlanes][]uint8   // [groups of channels], pairs of bits
	hidden  [compress.NumKeyPlanes][]float32 // [rows][d], the query, channels in their own order, in those that are not known; nil if there are none
	// folded is the query in the bins of a group of tokens: [groups of tokens][planes - 1], made when they are needed.
	folded [][compress.NumKeyPlanes]kernels.KeyQuery
	// leaning is the mass [rows] of unread tokens: [groups of tokens][planes - 1].
	leaning [][compress.NumKeyPlanes][]float32
	// coarse is the variance of what the unknown bits of known channels do to a
	// group's scores once so many planes are read, missing that of unknown
	// channels: [groups of tokens][planes - 1][rows].
	coarse, missing [][compress.NumKeyPlanes][]float32
}

func newCodes(order compress.KeyOrder, q []float32, groups int) *codes {
	c := &codes{order: order, q: make([]float32, len(q)), steps: make([]compress.KeySteps, groups),
		folded: make([][compress.NumKeyPlanes]kernels.KeyQuery, groups), leaning: make([][compress.NumKeyPlanes][]float32, groups),
		coarse: make([][compress.NumKeyPlanes][]float32, groups), missing: make([][compress.NumKeyPlanes][]float32, groups)}
	order.Permute(c.q, q)
	d := len(order.Channels)
	for p := range c.layouts {
		c.layouts[p] = compress.NewKeyLayout(d, order.Lines, p+1)
		c.levels[p] = make([]uint8, d/16)
		copy(c.levels[p], c.layouts[p].Levels())
		c.hidden[p] = c.hide(c.layouts[p].Known())
	}
	return c
}

// hide returns the query in all channels but the first in stored order; nil if there are no others.
func (c *codes) hide(known int) []float32 {
	d := len(c.order.Channels)
	if known == d {
		return nil
	}
	rest, out := slices.Clone(c.q), make([]float32, len(c.q))
	for at := 0; at < len(rest); at += d {
		clear(rest[at : at+known])
	}
	c.order.Restore(out, rest)
	return out
}

// query returns the query in the bins of a group of tokens of which so many planes are read.
func (c *codes) query(group, planes int) kernels.KeyQuery {
	q := &c.folded[group][planes-1]
	if q.Scale == nil {
		*q = c.layouts[planes-1].Fold(c.q, c.steps[group])
	}
	return *q
}

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
	x.planes = make([][]byte, 0, compress.NumKeyPlanes)
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
	c, planes := u.segs[x.seg].codes, len(x.planes)
	c.layouts[planes-1].Score(u.scores, c.query(x.group, planes), x.planes)
	rest := u.unknown(x)
	for r, log := range x.log {
		raise := attention.Mass(1, 0, u.noise(x, planes, r))
		for t, score := range u.scores[r*tiers.LeafTokens:][:len(log)] {
			log[t] = raise + attention.Softcap(rest[r]+score, u.q.Softcap)
		}
	}
}

// unknown returns what the page's mean key adds to scores [rows] in the channels of which nothing is known.
func (u *run) unknown(x *leaf) []float32 {
	s, planes := u.segs[x.seg], len(x.planes)
	if at := (restOf{x.page, planes}); u.restOf != at { // a page's leaves come together
		u.restOf = at
		if hidden := s.codes.hidden[planes-1]; hidden != nil {
			s.keys.Scores(u.rest, hidden, u.pages[x.page].i, 1)
		} else {
			clear(u.rest)
		}
	}
	return u.rest
}

// restOf says of which page, and of how many planes, run.rest is.
type restOf struct{ page, planes int }

// unpack reconstructs the keys of a leaf in u.keys, [16][d], channels in stored
// order; how many channels are known; and its page's mean key in that order.
func (u *run) unpack(x *leaf) (known int, mean []float32) {
	s, d := u.segs[x.seg], u.d
	layout := &s.codes.layouts[len(x.planes)-1]
	layout.Unpack(u.keys, s.codes.steps[x.group], x.planes)
	mean, row := u.row2[:d], u.row2[d:]
	s.keys.Row(row, u.pages[x.page].i)
	s.codes.order.Permute(mean, row)
	return layout.Known(), mean
}
