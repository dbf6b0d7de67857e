package kernels

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"math/bits"
	"math/rand/v2"
	"slices"
	"testing"

	"kvtier/attention"
	"kvtier/attention/kernels"
	"kvtier/compress"
	"kvtier/tiers"
	"kvtier/tiers/gpu/cuda"
	"kvtier/tiers/gpu/cuda/cudatest"
	"kvtier/tiers/seal"
)

// pageOf is a page that a head chooses from, as plain Go sees it.
type pageOf struct {
	seg, page    int
	mean         []float64 // of values, rotated
	spread       float64
	mass         []float64   // by row, natural log
	rule, noised []float64   // struct Rule
	scores       [][]float64 // by row and token, of all bits, log2
}

// scanned is what scan, in float64, finds of the pages of a head.
func scanned(t *testing.T, segments []*sealed, head int, q []float32, softcap float64) (out []*pageOf) {
	t.Helper()
	d := segments[0].header.HeadDim
	rows := len(q) / d
	for n, s := range segments {
		v, planes := s.view(head), s.of(head)
		order, err := compress.ParseKeyOrder(planes(tiers.PlaneSteps), d)
		if err != nil {
			t.Fatal(err)
		}
		layout := compress.NewKeyLayout(d, order.Lines, 1)
		ordered, steps, keys := make([]float32, len(q)), compress.NewKeySteps(d), make([]float32, tiers.LeafTokens*d)
		order.Permute(ordered, q)
		parts := make([]float32, rows*d/16)
		var means seal.PageMeans
		if err := v.PageMeans(&means, planes(tiers.PlanePages)); err != nil {
			t.Fatal(err)
		}
		row, meanKeys := make([]float32, d), make([]float32, compress.MeanKeyPlaces(v.Pages())*d)
		if err := means.Keys.Rows(meanKeys); err != nil {
			t.Fatal(err)
		}
		for p := range v.Info.Body / tiers.PageTokens {
			x := &pageOf{seg: n, page: p, spread: float64(means.Values.Spread(p)), mass: make([]float64, rows), rule: make([]float64, rows), noised: make([]float64, rows)}
			means.Values.Row(row, p)
			for _, y := range row {
				x.mean = append(x.mean, float64(y))
			}
			mean := make([]float32, d)
			order.Permute(mean, meanKeys[p*d:(p+1)*d])
			first, end := v.LeavesOf(p)
			r := v.Steps(v.StepGroup(first))
			if err := steps.Parse(planes(tiers.PlaneSteps)[r.Off:r.Off+r.Len], v.Info.KeyExp); err != nil {
				t.Fatal(err)
			}
			kernels.BinSquares(parts, ordered, steps.Step)
			scores := make([][]float64, rows)
			for l := first; l < end; l++ {
				k := v.LeafKeys(0, l)
				layout.Unpack(keys, steps, [][]byte{planes(tiers.PlaneK1)[k.Off : k.Off+k.Len]})
				for i := range tiers.LeafTokens {
					for r := range rows {
						sum := 0.
						for j, y := range ordered[r*d : (r+1)*d] {
							if j < layout.Known() {
								sum += float64(y) * float64(keys[i*d+j])
							} else {
								sum += float64(y) * float64(mean[j])
							}
						}
						if softcap != 0 {
							sum = softcap * math.Tanh(sum/softcap)
						}
						scores[r] = append(scores[r], sum)
					}
				}
			}
			for r := range rows {
				coarse, missing := 0., 0.
				for g, part := range parts[r*d/16 : (r+1)*d/16] {
					if levels := layout.Levels(); g < len(levels) {
						coarse += float64(part) * float64(compress.KeyNoise[levels[g]])
					} else {
						missing += float64(part) * float64(compress.KeyNoise[0])
					}
				}
				noise := min(coarse, 1e4) + min(missing, 1e4)
				sum, squares, top := 0., 0., slices.Max(scores[r])
				for _, y := range scores[r] {
					w := math.Exp(y - top)
					sum, squares = sum+w, squares+w*w
				}
				scatter := min(1, math.Exp(min(noise, 1))-1)
				x.mass[r] = top + math.Log(sum) + min(noise/2, attention.MassClip)
				x.rule[r], x.noised[r] = squares/(sum*sum)*(1+scatter), squares/(sum*sum)*scatter
			}
			out = append(out, x)
		}
	}
	return out
}

