package kernels

import (
	"encoding/binary"
	"math"
	"slices"

	"kvtier/attention"
	"kvtier/tiers"
	"kvtier/tiers/gpu/cuda"
	"kvtier/tiers/seal"
)

// Everything is the share of pages, in 2^-16, with which nothing is chosen: all is read.
const Everything = 1 << 16

// MostRows is how many query rows of a head can choose together.
const MostRows = 32

// The tables of select.cu: the sizes of their entries in bytes.
const (
	choiceBytes    = 32
	candidatePages = tiers.StepTokens / tiers.PageTokens
	mostRests      = 128 // splits of a head's estimates
	chooseThreads  = 512
)

// choice is how pages are chosen from: whole ones of bodies. All other units are attended in any case.
type choice struct {
	tables                                                   []byte
	choices, candidates, scans, rests, always, fixed, ranges int   // where they begin; always: units, fixed: splits of them
	pages                                                    []int // that each head chooses from
	units                                                    int   // that are listed at most
	scanSplits                                               int
	first, attended, end                                     int   // splits: the first that is listed, and where those and the estimates' end
	kind                                                     int   // of all units but drains
	scanned                                                  int64 // bytes that scanning reads
	numCandidates                                            int
}

// newChoice divides the work: that of scanning among twice as many warps as attend has. It returns nil if there is nothing to choose from, or if
// all bits are known of some segments only. Splits are, in this order, those of drains, as in the plan, those of what else is attended in any case, those of pages
// that are chosen, and those of estimates. ranges are the plan's.
func newChoice(p *Plan, segments []Segment, warps Warps, ranges []byte) *choice {
	c := &choice{kind: most}
	of := warps.Most
	if segments[0].Low {
		c.kind, of = full, warps.Full
	}
	var candidates, scans, rests []byte
	var choices []uint32
	// Drains' units are the plan's first, and so are their splits.
	drained := 0
	if n := p.ends[drains]; n > 0 {
		drained = int(binary.LittleEndian.Uint32(p.tables[p.splits+splitBytes*n-4:]))
	}
	always, fixed := slices.Clone(p.tables[p.units:p.units+drained*unitBytes]), slices.Clone(p.tables[p.splits:p.splits+p.ends[drains]*splitBytes])
	parts := make([][kinds + 1][2]int, p.Heads) // by head, of splits: merge's ranges
	for head := range p.Heads {
		firstCandidate, firstAlways, firstScan, pages := len(candidates)/unitBytes, len(always)/unitBytes, len(scans)/splitBytes, 0
		for i, s := range segments {
			if s.Low != segments[0].Low {
				return nil
			}
			n, view := uint32(head*len(segments)+i), seal.View{D: p.HeadDim, Info: s.Header.Heads[head]}
			whole := view.Info.Body / tiers.PageTokens
			pages += whole
			for lo := 0; lo < whole; lo += candidatePages {
				candidates = appendUnit(candidates, unit{n, uint16(lo * pageLeaves), uint8(min(candidatePages, whole-lo) * pageLeaves), 0})
			}
			add := func(kind int, u unit) {
				if u.segment = n; kind != drains {
					always = appendUnit(always, u)
				}
			}
			addRun(add, view, s.Low, whole*tiers.PageTokens, view.Info.Body, tiers.StepTokens)
			addRun(add, view, s.Low, view.Info.Body, view.Stored(), tiers.StepTokens)
			for _, plane := range []tiers.Plane{tiers.PlaneSteps, tiers.PlaneK1, tiers.PlanePages} {
				_, b, _ := s.Header.Piece(head, plane)
				c.scanned += int64(b)
			}
		}
		n := len(candidates)/unitBytes - firstCandidate
		scans = appendSplits(scans, head, firstCandidate, n, 2*of/p.Heads)
		part := &parts[head]
		part[0] = [2]int{int(binary.LittleEndian.Uint32(ranges[head*rangeBytes:])), int(binary.LittleEndian.Uint32(ranges[head*rangeBytes+4:]))}
		part[1][0] = len(fixed) / splitBytes
		fixed = appendSplits(fixed, head, firstAlways, len(always)/unitBytes-firstAlways, of/p.Heads)
		part[1][1] = len(fixed) / splitBytes
		part[3][0] = len(rests) / splitBytes
		rests = appendSplits(rests, head, firstCandidate, n, min(2*of/p.Heads, mostRests))
		part[3][1] = len(rests) / splitBytes
		listed := max(1, min(of/p.Heads, 2*n)/blockSplits) * blockSplits
		part[2] = [2]int{c.attended, c.attended + listed} // for now from 0 on, as the estimates'
		for _, x := range []int{firstCandidate, firstCandidate + n, pages, firstScan, len(scans) / splitBytes, c.units, c.attended, c.attended + listed} {
			choices = append(choices, uint32(x))
		}
		c.attended += listed
		c.units += 2 * n // runs of a candidate's pages: two at most
		c.pages = append(c.pages, pages)
	}
	if c.numCandidates = len(candidates) / unitBytes; c.numCandidates == 0 {
		return nil
	}
	c.first = len(fixed) / splitBytes
	c.attended += c.first
	c.scanSplits, c.end = len(scans)/splitBytes, c.attended+len(rests)/splitBytes
	words := func(all ...uint32) (b []byte) {
		for _, x := range all {
			b = binary.LittleEndian.AppendUint32(b, x)
		}
		return b
	}
	var merged []byte // ranges, as merge has them
	for _, x := range parts {
		for i, from := range []int{0, 0, c.first, c.attended} {
			merged = append(merged, words(uint32(from+x[i][0]), uint32(from+x[i][1]))...)
		}
	}
	for _, t := range []struct {
		at *int
		b  []byte
	}{{&c.choices, words(choices...)}, {&c.candidates, candidates}, {&c.always, always}, {&c.scans, scans}, {&c.rests, rests}, {&c.fixed, fixed}, {&c.ranges, merged}} {
		*t.at = len(c.tables)
		c.tables = append(c.tables, t.b...)
	}
	return c
}

