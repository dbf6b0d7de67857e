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
	// noise is the variance of what a group's scores lack once so many planes are
	// read: [groups of tokens][planes - 1][rows].
	noise [][compress.NumKeyPlanes][]float32
}

func newCodes(order compress.KeyOrder, q []float32, groups int) *codes {
	c := &codes{order: order, q: make([]float32, len(q)), steps: make([]compress.KeySteps, groups),
		noise: make([][compress.NumKeyPlanes][]float32, groups)}
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

func (c *codes) addGroup(g int, b []byte, exp int) (err error) {
	d := len(c.order.Channels)
	if c.steps[g], err = compress.ParseKeySteps(b, d, exp); err != nil {
		return err
	}
	for p, levels := range c.levels {
		for at := 0; at < len(c.q); at += d {
			c.noise[g][p] = append(c.noise[g][p], noise(c.q[at:at+d], c.steps[g].Step, levels))
		}
	}
	return nil
}

// noise is the variance of what a score of q lacks by the bits that are not
// known, channels erring independently.
func noise(q, step []float32, levels []uint8) (sum float32) {
	for g, l := range levels {
		var part float32
		for j := 16 * g; j < 16*g+16; j++ {
			x := q[j] * step[j] * 256
			part += x * x
		}
		sum += part * compress.KeyNoise[l]
	}
	return min(sum, mostNoise)
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
	log      [][]float32 // [rows][n], log weights of its tokens
	// square holds mean squares of the shares of the softmax that its tokens may
	// have, as far as their keys are known: [rows][n].
	square [][]float32
	read   [tiers.LeafTokens]bool // tokens whose values were read
}

func (u *run) newLeaf(at, l int) leaf {
	p := &u.pages[at]
	v := u.segs[p.seg].view
	x := leaf{page: at, seg: p.seg, i: l, place: l * tiers.LeafTokens, n: v.LeafTokens(l), group: v.StepGroup(l)}
	all := make([]float32, 2*u.rows*x.n)
	for ; len(all) > 0; all = all[2*x.n:] {
		x.log, x.square = append(x.log, all[:x.n]), append(x.square, all[x.n:2*x.n])
	}
	return x
}

// scoreLeaf scores the leaf's tokens from the planes that were read. Channels of
// which nothing is known yet stand at the page's mean. What the unknown bits
// scatter raises a weight on average, as it does a mass (attention.Mass).
func (u *run) scoreLeaf(x *leaf) {
	s, d := u.segs[x.seg], u.d
	var buf [2 * compress.MaxHeadDim]float32
	keys := make([]float32, tiers.LeafTokens*d)
	known := compress.UnpackKeys(keys, d, s.codes.order.Lines, s.codes.steps[x.group], x.planes...)
	mean := buf[:d]
	if known < d {
		s.keys.Row(buf[d:2*d], u.pages[x.page].i)
		s.codes.order.Permute(mean, buf[d:2*d])
	}
	noise := s.codes.noise[x.group][len(x.planes)-1]
	for r, log := range x.log {
		q := s.codes.q[r*d : (r+1)*d]
		rest := attention.Dot(q[known:], mean[known:])
		raise := attention.Mass(1, 0, noise[r])
		for t := range log {
			log[t] = raise + attention.Softcap(rest+attention.Dot(q[:known], keys[t*d:t*d+known]), u.q.Softcap)
			x.square[r][t] = meanSquare(log[t]-u.total[r], noise[r])
		}
	}
}
