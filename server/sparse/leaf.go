package sparse

import (
	"math"
	"slices"

	"kvtier/attention"
	"kvtier/attention/kernels"
	"kvtier/compress"
	"kvtier/tiers"
)

var inf = float32(math.Inf(1))

// codes is how the keys of a segment's head are coded, and what that means for a query.
type codes struct {
	order compress.KeyOrder
	q     []float32 // [rows][d], channels in stored order
	steps []compress.KeySteps
	// What is known of a leaf's keys: [planes that are read - 1].
	layouts [compress.NumKeyPlanes]compress.KeyLayout
	levels  [compress.NumKeyPlanes][]uint8 // [groups of channels], pairs of bits
	// hidden is the query [rows][d], channels in their own order, in those of which nothing is known; nil if there are none.
	hidden [compress.NumKeyPlanes][]float32
	// By group of tokens, and by planes that are read - 1: what the missing bits mean, by row; the
	// query in the bins of keys, made when it is needed; the mass of unread tokens, by row.
	grades  [][compress.NumKeyPlanes][]grade
	folded  [][compress.NumKeyPlanes]kernels.KeyQuery
	leaning [][compress.NumKeyPlanes][]float32
}

func newCodes(order compress.KeyOrder, q []float32, groups int) *codes {
	c := &codes{order: order, q: make([]float32, len(q)), steps: make([]compress.KeySteps, groups),
		folded: make([][compress.NumKeyPlanes]kernels.KeyQuery, groups), leaning: make([][compress.NumKeyPlanes][]float32, groups),
		grades: make([][compress.NumKeyPlanes][]grade, groups)}
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
		l := &c.layouts[planes-1]
		*q = l.NewQuery(len(c.q) / len(c.order.Channels))
		l.Fold(*q, c.q, c.steps[group])
	}
	return *q
}

// knows says whether a group of tokens was added.
func (c *codes) knows(g int) bool { return len(c.steps[g].Step) > 0 }

func (c *codes) addGroup(g int, b []byte, exp int) (err error) {
	d := len(c.order.Channels)
	if c.steps[g], err = compress.ParseKeySteps(b, d, exp); err != nil {
		return err
	}
	c.grade(g)
	return nil
}

// grade is what the bits that are not known mean for a row's scores of a group of tokens.
type grade struct {
	noise   float32       // the variance of what scores lack
	missing float32       // the part of it that channels make of which nothing is known
	raise   float32       // by how much noise raises a weight on average, log
	scatter float32       // the relative variance of a weight, at most 1
	squares kernels.Curve // of a share's log, without total and raise
	// What the next plane takes away, as a share: of the error of tokens that err
	// each on its own, and of those that err alike.
	own, common float32
}

func (c *codes) grade(g int) {
	d := len(c.order.Channels)
	rows := len(c.q) / d
	all := make([]grade, rows*compress.NumKeyPlanes)
	for p := range c.levels {
		c.grades[g][p], all = all[:rows], all[rows:]
	}
	for r := range rows {
		parts := squaresOfBins(c.q[r*d:(r+1)*d], c.steps[g].Step)
		for p := compress.NumKeyPlanes - 1; p >= 0; p-- {
			x := &c.grades[g][p][r]
			coarse, missing := noise(parts[:], c.levels[p])
			x.noise, x.missing = coarse+missing, missing
			x.raise, x.squares = attention.Mass(1, 0, x.noise), squaresFor(x.noise)
			x.squares.From += x.raise
			x.scatter = min(1, exp(min(x.noise, 4))-1)
			if p+1 < compress.NumKeyPlanes {
				next := c.grades[g][p+1][r]
				x.own, x.common = 1-exp(next.noise-x.noise), 1-exp(next.missing-x.missing)
			}
		}
	}
}