// scored fills in the pages' scores by all bits of the keys.
func scored(t *testing.T, pages []*pageOf, segments []*sealed, head int, q []float32, softcap float64) {
	t.Helper()
	d := segments[0].header.HeadDim
	keys := make([][]float32, len(segments))
	for n, s := range segments {
		keys[n] = make([]float32, s.view(head).Stored()*d)
		if err := s.view(head).Keys(keys[n], s.of(head)); err != nil {
			t.Fatal(err)
		}
	}
	for _, p := range pages {
		for r := range len(q) / d {
			scores := make([]float64, tiers.PageTokens)
			for i := range scores {
				for j, y := range keys[p.seg][(p.page*tiers.PageTokens+i)*d:][:d] {
					scores[i] += float64(q[r*d+j]) * float64(y)
				}
				if softcap != 0 {
					scores[i] = softcap * math.Tanh(scores[i]/softcap)
				}
				scores[i] *= math.Log2E
			}
			p.scores = append(p.scores, scores)
		}
	}
}

// wrote is what the kernels wrote of a call into its room. masses and rules are what scan wrote: those that gather leaves are in b.
type wrote struct {
	b             []byte
	masses, rules []byte
	n             *Answer
}

func (w wrote) scanned(i int) float64 { return wrote{b: w.masses}.float(0, i) }

// rule returns what scan says rules a mass.
func (w wrote) rule(i int) (all, noise float64) {
	return wrote{b: w.rules}.float(0, 2*i), wrote{b: w.rules}.float(0, 2*i+1)
}

// read says which tokens of a chosen page were read for a row.
func (w wrote) read(page, row int) uint64 {
	blocks := (w.n.rows + warpRows - 1) / warpRows
	return binary.LittleEndian.Uint64(w.b[w.n.l.read+8*(page*blocks+row/warpRows):])
}

func (w wrote) float(part, i int) float64 {
	return float64(math.Float32frombits(binary.LittleEndian.Uint32(w.b[part+4*i:])))
}
func (w wrote) word(part, i int) int { return int(binary.LittleEndian.Uint32(w.b[part+4*i:])) }

// choosing answers with a share of the pages, and returns what the kernels wrote.
func answerChoosing(t *testing.T, a *Attention, segments []Segment, warps Warps, q []float32, softcap float32, share uint32) (ps []attention.Partial, w wrote, err error) {
	t.Helper()
	tables, err := a.Upload(ctx, NewPlan(segments, warps))
	if err != nil {
		return nil, w, err
	}
	if w.n, err = a.StartChoosing(ctx, tables, q, softcap, share); err == nil {
		if ps, err = w.n.Wait(ctx); err == nil && w.n.chooses {
			w = w.n.inRoom(t, softcap)
		}
	}
	return ps, w, errors.Join(err, a.FreeTables(ctx, tables))
}

// inRoom reads what of a call's room the kernels that choose wrote: a part that an emulated device knows to be written, the rest is 0. Then it scans once more.
func (n *Answer) inRoom(t *testing.T, softcap float32) wrote {
	t.Helper()
	c, l := n.t.plan.choice, n.l
	out := make([]byte, l.end)
	get := func(at, size int) {
		do(t, n.a.device, func(x *cuda.Context) error {
			b, err := download(x, n.call.device+cuda.Ptr(at), size)
			copy(out[at:], b)
			return err
		})
	}
	var pages [][2]int // that there are: their numbers
	for head := range n.t.plan.Heads {
		x := c.of(head)
		for i := x[0]; i < x[1]; i++ {
			pages = append(pages, [2]int{i * candidatePages, int(c.tables[c.candidates+i*unitBytes+6]) / pageLeaves})
		}
	}
	blocks := (n.rows + warpRows - 1) / warpRows
	weighed := func() {
		for _, p := range pages {
			get(l.masses+4*p[0]*n.rows, 4*p[1]*n.rows)
			get(l.rules+8*p[0]*n.rows, 8*p[1]*n.rows)
		}
	}
	get(l.totals, 8*c.scanSplits*n.rows)
	get(l.tops, 4*len(c.pages)*n.rows)
	get(l.cuts, 4*len(c.pages)*n.rows)
	get(l.ranks, 8*c.numCandidates)
	get(l.chosen, 4*c.numCandidates)
	get(l.splits, splitBytes*(c.attended-c.first))
	for head := range n.t.plan.Heads {
		x := c.of(head)
		end := int(binary.LittleEndian.Uint32(out[l.splits+splitBytes*(x[7]-1)+8:]))
		get(l.units+unitBytes*x[5], unitBytes*(end-x[5]))
		get(l.numbers+4*x[5], 4*(end-x[5]))
	}
	for _, p := range pages {
		for i := range p[1] {
			if out[l.chosen+4*(p[0]/candidatePages)]>>i&1 == 1 {
				get(l.read+8*(p[0]+i)*blocks, 8*blocks)
			}
		}
	}
	get(l.ml+8*c.attended*n.rows, 8*(c.end-c.attended)*n.rows)
	get(l.out+4*c.attended*n.rows*n.t.plan.HeadDim, 4*(c.end-c.attended)*n.rows*n.t.plan.HeadDim)
	get(l.errors, unreadBytes*(c.end-c.attended)*n.rows)
	weighed()
	w := wrote{b: slices.Clone(out), n: n}
	do(t, n.a.device, func(x *cuda.Context) error {
		m, err := n.a.load(x, n.t.plan.HeadDim)
		if err == nil {
			if err = n.scan(x, m, softcap); err == nil {
				err = n.a.stream.Synchronize()
			}
		}
		return err
	})
	weighed()
	w.masses, w.rules = out[l.masses:l.rules], out[l.rules:l.totals]
	return w
}