// chosen is how many of so many pages a share of 2^16 is, as choose has it.
func chosen(pages int, share uint32) int { return (pages*int(share) + Everything - 1) >> 16 }

// Chooses says whether pages are chosen at all with a share of 2^16.
func (p *Plan) Chooses(share uint32) bool { return p.choice != nil && share < Everything }

// Cost is what attending to so many rows a head with a share of the pages read: tokens that were scanned, read, and estimated, over KV heads and on average over the
// blocks of rows that share what is read; and bytes. unread is the answer's.
func (p *Plan) Cost(rows int, share uint32, unread []Unread) (scanned, read, estimated, bytes int64) {
	if !p.Chooses(share) {
		return p.Tokens, p.Tokens, 0, p.BytesFor(rows)
	}
	blocks := int64((rows + warpRows - 1) / warpRows)
	for i := range unread {
		if i%rows%warpRows == 0 {
			estimated += int64(unread[i].Tokens)
		}
	}
	left := p.Tokens // of which keys are read
	for _, n := range p.choice.pages {
		left -= tiers.PageTokens * int64(n-chosen(n, share))
	}
	row := int64(p.HeadDim / 2) // of a value's codes
	if p.choice.kind == full {
		row *= 2
	}
	bytes = blocks*(p.choice.scanned+int64(float64(p.Bytes)*float64(left)/float64(p.Tokens))) - row*(estimated-blocks*(p.Tokens-left))
	estimated /= blocks
	return p.Tokens, p.Tokens - estimated, estimated, bytes
}

// choosing is where a choice's tables lie in a call's room, in bytes.
type choosing struct {
	masses, rules, totals, tops, cuts, ranks, chosen, units, numbers, splits, read, errors int
}

func (c *choice) layout(rows int, next func(int) int) (l choosing) {
	pages := candidatePages * c.numCandidates
	l.masses, l.rules = next(4*pages*rows), next(8*pages*rows)
	l.totals, l.tops, l.cuts = next(8*c.scanSplits*rows), next(4*len(c.pages)*rows), next(4*len(c.pages)*rows)
	l.ranks, l.chosen = next(8*c.numCandidates), next(4*c.numCandidates)
	l.units, l.numbers, l.splits = next(unitBytes*c.units), next(4*c.units), next(splitBytes*(c.attended-c.first))
	l.read = next(8 * pages * ((rows + warpRows - 1) / warpRows))
	l.errors = next(unreadBytes * (c.end - c.attended) * rows)
	return l
}

