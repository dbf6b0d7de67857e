package speed

import (
	"math/rand/v2"
	"unsafe"

	"kvtier/attention"
	"kvtier/kernels"
)

// block is how many tokens a kernel is called for: a page.
const block = 64

// kernel goes through memory unit by unit; a unit holds some tokens of one KV head.
type kernel struct {
	name         string
	unit, tokens int
	run          func(b []byte, s *scratch)
}

// scratch is what a thread needs beside the memory.
type scratch struct {
	d, rows  int
	q        []float32 // [rows][d]
	scores   []float32 // [rows][block]
	leaf     []float32 // [rows][16]
	unpacked []float32 // [16][d]
	ps       []attention.Partial
	sums     [][]float32
	scale    []float32 // [block][2]
	high     [block][]byte
	query    kernels.KeyQuery
	lines    [64]*[kernels.Line]byte
	levels   [16]uint8
}

func newScratch(o Options) *scratch {
	rng := rand.New(rand.NewPCG(3, 4))
	random := func(n int) []float32 {
		x := make([]float32, n)
		for i := range x {
			x[i] = rng.Float32() / 16
		}
		return x
	}
	s := &scratch{d: o.HeadDim, rows: o.Rows, q: random(o.Rows * o.HeadDim), scores: random(o.Rows * block),
		leaf: make([]float32, o.Rows*kernels.LineTokens), unpacked: make([]float32, kernels.LineTokens*o.HeadDim), ps: attention.NewPartials(o.Rows, o.HeadDim), scale: random(2 * block)}
	s.sums = attention.AppendSums(nil, s.ps)
	s.query = kernels.KeyQuery{Words: make([]int16, o.Rows*o.HeadDim), Scale: make([]float32, 2*o.Rows)}
	for i := range s.query.Words {
		s.query.Words[i] = int16(rng.IntN(1 << 14))
	}
	for r := range o.Rows {
		s.query.Scale[2*r] = 1e-9
	}
	return s
}

// kernelsOf lists what is measured.
func kernelsOf(o Options) []kernel {
	d := o.HeadDim
	return []kernel{
		{"attention, float32", 2 * block * 4 * d, block, dense},
		{"attention, 4-bit planes", block * d, block, coded},
		{"values, 4 bits", block * d / 2, block, values},
		{"keys, 4 bits", block * d / 2, block, func(b []byte, s *scratch) { s.keys(b, 2, score) }},
		{"keys, 2 bits", block * d / 4, block, func(b []byte, s *scratch) { s.keys(b, 1, score) }},
		{"keys, 4 bits, unpacked", block * d / 2, block, func(b []byte, s *scratch) { s.keys(b, 2, unpack) }},
		{"page means, int8", block * d, block, means},
	}
}

// dense is attention over a page's keys [block][d] and values behind them.
func dense(b []byte, s *scratch) {
	k, v := floats(b[:len(b)/2]), floats(b[len(b)/2:])
	attention.Attend(s.ps, s.q, k, v, s.d, 0, nil)
}

// coded is attention over a page's keys, 4 leaves of lines, and 4-bit values behind them.
func coded(b []byte, s *scratch) {
	s.keys(b[:len(b)/2], 2, score)
	attention.Weigh(s.ps, s.scores, block, block)
	values(b[len(b)/2:], s)
}

func values(b []byte, s *scratch) {
	for t := range s.high {
		s.high[t] = b[t*s.d/2:][:s.d/2]
	}
	kernels.AddValues(s.sums, s.scores, block, s.scale, s.high[:], nil, s.d)
}

func means(b []byte, s *scratch) { kernels.DotsInt8(s.scores, block, s.q, b, s.d) }

// keys goes through leaves of which each group has so many lines.
func (s *scratch) keys(b []byte, levels int, use func(s *scratch, leaf int, k kernels.Keys)) {
	groups := s.d / kernels.LineTokens
	for g := range groups {
		s.levels[g] = uint8(levels)
	}
	for leaf := range block / kernels.LineTokens {
		n := levels * groups
		for i := range n {
			s.lines[i] = (*[kernels.Line]byte)(b[(leaf*n+i)*kernels.Line:])
		}
		use(s, leaf, kernels.Keys{Lines: s.lines[:n], Levels: s.levels[:groups]})
	}
}

// score writes a leaf's scores where they stand in the page's.
func score(s *scratch, leaf int, k kernels.Keys) {
	kernels.ScoreKeys(s.leaf, s.query, k)
	for r := range s.rows {
		copy(s.scores[r*block+leaf*kernels.LineTokens:], s.leaf[r*kernels.LineTokens:][:kernels.LineTokens])
	}
}

func unpack(s *scratch, _ int, k kernels.Keys) { kernels.UnpackKeys(s.unpacked, s.d, k, s.q, s.q) }

// floats views bytes as floats; b is aligned.
func floats(b []byte) []float32 { return unsafe.Slice((*float32)(unsafe.Pointer(&b[0])), len(b)/4) }