// rangesOf reads merge's ranges.
func (c *choice) rangesOf(head int) (x [kinds + 1][2]int) {
	for i := range x {
		for j := range x[i] {
			x[i][j] = int(binary.LittleEndian.Uint32(c.tables[c.ranges+head*rangeBytes+8*i+4*j:]))
		}
	}
	return x
}

// of reads struct Choice.
func (c *choice) of(head int) (x [8]int) {
	for i := range x {
		x[i] = int(binary.LittleEndian.Uint32(c.tables[c.choices+head*choiceBytes+4*i:]))
	}
	return x
}

// near says whether a number is what it should be, up to a share of it or so much.
func near(got, want, share, much float64) bool {
	return math.Abs(got-want) <= share*math.Abs(want)+much
}

// chooses compares what the device scans, chooses, estimates and answers with plain Go, step by step: each step with what the one before wrote.
func chooses(t *testing.T, a *Attention, m shape, rows int, softcap float32, strength float64, share uint32, seed uint64) {
	t.Helper()
	rng := rand.New(rand.NewPCG(seed, 13))
	all := m.make(rng)
	if m.dealt {
		for _, s := range all {
			s.deal(rng)
		}
	}
	q := m.query(rng, rows, strength)
	warps := []int{1, 8, 64}[rng.IntN(3)]
	ps, w, err := answerChoosing(t, a, resident(t, a.device, all), Warps{warps, warps}, q, softcap, share)
	if err != nil {
		t.Fatalf("%+v, %d rows: %v", m, rows, err)
	}
	if !w.n.chooses {
		t.Fatalf("%+v: nothing is chosen", m)
	}
	c, l := w.n.t.plan.choice, w.n.l
	for head := range m.heads {
		x := c.of(head)
		pages := scanned(t, all, head, q[head*rows*m.d:(head+1)*rows*m.d], float64(softcap))
		scored(t, pages, all, head, q[head*rows*m.d:(head+1)*rows*m.d], float64(softcap))
		at := make([]int, 0, len(pages)) // of each page, its number
		for i := x[0]; i < x[1]; i++ {
			for p := range int(c.tables[c.candidates+i*unitBytes+6]) / pageLeaves {
				at = append(at, i*candidatePages+p)
			}
		}
		if len(at) != len(pages) || x[2] != len(pages) {
			t.Fatalf("%+v: %d pages, not %d", m, len(at), len(pages))
		}
		tops, totals := make([]float64, rows), make([]float64, rows)
		for r := range rows {
			tops[r] = math.Inf(-1)
			for i, p := range pages {
				mass := w.scanned(at[i]*rows + r)
				if !near(mass*math.Ln2, p.mass[r], 1e-4, 2e-3) {
					t.Fatalf("%+v, %d rows, head %d, row %d, page %d: mass %g, not %g", m, rows, head, r, i, mass*math.Ln2, p.mass[r])
				}
				if rule, noise := w.rule(at[i]*rows + r); !near(rule, p.rule[r], .01, 1e-6) || !near(noise, p.noised[r], .01, 1e-6) {
					t.Fatalf("%+v, row %d, page %d: rule %g, %g, not %g, %g", m, r, i, rule, noise, p.rule[r], p.noised[r])
				}
				tops[r] = max(tops[r], mass)
			}
			for _, n := range at {
				totals[r] += math.Exp2(w.scanned(n*rows+r) - tops[r])
			}
			totals[r] = tops[r] + math.Log2(totals[r])
			if top := w.float(l.tops, head*rows+r); len(pages) > 0 && top != tops[r] {
				t.Fatalf("%+v, row %d: the largest mass is %g, not %g", m, r, top, tops[r])
			}
		}
		ranks, taken := make([]int, len(pages)), make([]bool, len(pages))
		order := make([]int, len(pages))
		for i, n := range at {
			ranks[i] = int(binary.LittleEndian.Uint16(w.b[l.ranks+2*n:]))
			taken[i] = w.word(l.chosen, n/candidatePages)>>(n%candidatePages)&1 == 1
			least := math.Inf(1)
			for r := range rows {
				least = min(least, totals[r]-w.scanned(n*rows+r))
			}
			if want := 0xffff - min(0xffff, max(0, least*256)); math.Abs(float64(ranks[i])-want) > 1+least/1000 {
				t.Fatalf("%+v, page %d: rank %d, not %g", m, i, ranks[i], want)
			}
			order[i] = i
		}
		slices.SortStableFunc(order, func(i, j int) int { return ranks[j] - ranks[i] })
		for i, p := range order {
			if taken[p] != (i < chosen(len(pages), share)) {
				t.Fatalf("%+v, head %d: of %d pages %d are chosen, but of page %d of rank %d, the %d-th, it is %v", m, head, len(pages), chosen(len(pages), share), p, ranks[p], i, taken[p])
			}
		}
		w.cut(t, head, totals, ranks, order)
		w.listed(t, head, taken, at)
		w.gathered(t, head, pages, taken, at)
		w.estimated(t, head, pages, taken, at, tops)
		output, lse := w.answered(t, all, head, q, float64(softcap), pages, taken, at, ps)
		if output > mostError || lse > mostError {
			t.Fatalf("seed %d, %+v, %d rows, head %d: output errs by %.2g, log-sum-exp by %.2g", seed, m, rows, head, output, lse)
		}
	}
}

