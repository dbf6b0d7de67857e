package kernels

import (
	"embed"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"testing"

	"kvtier/attention/kernels"
	"kvtier/compress"
	"kvtier/tiers"
	"kvtier/tiers/gpu/cuda"
	"kvtier/tiers/gpu/cuda/cudatest"
	"kvtier/tiers/seal"
)

//go:embed testdata/probe_d*.ptx
var probes embed.FS

// probe loads a kernel of probe.cu for a head dimension, until the test's end.
func probe(t *testing.T, d *cuda.Device, headDim int, name string) (f cuda.Function) {
	t.Helper()
	text, err := probes.ReadFile(fmt.Sprintf("testdata/probe_d%d.ptx", headDim))
	if err != nil {
		t.Fatal(err)
	}
	var m cuda.Module
	do(t, d, func(c *cuda.Context) (err error) {
		if m, err = c.Load(text); err != nil {
			return err
		}
		f, err = m.Function(name)
		return err
	})
	t.Cleanup(func() { do(t, d, func(*cuda.Context) error { return m.Unload() }) })
	return f
}

// launch runs a kernel whose last outputs, of so many bytes, come back as numbers.
func launch(t *testing.T, d *cuda.Device, f cuda.Function, blocks, threads, shared int, inputs [][]byte, outputs []int, more ...uint64) (out [][]int32) {
	t.Helper()
	do(t, d, func(c *cuda.Context) error {
		var args []uint64
		var held []cuda.Ptr
		for _, b := range inputs {
			p, err := upload(c, b)
			if err != nil {
				return err
			}
			held, args = append(held, p), append(args, uint64(p))
		}
		for _, n := range outputs {
			p, err := upload(c, make([]byte, n))
			if err != nil {
				return err
			}
			held, args = append(held, p), append(args, uint64(p))
		}
		s, err := c.NewStream()
		if err != nil {
			return err
		}
		err = errors.Join(f.SetMaxShared(shared), c.Launch(f, [3]int{blocks, 1, 1}, [3]int{threads, 1, 1}, shared, s, append(args, more...)...), s.Synchronize())
		for i, n := range outputs {
			b, e := download(c, held[len(inputs)+i], n)
			numbers := make([]int32, n/4)
			for j := range numbers {
				numbers[j] = int32(binary.LittleEndian.Uint32(b[4*j:]))
			}
			out, err = append(out, numbers), errors.Join(err, e)
		}
		for _, p := range held {
			err = errors.Join(err, c.Free(p))
		}
		return errors.Join(err, s.Destroy())
	})
	return out
}

const a100 = 163 << 10 // bytes of shared memory that a block can have there

// TestSizes compares what the host assumes of the tables and of shared memory with what attend.cu says.
func TestSizes(t *testing.T) {
	d := cudatest.Open(t)
	for _, headDim := range HeadDims {
		got := launch(t, d, probe(t, d, headDim, "sizes"), 1, 1, 0, nil, []int{36})[0]
		want := []int{segmentBytes, unitBytes, splitBytes, sharedBytes(headDim, 2, false), sharedBytes(headDim, 1, true), sharedBytes(headDim, 2, true), choiceBytes,
			gatherBytes(headDim, false), gatherBytes(headDim, true)}
		for i, w := range want {
			if int(got[i]) != w {
				t.Errorf("head dimension %d: sizes %v, want %v", headDim, got, want)
				break
			}
		}
		if slices.Max(want) > a100 {
			t.Errorf("head dimension %d: %v bytes of shared memory, of %d", headDim, want[3:], a100)
		}
	}
}

