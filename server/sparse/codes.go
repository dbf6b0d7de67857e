package sparse

import (
	"math"

	"kvtier/attention"
	"kvtier/attention/kernels"
	"kvtier/compress"
)

var inf = float32(math.Inf(1))

// codes is how the keys of a segment's head are coded, and what that means for
// a query. What depends on how many planes are read, an array here, is made when it is needed.
type codes struct {
	order  compress.KeyOrder
	q      []float32                                              // [rows][d], channels in stored order
	levels [compress.NumKeyPlanes][compress.MaxHeadDim / 16]uint8 // by group of channels, how many pairs of bits are known
	known  [compress.NumKeyPlanes]int                             // channels of which something is known, the first ones
	layout [compress.NumKeyPlanes]*compress.KeyLayout
	// hidden [rows][mostPages] is what pages' mean keys score in the channels of which nothing is known; nil if there are none.
	hidden [compress.NumKeyPlanes][]float32
}

// group is a group of tokens that share the bins of their keys.
type group struct {
	read  int               // groups of channels, the first, of which bins are read
	steps compress.KeySteps // of the others, what stands for them
	parts []float32         // [rows][groups of channels], see kernels.BinSquares
	by    [compress.NumKeyPlanes]grouped
}

// grouped is what depends on how many planes are read.
type grouped struct {
	grades []grade          // [rows], nil until they are needed
	query  kernels.KeyQuery // in the bins of keys; no Scale until it is needed
}

// begin takes in the order of the keys' bits.
func (u *run) begin(s *segmentRun, order compress.KeyOrder) {
	c := &s.codes
	c.order, c.q = order, u.floats(u.rows*u.d)
	order.Permute(c.q, u.q.Q)
	at := 0
	var levels [compress.MaxHeadDim / 16]uint8
	for p, n := range u.planeBytes {
		for _, g := range order.Lines[at : at+n/kernels.Line] {
			levels[g]++
		}
		at += n / kernels.Line
		c.levels[p] = levels
		for _, l := range levels {
			if l > 0 {
				c.known[p] += kernels.LineTokens
			}
		}
	}
}

// layoutOf returns where the lines of so many planes lie.
func (u *run) layoutOf(s *segmentRun, planes int) *compress.KeyLayout {
	l := &s.codes.layout[planes-1]
	if *l == nil {
		*l = &u.layouts.zeros(1)[0]
		**l = compress.NewKeyLayout(u.d, s.codes.order.Lines, planes)
	}
	return *l
}

// hiddenOf returns codes.hidden.
func (u *run) hiddenOf(s *segmentRun, planes int) []float32 {
	c := &s.codes
	known, hidden := c.known[planes-1], &c.hidden[planes-1]
	if known < u.d && *hidden == nil {
		q := u.floats(len(c.q))
		copy(q, u.q.Q)
		for _, j := range c.order.Channels[:known] {
			for at := int(j); at < len(q); at += u.d {
				q[at] = 0
			}
		}
		*hidden = u.floats(u.rows * mostPages)
		if err := s.means.Keys.Scores(*hidden, mostPages, q, u.folded); err != nil {
			panic(err) // of bins that scoreAll has read
		}
	}
	return *hidden
}

// readGroup takes in the bins of a group of tokens in so many groups of channels more.
func (u *run) readGroup(s *segmentRun, g *group, b []byte) error {
	if g.read == 0 {
		g.steps, g.parts = u.newSteps(u.d), u.floats(u.rows*u.d/kernels.LineTokens)
		s.codes.order.StandIn(g.steps, s.view.Info.KeyExp)
	}
	lo := g.read * kernels.LineTokens
	g.read += len(b) / kernels.Line
	if err := g.steps.Of(lo, g.read*kernels.LineTokens).Parse(b, s.view.Info.KeyExp); err != nil {
		return err
	}
	kernels.BinSquares(g.parts, s.codes.q, g.steps.Step)
	return nil
}

// query returns the query in the bins of a leaf's keys.
func (u *run) query(x *leaf) kernels.KeyQuery {
	s, planes := &u.segs[x.seg], int(x.planes)
	q := &u.groups[x.group].by[planes-1].query
	if q.Scale == nil {
		*q = kernels.KeyQuery{Words: u.words(u.rows * s.codes.known[planes-1]), Scale: u.floats(2 * u.rows)}
		u.layoutOf(s, planes).Fold(*q, s.codes.q, u.groups[x.group].steps)
	}
	return *q
}

// grade is what the bits that are not known mean for a row's scores of a group of tokens.
type grade struct {
	noise   float32 // the variance of what scores lack
	raise   float32 // by how much noise raises a weight on average, log
	scatter float32 // the relative variance of a weight, at most 1
	// The mean of the square of a token's share, of which no share is more than 1, is about the least of so
	// many times its expected share, and so many times the square of that; and no more.
	ofShare, ofSquare float32
	// What the next plane takes away, as a share: of the error of tokens that err
	// each on its own, and of those that err alike.
	own, common float32
}

// grades returns, by row, what it means for a leaf's scores that so many planes are read.
func (u *run) grades(x *leaf, planes int) []grade {
	by := &u.groups[x.group].by[planes-1]
	if by.grades == nil {
		by.grades = u.grade(x, planes)
	}
	return by.grades
}

func (u *run) grade(x *leaf, planes int) []grade {
	out, c, parts := u.newGrades(u.rows), &u.segs[x.seg].codes, u.groups[x.group].parts
	const each = 5
	logs := u.floats(each * u.rows)
	for r := range out {
		x, parts, logs := &out[r], parts[r*u.d/16:(r+1)*u.d/16], logs[each*r:]
		coarse, missing := noise(parts, &c.levels[planes-1])
		x.noise = coarse + missing
		x.raise = attention.Mass(1, 0, x.noise)
		logs[0] = min(x.noise, mostRaise) - mostRaise
		logs[1], logs[2] = x.raise-x.noise/2, 2*(x.raise-x.noise)
		if planes < compress.NumKeyPlanes {
			coarseThen, missingThen := noise(parts, &c.levels[planes])
			logs[3], logs[4] = coarseThen+missingThen-x.noise, missingThen-missing
		}
	}
	kernels.Weights(logs, logs, 0)
	for r := range out {
		x, e := &out[r], logs[each*r:]
		x.scatter = min(1, e[0]*raiseUnit-1)
		x.ofShare, x.ofSquare = 1/e[1], 1/e[2]
		x.own, x.common = 1-e[3], 1-e[4]
	}
	return out
}

// noise is the variance of what a score lacks by the bits that are not known,
// channels erring independently: of channels of which something is known, and of others.
func noise(parts []float32, levels *[compress.MaxHeadDim / 16]uint8) (coarse, missing float32) {
	for g, part := range parts {
		if l := levels[g]; l == 0 {
			missing += part * compress.KeyNoise[0]
		} else {
			coarse += part * compress.KeyNoise[l]
		}
	}
	return min(coarse, mostNoise), min(missing, mostNoise)
}

// mostNoise keeps what is computed from noise finite, whatever bins were stored.
const mostNoise = 1e4