// listed checks the units and splits that choose wrote.
func (w wrote) listed(t *testing.T, head int, taken []bool, at []int) {
	t.Helper()
	c, l := w.n.t.plan.choice, w.n.l
	x := c.of(head)
	var want []byte
	var numbers []uint32
	for i := 0; i < len(at); i++ {
		if !taken[i] {
			continue
		}
		u := c.tables[c.candidates+at[i]/candidatePages*unitBytes:]
		begin := i
		for i+1 < len(at) && taken[i+1] && at[i+1]/candidatePages == at[begin]/candidatePages {
			i++
		}
		numbers = append(numbers, uint32(at[begin]))
		want = appendUnit(want, unit{binary.LittleEndian.Uint32(u), binary.LittleEndian.Uint16(u[4:]) + uint16(at[begin]%candidatePages*pageLeaves), uint8((i + 1 - begin) * pageLeaves), 0})
	}
	if got := w.b[l.units+unitBytes*x[5]:][:len(want)]; !slices.Equal(got, want) {
		t.Fatalf("head %d: units %v, not %v", head, got, want)
	}
	for i, want := range numbers {
		if got := w.word(l.numbers, x[5]+i); got != int(want) {
			t.Fatalf("head %d: unit %d begins with page %d, not %d", head, i, got, want)
		}
	}
	n := x[7] - x[6]
	for i := range n {
		for j, want := range []int{head, x[5] + i*(len(want)/unitBytes)/n, x[5] + (i+1)*(len(want)/unitBytes)/n} {
			if got := w.word(l.splits+splitBytes*(x[6]+i), j); got != want {
				t.Fatalf("head %d: number %d of split %d of %d is %d, not %d", head, j, i, n, got, want)
			}
		}
	}
}

// cut checks the least score of tokens that are read. order has the pages by rank.
func (w wrote) cut(t *testing.T, head int, totals []float64, ranks, order []int) {
	t.Helper()
	n := chosen(len(order), w.n.share)
	for r, total := range totals {
		want := -1e30
		if n < len(order) {
			want = total - float64(0xffff-ranks[order[n-1]])/256 - 6
		}
		if got := w.float(w.n.l.cuts, head*len(totals)+r); !near(got, want, 1e-6, 1e-3) {
			t.Fatalf("head %d, row %d: tokens are read from a score of %g on, not %g", head, r, got, want)
		}
	}
}