// TestIntegers compares folded words, and sums of words times codes, with the host's, to the last bit.
func TestIntegers(t *testing.T) {
	d := cudatest.Open(t)
	rng := rand.New(rand.NewPCG(7, 8))
	for _, headDim := range HeadDims {
		most, low := probe(t, d, headDim, "probe"), probe(t, d, headDim, "probe_low")
		for i := range 14 {
			if testing.Short() && i > 2 {
				break
			}
			m := shape{d: headDim, heads: 1, tokens: []int{1 + rng.IntN(300) + i%2*256}, profile: tiers.ProfileBalanced, low: i%3 == 1, keys: []float64{1, 0x1p-70, 0x1p80}[i%5%3]}
			if i%3 == 0 {
				m.profile = tiers.ProfileNeutral
			}
			rows := 1 + rng.IntN(warpRows)
			q := m.query(rng, rows, 3)
			if i%4 == 0 {
				clear(q[:headDim]) // tells nothing apart
			}
			if i%4 == 1 {
				q[rng.IntN(headDim)] *= 1000
			}
			s := m.make(rng)[0]
			if i%2 == 1 {
				s.deal(rng)
			}
			segments := resident(t, d, []*sealed{s})
			integers(t, d, s, segments, q, most, low)
			scanIntegers(t, d, s, segments, q, probe(t, d, headDim, "probe_scan"))
		}
	}
}

// integers compares those of all units of a segment of one head.
func integers(t *testing.T, d *cuda.Device, s *sealed, segments []Segment, q []float32, most, low cuda.Function) {
	t.Helper()
	p := NewPlan(segments, Warps{8, 8})
	x, headDim := parse(t, p), p.HeadDim
	rows := len(q) / headDim
	shared := warpRows*(headDim+4)*4 + sharedBytes(headDim, 1, true) // more than one warp needs
	drainUnits := 0
	for _, split := range x.splits[:p.ends[drains]] {
		drainUnits = max(drainUnits, split.end)
	}
	run := func(f cuda.Function, first, end int) {
		if first == end {
			return
		}
		units := p.tables[p.units+first*unitBytes : p.units+end*unitBytes]
		out := launch(t, d, f, end-first, 32, shared, [][]byte{p.tables[:p.units], units, bytesOf(q)},
			[]int{4 * (end - first) * warpRows * headDim, 4 * (end - first) * tiers.StepTokens * warpRows}, uint64(rows))
		for i, u := range x.units[first:end] {
			checkIntegers(t, s, u, q, out[0][i*warpRows*headDim:], out[1][i*tiers.StepTokens*warpRows:])
		}
	}
	run(low, 0, drainUnits)
	if s.low {
		run(low, drainUnits, len(x.units))
	} else {
		run(most, drainUnits, len(x.units))
	}
}

