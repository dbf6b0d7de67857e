package speed

import (
	"math/rand/v2"
	"slices"
	"unsafe"

	"kvtier/attention"
	"kvtier/attention/kernels"
	"kvtier/tiers"
)

// block is how many tokens a kernel is called for: those that share the bins of their keys.
const block = 256

// kernel goes through memory unit by unit; a unit holds some tokens of one KV head.
type kernel struct {
	name         string
	unit, tokens int
	run          func(b []byte, s *scratch)
	gathered     bool // units come in an order that nobody foresees, and say where the next one lies
}

// scratch is what a thread needs beside the memory.
type scratch struct {
	d, rows  int
	q        []float32 // [rows][d]
	scores   []float32 // [rows][block]
	unpacked []float32 // [16][d]
	ps       []attention.Partial
	sums     [][]float32
	scales   []byte // of values
	values   kernels.ValueBatch
	query    kernels.KeyQuery
	layouts  [5]kernels.Layout // by lines of a group
	plane    [1][]byte         // of keys, of leaves one after the other
	leaf     [1]int            // its size
	ahead    int               // how far behind what is read lies what will be
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
		unpacked: make([]float32, kernels.LineTokens*o.HeadDim),
		ps:       attention.NewPartials(o.Rows, o.HeadDim), scales: slices.Repeat([]byte{0, 0x7b, 128}, block)} // a step of 1/16
	s.sums = attention.AppendSums(nil, s.ps)
	s.query = kernels.KeyQuery{Words: make([]int16, o.Rows*o.HeadDim), Scale: make([]float32, 2*o.Rows)}
	for i := range s.query.Words {
		s.query.Words[i] = int16(rng.IntN(1 << 14))
	}
	for r := range o.Rows {
		s.query.Scale[2*r] = 1e-9
	}
	groups := o.HeadDim / kernels.LineTokens
	for n := 1; n < len(s.layouts); n++ {
		var lines []kernels.LinePlace
		for i := range groups * n {
			lines = append(lines, kernels.LinePlace{At: uint16(i * kernels.Line)})
		}
		s.layouts[n] = kernels.NewLayout(slices.Repeat([]uint8{uint8(n)}, groups), lines)
	}
	return s
}

// kernelsOf lists what is measured.
func kernelsOf(d int) []kernel {
	return append(attentionKernels(d),
		kernel{name: "pages anywhere, 4-bit planes", unit: tiers.PageTokens * d, tokens: tiers.PageTokens, run: page, gathered: true},
		kernel{name: "values, 4 bits", unit: block * d / 2, tokens: block, run: values},
		kernel{name: "keys, 4 bits", unit: block * d / 2, tokens: block, run: func(b []byte, s *scratch) { s.score(b, 2) }},
		kernel{name: "keys, 2 bits", unit: block * d / 4, tokens: block, run: func(b []byte, s *scratch) { s.score(b, 1) }},
		kernel{name: "keys, 4 bits, unpacked", unit: block * d / 2, tokens: block, run: func(b []byte, s *scratch) { s.unpack(b, 2) }},
		kernel{name: "page means, int8", unit: block * d, tokens: block, run: means},
	)
}

// planes4 is what the service reads of everything.
const planes4 = "attention, 4-bit planes"

// attentionKernels lists those that attend to all of a block.
func attentionKernels(d int) []kernel {
	return []kernel{
		{name: "attention, float32", unit: 2 * block * 4 * d, tokens: block, run: dense},
		{name: "attention, bfloat16", unit: 2 * block * 2 * d, tokens: block, run: bfloat},
		{name: "attention, 8-bit planes", unit: 2 * block * d, tokens: block, run: func(b []byte, s *scratch) { s.coded(b, 4) }},
		{name: planes4, unit: block * d, tokens: block, run: func(b []byte, s *scratch) { s.coded(b, 2) }},
	}
}

// dense is attention over a block's keys [block][d] and values behind them.
func dense(b []byte, s *scratch) {
	k, v := floats(b[:len(b)/2]), floats(b[len(b)/2:])
	attention.Attend(s.ps, s.q, k, v, s.d, 0, nil)
}

// bfloat is dense of bfloat16.
func bfloat(b []byte, s *scratch) {
	attention.AttendBF16(s.ps, s.q, b[:len(b)/2], b[len(b)/2:], s.d, 0)
}

// coded is attention over a block's keys, leaves of so many lines a group,
// and values of as many bits behind them.
func (s *scratch) coded(b []byte, levels int) {
	s.score(b[:len(b)/2], levels)
	attention.Weigh(s.ps, s.scores, block, block)
	values(b[len(b)/2:], s)
}

// page is attention over a page of the same form.
func page(b []byte, s *scratch) {
	keys, high := b[:len(b)/2], b[len(b)/2:]
	const leaves = tiers.PageTokens / kernels.LineTokens
	s.scoreLeaves(keys, 2, leaves, s.ahead)
	attention.Weigh(s.ps, s.scores, block, tiers.PageTokens)
	s.values.Reset()
	s.values.AppendRun(s.scales, high, nil, tiers.PageTokens, s.d, s.ahead)
	s.values.AddTo(s.sums, s.scores, block)
}

// values is the weighted sum of a block's values: high codes, then low codes if there are any.
func values(b []byte, s *scratch) {
	high, low := b[:block*s.d/2], b[block*s.d/2:]
	if len(low) == 0 {
		low = nil
	}
	s.values.Reset()
	s.values.AppendRun(s.scales, high, low, block, s.d, kernels.Ahead)
	s.values.AddTo(s.sums, s.scores, block)
}

func means(b []byte, s *scratch) { kernels.DotsInt8(s.scores, block, s.q, b, s.d) }

// score scores leaves of which each group has so many lines.
func (s *scratch) score(b []byte, levels int) {
	s.scoreLeaves(b, levels, block/kernels.LineTokens, kernels.Ahead)
}

func (s *scratch) scoreLeaves(b []byte, levels, leaves, ahead int) {
	s.plane[0], s.leaf[0] = b, len(b)/leaves
	kernels.ScoreLeaves(s.scores, kernels.LineTokens, block, s.query, &s.layouts[levels], s.plane[:], s.leaf[:], leaves, ahead)
}

// unpack unpacks their keys.
func (s *scratch) unpack(b []byte, levels int) {
	size := len(b) / (block / kernels.LineTokens)
	for ; len(b) > 0; b = b[size:] {
		s.plane[0] = b
		kernels.UnpackKeys(s.unpacked, s.d, &s.layouts[levels], s.plane[:], s.q, s.q)
	}
}

// floats views bytes as floats; b is aligned.
func floats(b []byte) []float32 { return unsafe.Slice((*float32)(unsafe.Pointer(&b[0])), len(b)/4) }