// gathered checks which tokens of the chosen pages were read, to the last one but those whose score is next to the cut, and what is left of their pages.
func (w wrote) gathered(t *testing.T, head int, pages []*pageOf, taken []bool, at []int) {
	t.Helper()
	l, rows := w.n.l, w.n.rows
	for i, p := range pages {
		if !taken[i] {
			for r := range rows {
				if w.float(l.masses, at[i]*rows+r) != w.scanned(at[i]*rows+r) {
					t.Fatalf("head %d, row %d: the mass of page %d, which was not chosen, is another one", head, r, i)
				}
			}
			continue
		}
		for first := 0; first < rows; first += warpRows {
			read, end := w.read(at[i], first), min(first+warpRows, rows)
			for token := range tiers.PageTokens {
				above, close := false, false
				for r := first; r < end; r++ {
					cut := w.float(l.cuts, head*rows+r)
					by := p.scores[r][token] - cut
					above = above || by >= 0
					close = close || near(p.scores[r][token], cut, 1e-4, 2e-3)
				}
				if got := read>>token&1 == 1; got != above && !close {
					t.Fatalf("head %d, rows %d on, page %d: token %d is read: %v, not %v", head, first, i, token, got, above)
				}
			}
			for r := first; r < end && read != math.MaxUint64; r++ {
				cut, weights, squares := w.float(l.cuts, head*rows+r), 0., 0.
				for token, score := range p.scores[r] {
					if read>>token&1 == 0 {
						y := math.Exp2(score - cut)
						weights, squares = weights+y, squares+y*y
					}
				}
				mass, rule, noise := w.float(l.masses, at[i]*rows+r), w.float(l.rules, 2*(at[i]*rows+r)), w.float(l.rules, 2*(at[i]*rows+r)+1)
				if weights < 0x1p-39 && mass < cut-39 {
					continue // nothing
				}
				if !near(mass, cut+math.Log2(weights), 1e-4, 4e-3) || !near(rule, squares/(weights*weights), .01, 1e-6) || noise != 0 {
					t.Fatalf("head %d, row %d, page %d: what was not read weighs %g, ruled by %g and %g, not %g, %g", head, r, i, mass, rule, noise,
						cut+math.Log2(weights), squares/(weights*weights))
				}
			}
		}
	}
}

// left says how many of a page's tokens were not read for a row.
func (w wrote) left(taken bool, page, row int) int {
	if !taken {
		return tiers.PageTokens
	}
	return tiers.PageTokens - bits.OnesCount64(w.read(page, row))
}

// estimated checks what rest wrote: its splits together.
func (w wrote) estimated(t *testing.T, head int, pages []*pageOf, taken []bool, at []int, tops []float64) {
	t.Helper()
	c, l, rows, d := w.n.t.plan.choice, w.n.l, w.n.rows, w.n.t.plan.HeadDim
	lo, hi := c.rangesOf(head)[kinds][0], c.rangesOf(head)[kinds][1]
	for r := range rows {
		want, got := make([]float64, d+4), make([]float64, d+4) // weights, errors, tokens, values
		scale := 0.
		for i, p := range pages {
			left := w.left(taken[i], at[i], r)
			if left == 0 {
				continue
			}
			want[3] += float64(left)
			weight := math.Exp2(w.float(l.masses, at[i]*rows+r) - tops[r])
			want[0] += weight
			want[1] += weight * weight * w.float(l.rules, 2*(at[i]*rows+r)) * p.spread
			want[2] += weight * weight * w.float(l.rules, 2*(at[i]*rows+r)+1)
			for j, y := range p.mean {
				want[4+j] += weight * y
				scale += weight * math.Abs(y)
			}
		}
		for s := lo; s < hi; s++ {
			if top := w.float(l.ml, 2*(s*rows+r)); top != tops[r] {
				t.Fatalf("split %d, row %d: unit %g, not %g", s, r, top, tops[r])
			}
			got[0] += w.float(l.ml, 2*(s*rows+r)+1)
			for j := range 3 {
				got[1+j] += w.float(l.errors, 3*((s-c.attended)*rows+r)+j)
			}
			for j := range d {
				got[4+j] += w.float(l.out, (s*rows+r)*d+j)
			}
		}
		for j := range want {
			much := 1e-30
			if j >= 4 {
				much = 1e-4 * scale
			}
			if !near(got[j], want[j], 1e-4, much) {
				t.Fatalf("head %d, row %d: number %d of what stands for others is %g, not %g", head, r, j, got[j], want[j])
			}
		}
	}
}