// scanIntegers compares those of scanning a segment of one head.
func scanIntegers(t *testing.T, d *cuda.Device, s *sealed, segments []Segment, q []float32, f cuda.Function) {
	t.Helper()
	p, v, headDim := NewPlan(segments, Warps{8, 8}), s.view(0), s.header.HeadDim
	c, rows, lines := p.choice, len(q)/headDim, compress.KeyPlaneBytes(headDim)[0]/kernels.Line
	if c == nil {
		return // less than a page
	}
	units := c.tables[c.candidates:][:c.numCandidates*unitBytes]
	out := launch(t, d, f, c.numCandidates, 32, warpRows*(headDim+4)*4+sharedBytes(headDim, 1, true), [][]byte{p.tables[:p.units], units, bytesOf(q)},
		[]int{4 * c.numCandidates * warpRows * lines * 16, 4 * c.numCandidates * tiers.StepTokens * warpRows, 4 * c.numCandidates * candidatePages * warpRows}, uint64(rows))
	order, err := compress.ParseKeyOrder(s.of(0)(tiers.PlaneSteps), headDim)
	if err != nil {
		t.Fatal(err)
	}
	layout := compress.NewKeyLayout(headDim, order.Lines, 1)
	steps, ordered, codes := compress.NewKeySteps(headDim), make([]float32, len(q)), meanCodes(t, s)
	order.Permute(ordered, q)
	folded := kernels.KeyQuery{Words: make([]int16, rows*layout.Known()), Scale: make([]float32, 2*rows)}
	for i := range c.numCandidates {
		first, leaves := int(binary.LittleEndian.Uint16(units[i*unitBytes+4:])), int(units[i*unitBytes+6])
		r := v.Steps(v.StepGroup(first))
		if err := steps.Parse(s.of(0)(tiers.PlaneSteps)[r.Off:r.Off+r.Len], v.Info.KeyExp); err != nil {
			t.Fatal(err)
		}
		layout.Fold(folded, ordered, steps)
		word := func(r, j int) int32 { return int32(folded.Words[(j/16*rows+r)*16+kernels.Place(j%16)]) }
		for r := range rows {
			for line := range lines {
				for j := range 16 {
					if got, want := out[0][((i*warpRows+r)*lines+line)*16+j], word(r, int(order.Lines[line])*16+j); got != want {
						t.Fatalf("head dimension %d, candidate %d, row %d, line %d: word %d is %d, not %d", headDim, i, r, line, j, got, want)
					}
				}
			}
			for l := first; l < first+leaves; l++ {
				k := v.LeafKeys(0, l)
				known := codesBy(&layout, [][]byte{s.of(0)(tiers.PlaneK1)[k.Off : k.Off+k.Len]}, layout.Known())
				for token := range tiers.LeafTokens {
					var want int32
					for j := range layout.Known() {
						want += word(r, j) * known[token*layout.Known()+j]
					}
					if got := out[1][(i*tiers.StepTokens+(l-first)*tiers.LeafTokens+token)*warpRows+r]; got != want {
						t.Fatalf("head dimension %d, candidate %d, leaf %d, token %d, row %d: sum %d, not %d", headDim, i, l, token, r, got, want)
					}
				}
			}
			for page := range leaves / pageLeaves {
				var want int32
				for j, w := range rowWords(t, s, q[r*headDim:(r+1)*headDim]) {
					if !slices.Contains(order.Channels[:layout.Known()], uint8(j)) {
						want += w * codes[(first/pageLeaves+page)*headDim+j]
					}
				}
				if got := out[2][(i*candidatePages+page)*warpRows+r]; got != want {
					t.Fatalf("head dimension %d, candidate %d, page %d, row %d: product with the mean %d, not %d", headDim, i, page, r, got, want)
				}
			}
		}
	}
}

func meansOf(t *testing.T, s *sealed) (m seal.PageMeans) {
	t.Helper()
	if err := s.view(0).PageMeans(&m, s.of(0)(tiers.PlanePages)); err != nil {
		t.Fatal(err)
	}
	return m
}

// meanCodes returns the codes of a segment's mean keys, [..][d], as odd numbers from -15 to 15.
func meanCodes(t *testing.T, s *sealed) []int32 {
	t.Helper()
	m, d := meansOf(t, s), s.header.HeadDim
	rows := make([]float32, compress.MeanKeyPlaces(m.Keys.Len())*d)
	steps := compress.NewKeySteps(d)
	if err := errors.Join(m.Keys.Rows(rows), m.Keys.ReadSteps(steps)); err != nil {
		t.Fatal(err)
	}
	codes := make([]int32, len(rows))
	for i, x := range rows {
		codes[i] = 2*int32(math.RoundToEven(float64((x-steps.Lo[i%d])/steps.Step[i%d]-8)/16)) - 15
	}
	return codes
}

// rowWords are a row in the bins of a segment's mean keys, half a bin of 16 for each code, as 16-bit words, of which the largest is 32639.
func rowWords(t *testing.T, s *sealed, q []float32) []int32 {
	t.Helper()
	m, unit, steps := meansOf(t, s), math.Ldexp(1, s.header.Heads[0].KeyExp), compress.NewKeySteps(s.header.HeadDim)
	if err := m.Keys.ReadSteps(steps); err != nil {
		t.Fatal(err)
	}
	out, products, most := make([]int32, len(q)), make([]float32, len(q)), float32(0)
	for i, x := range q {
		products[i] = x * float32(unit) * float32(float64(steps.Step[i])/unit*8)
		most = max(most, float32(math.Abs(float64(products[i]))))
	}
	if most == 0 {
		return out
	}
	inverse := 1 / (most / 32639)
	for i, x := range products {
		out[i] = int32(math.RoundToEven(float64(x * inverse)))
	}
	return out
}