// launchChosen starts the kernels that choose, and attend to what was chosen.
func (n *Answer) launchChosen(c *cuda.Context, m *module, softcap float32) error {
	p, l, s := n.t.plan, n.l, n.a.stream
	x, at := p.choice, l.choosing
	tables, room := uint64(n.t.at), uint64(n.call.device)
	choices := tables + uint64(p.choiceAt())
	of := func(table int) uint64 { return choices + uint64(table) }
	in := func(part int) uint64 { return room + uint64(part) }
	rows := uint64(n.rows)
	eight := (n.rows + warpRows - 1) / warpRows // blocks of rows
	if err := n.scan(c, m, softcap); err != nil {
		return err
	}
	if err := c.Launch(m.choose, [3]int{p.Heads, 1, 1}, [3]int{chooseThreads, 1, 1}, 0, s, of(x.choices), of(x.candidates), in(at.masses), in(at.totals),
		in(at.ranks), in(at.chosen), in(at.units), in(at.numbers), in(at.splits), in(at.tops), in(at.cuts), rows, uint64(n.share)); err != nil {
		return err
	}
	attend, attendShared, gather, shared, more := m.attend, m.shared, m.chosen, m.chosenShared, []uint64{uint64(p.ends[drains] / blockSplits)}
	if x.kind == full {
		attend, attendShared, gather, shared, more = m.low, m.lowShared, m.chosenLow, m.chosenLowShared, nil
	}
	if err := n.attend(c, attend, attendShared, of(x.always), of(x.fixed), 0, x.first, softcap, more...); err != nil {
		return err
	}
	// What is listed has partials of its own, behind the others'.
	if err := c.Launch(gather, [3]int{(x.attended - x.first) / blockSplits, eight, 1}, [3]int{attendThreads, 1, 1}, shared, s, tables, in(at.units), in(at.splits), in(l.q),
		in(l.ml+8*x.first*n.rows), in(l.out+4*x.first*n.rows*p.HeadDim), 0, rows, uint64(math.Float32bits(softcap)),
		in(at.numbers), in(at.cuts), in(at.masses), in(at.rules), in(at.read)); err != nil {
		return err
	}
	if err := c.Launch(m.rest, [3]int{(x.end - x.attended) / blockSplits, eight, 1}, [3]int{attendThreads, 1, 1}, 0, s, tables, of(x.candidates), of(x.rests), in(at.chosen),
		in(at.read), in(at.masses), in(at.rules), in(at.tops), in(l.ml+8*x.attended*n.rows), in(l.out+4*x.attended*n.rows*p.HeadDim), in(at.errors), rows); err != nil {
		return err
	}
	return n.merge(c, m, of(x.ranges), in(at.errors), x.attended)
}

// scan starts the kernel that weighs pages.
func (n *Answer) scan(c *cuda.Context, m *module, softcap float32) error {
	x, at, tables, room := n.t.plan.choice, n.l.choosing, uint64(n.t.at), uint64(n.call.device)
	choices := tables + uint64(n.t.plan.choiceAt())
	return c.Launch(m.scan, [3]int{x.scanSplits / blockSplits, (n.rows + warpRows - 1) / warpRows, 1}, [3]int{attendThreads, 1, 1}, 0, n.a.stream,
		tables, choices+uint64(x.candidates), choices+uint64(x.scans), room+uint64(n.l.q), room+uint64(at.masses), room+uint64(at.rules), room+uint64(at.totals),
		uint64(n.rows), uint64(math.Float32bits(softcap)))
}

// Unread is what the error of an answer's row comes from where values were not read: sums over these tokens of the squares of their weights, times the spread
// of values around their page's mean, and as far as the weights are not known; and how many tokens they are, the same for all of a block of 8 rows. The unit of
// weights is that of the row's Partial.
type Unread struct{ Values, Weights, Tokens float32 }

// unreadBytes is the size of an Unread on the device.
const unreadBytes = 12

// Error estimates how far the output of p, the row's, lies from that of everything, as a distance; +Inf if nobody knows.
func (u Unread) Error(p *attention.Partial) float64 {
	norm2 := 0.
	for _, x := range p.Out {
		norm2 += float64(x) * float64(x)
	}
	// A mean value lies as far from the output as both are long, about; that of the mean is in the spread.
	e := math.Sqrt(float64(u.Values)+2*float64(u.Weights)*norm2/(p.Sum*p.Sum)) / p.Sum
	if math.IsNaN(e) {
		return math.Inf(1)
	}
	return e
}

// Unread returns, after Wait, what of each row [heads][rows] was not read; nil if nothing was chosen.
func (n *Answer) Unread() []Unread { return n.unread }

// unreadOf takes over what the device wrote.
func unreadOf(x []float32) []Unread {
	out := make([]Unread, 4*len(x)/unreadBytes)
	for i := range out {
		out[i] = Unread{x[3*i], x[3*i+1], x[3*i+2]}
	}
	return out
}