// answered compares partials with attention in float64 to what was read, and to pages' mean values by masses for what was not.
func (w wrote) answered(t *testing.T, segments []*sealed, head int, q []float32, softcap float64, pages []*pageOf, taken []bool, at []int, ps []attention.Partial) (output, lse float64) {
	t.Helper()
	l, rows, d := w.n.l, w.n.rows, w.n.t.plan.HeadDim
	number := map[[2]int]int{}
	for i, p := range pages {
		number[[2]int{p.seg, p.page}] = i
	}
	keys, values := make([][]float32, len(segments)), make([][]float32, len(segments))
	for n, s := range segments {
		view := s.view(head)
		keys[n], values[n] = make([]float32, view.Stored()*d), make([]float32, view.Stored()*d)
		if err := view.Keys(keys[n], s.of(head)); err != nil {
			t.Fatal(err)
		}
		view.Values(values[n], s.of(head))
	}
	var k, v []float32
	var outs [][]float64
	var lses []float64
	for r := range rows {
		if r%warpRows == 0 {
			k, v = nil, nil
			for n, s := range segments {
				for i := range s.view(head).Stored() {
					p, candidate := number[[2]int{n, i / tiers.PageTokens}]
					if !candidate || taken[p] && w.read(at[p], r)>>(i%tiers.PageTokens)&1 == 1 {
						k, v = append(k, keys[n][i*d:(i+1)*d]...), append(v, values[n][i*d:(i+1)*d]...)
					}
				}
			}
		}
		out, all := make([]float64, d), math.Inf(-1)
		if len(k) > 0 {
			out, all = row(q[(head*rows+r)*d:][:d], k, v, softcap)
		}
		for i, p := range pages {
			if w.left(taken[i], at[i], r) == 0 {
				continue
			}
			mass := w.float(l.masses, at[i]*rows+r) * math.Ln2
			both := max(all, mass) + math.Log1p(math.Exp(-math.Abs(all-mass)))
			for j := range out {
				out[j] = out[j]*math.Exp(all-both) + p.mean[j]*math.Exp(mass-both)
			}
			all = both
		}
		x := make([]float32, d)
		for j := range out {
			x[j] = float32(out[j])
		}
		compress.Unrotate(x, d)
		for j := range out {
			out[j] = float64(x[j])
		}
		outs, lses = append(outs, out), append(lses, all)
	}
	return differs(ps[head*rows:(head+1)*rows], outs, lses)
}

// TestChoose compares what is chosen, and the answers, with plain Go: random shapes, each head dimension, rows and shares.
func TestChoose(t *testing.T) {
	a := newAttention(t, cudatest.Open(t))
	for _, d := range HeadDims {
		t.Run(fmt.Sprint(d), func(t *testing.T) {
			rng := rand.New(rand.NewPCG(uint64(d), 14))
			ask := func(m shape, rows int, share float64) {
				t.Helper()
				m.d = d
				softcap := float32(0)
				if m.heads == 0 {
					m.heads = 1
				}
				if m.profile == 0 {
					m.profile = tiers.ProfileBalanced
				}
				if rng.IntN(4) == 0 {
					softcap = float32(5 + rng.IntN(40))
				}
				chooses(t, a, m, rows, softcap, 5*rng.Float64(), uint32(share*Everything), rng.Uint64())
			}
			ask(shape{tokens: []int{900, 64, 700}, heads: 2}, 1+rng.IntN(4), .2)
			ask(shape{tokens: []int{500, 130, 200}, profile: tiers.ProfileNeutral}, 9+rng.IntN(9), .5)
			ask(shape{tokens: []int{700}, low: true, hide: true, dealt: true}, 8, 1./Everything)
			if testing.Short() {
				return
			}
			if d == 64 { // more candidates than choose has threads, many of which weigh the same
				ask(shape{tokens: []int{2048, 2048}, copies: 35}, 2, .3)
			}
			for i := range 6 {
				ask(shape{tokens: []int{1 + rng.IntN(900), 64 + rng.IntN(900)}, dealt: i%2 == 1}, 1+rng.IntN(17), rng.Float64())
			}
			ask(shape{tokens: []int{2048, 2048}}, 4, .1)
			ask(shape{tokens: []int{2048}, sinks: tiers.SinkTokens}, 32, .99)
			for _, m := range []shape{{keys: 0x1p-90}, {keys: 0x1p100}, {values: 0x1p-60}, {values: 0x1p60}, {constant: true}, {flat: true}} {
				m.tokens = []int{330, 290}
				ask(m, 3, .3)
			}
		})
	}
}