// squaresOfBins returns, by group of 16 channels, the square of what a score of q
// changes by if keys move by their whole range.
func squaresOfBins(q, step []float32) (parts [compress.MaxHeadDim / 16]float32) {
	for g := range len(q) / 16 {
		q, step := (*[16]float32)(q[16*g:]), (*[16]float32)(step[16*g:])
		var even, odd float32
		for j := 0; j < 16; j += 2 {
			x, y := q[j]*step[j]*256, q[j+1]*step[j+1]*256
			even += x * x
			odd += y * y
		}
		parts[g] = even + odd
	}
	return parts
}

// noise is the variance of what a score lacks by the bits that are not known,
// channels erring independently.
func noise(parts []float32, levels []uint8) (coarse, missing float32) {
	for g, l := range levels {
		if x := parts[g] * compress.KeyNoise[l]; l == 0 {
			missing += x
		} else {
			coarse += x
		}
	}
	return min(coarse, mostNoise), min(missing, mostNoise)
}

// grades returns, by row, what it means for a leaf's scores that so many planes are read.
func (u *run) grades(x *leaf, planes int) []grade {
	return u.segs[x.seg].codes.grades[x.group][planes-1]
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
	most     int // planes of keys that can be read: the last one of drains only
	at       int // of its tokens in the tables of scratch
	// keyGain is what reading more of its keys takes away of the error, as far as is
	// known, by the number of planes that are read then.
	keyGain [compress.NumKeyPlanes]float32
	bounded bool   // of planes behind the next one it is a bound
	read    uint16 // a bit for each token whose value was read
}

// addLeaves adds the leaves of the chosen pages, which are in order.
func (u *run) addLeaves(chosen []int) {
	for _, i := range chosen {
		p := &u.pages[i]
		v := u.segs[p.seg].view
		first, end := v.LeavesOf(p.i)
		for l := first; l < end; l++ {
			n := len(u.leaves)
			x := leaf{page: i, seg: p.seg, i: l, place: l * tiers.LeafTokens, n: v.LeafTokens(l), group: v.StepGroup(l),
				at: n * tiers.LeafTokens, most: compress.NumKeyPlanes - 1}
			if v.IsDrain(l) && v.DrainKeys().Len > 0 {
				x.most++
			}
			at := n * compress.NumKeyPlanes
			x.planes = u.planes[at : at : at+compress.NumKeyPlanes]
			u.leaves = append(u.leaves, x)
		}
	}
}

// scoreLeaf scores the leaf's tokens from the planes that were read. Channels of
// which nothing is known yet stand at the page's mean. What the unknown bits
// scatter raises a weight on average, as it does a mass (attention.Mass). Padding weighs nothing.
func (u *run) scoreLeaf(x *leaf) {
	c, planes := u.segs[x.seg].codes, len(x.planes)
	c.layouts[planes-1].Score(u.log[x.at:], u.stride, c.query(x.group, planes), x.planes)
	rest, grades := u.unknown(x), u.grades(x, planes)
	for r := range u.rows {
		log := u.log[r*u.stride+x.at:][:tiers.LeafTokens]
		if u.q.Softcap == 0 {
			add := grades[r].raise + rest[r]
			for t := range log {
				log[t] += add
			}
		} else {
			for t, score := range log {
				log[t] = grades[r].raise + attention.Softcap(rest[r]+score, u.q.Softcap)
			}
		}
		for t := x.n; t < len(log); t++ {
			log[t] = -inf
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

// unpack reconstructs the keys of a leaf in u.leafKeys, [16][d], channels in stored
// order; how many channels are known; and its page's mean key in that order.
func (u *run) unpack(x *leaf) (known int, mean []float32) {
	s := u.segs[x.seg]
	layout := &s.codes.layouts[len(x.planes)-1]
	layout.Unpack(u.leafKeys, s.codes.steps[x.group], x.planes)
	mean = u.mean
	if u.meanOf != x.page { // a page's leaves come together
		u.meanOf = x.page
		row := u.row2[:u.d]
		s.keys.Row(row, u.pages[x.page].i)
		s.codes.order.Permute(mean, row)
	}
	return layout.Known(), mean
}