func bytesOf(q []float32) (b []byte) {
	b, _ = binary.Append(nil, binary.LittleEndian, q)
	return b
}

// checkIntegers compares a unit's words [8][d] and sums [256][8].
func checkIntegers(t *testing.T, s *sealed, u unit, q []float32, words, sums []int32) {
	t.Helper()
	v, d := s.view(0), s.header.HeadDim
	rows := len(q) / d
	c, err := v.Codes(s.of(0))
	if err != nil {
		t.Fatal(err)
	}
	first, steps := int(u.leaf), compress.NewKeySteps(d)
	if err := c.Steps(steps, v.StepGroup(first)); err != nil {
		t.Fatal(err)
	}
	ordered := make([]float32, len(q))
	c.Order().Permute(ordered, q)
	for l := first + int(u.skip); l < first+int(u.leaves); l++ {
		layout := c.Layout(l)
		folded := kernels.KeyQuery{Words: make([]int16, rows*d), Scale: make([]float32, 2*rows)}
		layout.Fold(folded, ordered, steps)
		word := func(r, j int) int32 { return int32(folded.Words[(j/16*rows+r)*16+kernels.Place(j%16)]) }
		for r := range rows {
			for j := range d {
				if got, want := words[r*d+j], word(r, j); got != want {
					t.Fatalf("head dimension %d, %+v, row %d: word %d is %d, not %d", d, u, r, j, got, want)
				}
			}
		}
		codes := codesOf(c, l, d)
		for token := range v.LeafTokens(l) {
			for r := range rows {
				var want int32
				for j := range d {
					want += word(r, j) * codes[token*d+j]
				}
				if got := sums[((l-first)*tiers.LeafTokens+token)*warpRows+r]; got != want {
					t.Fatalf("head dimension %d, %+v, leaf %d, token %d, row %d: sum %d, not %d", d, u, l, token, r, got, want)
				}
			}
		}
	}
}

// codesOf returns a leaf's codes [16][d].
func codesOf(c *seal.Codes, leaf, d int) []int32 {
	planes, _ := c.Leaves(leaf)
	return codesBy(c.Layout(leaf), planes[:], d)
}

// codesBy returns the codes [16][known] of a leaf, as far as planes say: sums of them, each with weight 1 in a row of its own.
func codesBy(l *compress.KeyLayout, planes [][]byte, known int) []int32 {
	const n = tiers.LeafTokens
	sums, weights := make([]float32, n*known), make([]float32, n*n)
	var rows [][]float32
	for i := range n {
		rows = append(rows, sums[i*known:(i+1)*known])
		weights[i*n+i] = 1
	}
	l.SumCodes(rows, weights, n, planes)
	codes := make([]int32, n*known)
	for i, x := range sums {
		codes[i] = int32(x)
	}
	return codes
}

// deal says of each line of keys anew which group it is of. Every group has one to four, its first among the first half of lines, first ones in
// the groups' order.
func (s *sealed) deal(rng *rand.Rand) {
	groups := s.header.HeadDim / 16
	for head := range s.planes {
		count, known := make([]int, groups), 0
		lines := s.planes[head][tiers.PlaneSteps][s.header.HeadDim:][:4*groups]
		for i := range lines {
			g := known
			if known == groups || 2*groups-i > groups-known {
				for g = rng.IntN(min(known+1, groups)); count[g] == 4; g = rng.IntN(min(known+1, groups)) {
				}
			}
			lines[i] = byte(g)
			known = max(known, g+1)
			count[g]++
		}
	}
}
