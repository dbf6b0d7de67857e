package kernels

import (
	"encoding/binary"
	"math"

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
	choiceBytes    = 40
	candidatePages = tiers.StepTokens / tiers.PageTokens
	mostRests      = 128 // splits of a head's estimates
	chooseThreads  = 512
)

// choice is how pages are chosen from: whole ones of bodies. All other units are attended in any case.
type choice struct {
	tables                                            []byte
	choices, candidates, always, scans, rests, ranges int   // where they begin
	pages                                             []int // that each head chooses from
	units                                             int   // that are listed at most
	scanSplits                                        int
	first, attended, end                              int   // splits: the first that is listed, and where those and the estimates' end
	kind                                              int   // of all units but drains
	scanned                                           int64 // bytes that scanning reads
	numCandidates                                     int
}

// newChoice divides the work: that of scanning among twice as many warps as attend has. It returns nil if there is nothing to choose from, or if
// all bits are known of some segments only. Drains' splits are those of the plan, whose ranges by head are given.
func newChoice(p *Plan, segments []Segment, warps Warps, ranges []byte) *choice {
	c := &choice{first: p.ends[drains], kind: most}
	of := warps.Most
	if segments[0].Low {
		c.kind, of = full, warps.Full
	}
	var candidates, always, scans, rests []byte
	c.attended = c.first
	var choices []uint32
	var parts [][4]int // by head, of splits: what is listed, [first, end), and estimates, from the first of these on
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
		part := [4]int{c.attended, 0, len(rests) / splitBytes, 0}
		rests = appendSplits(rests, head, firstCandidate, n, min(2*of/p.Heads, mostRests))
		fixed := len(always)/unitBytes - firstAlways
		c.attended += max(1, min(of/p.Heads, fixed+2*n)/blockSplits) * blockSplits
		part[1], part[3] = c.attended, len(rests)/splitBytes
		parts = append(parts, part)
		for _, x := range []int{firstCandidate, firstCandidate + n, pages, firstAlways, firstAlways + fixed, firstScan, len(scans) / splitBytes, c.units, part[0], part[1]} {
			choices = append(choices, uint32(x))
		}
		c.units += fixed + 2*n // runs of a candidate's pages: two at most
		c.pages = append(c.pages, pages)
	}
	if c.numCandidates = len(candidates) / unitBytes; c.numCandidates == 0 {
		return nil
	}
	c.scanSplits, c.end = len(scans)/splitBytes, c.attended+len(rests)/splitBytes
	words := func(all ...uint32) (b []byte) {
		for _, x := range all {
			b = binary.LittleEndian.AppendUint32(b, x)
		}
		return b
	}
	var merged []byte // ranges, as merge has them
	for head, x := range parts {
		merged = append(merged, ranges[head*rangeBytes:][:8]...)
		merged = append(merged, words(uint32(x[0]), uint32(x[1]), uint32(c.attended+x[2]), uint32(c.attended+x[3]))...)
	}
	for _, t := range []struct {
		at *int
		b  []byte
	}{{&c.choices, words(choices...)}, {&c.candidates, candidates}, {&c.always, always}, {&c.scans, scans}, {&c.rests, rests}, {&c.ranges, merged}} {
		*t.at = len(c.tables)
		c.tables = append(c.tables, t.b...)
	}
	return c
}

// chosen is how many of so many pages a share of 2^16 is, as choose has it.
func chosen(pages int, share uint32) int { return (pages*int(share) + Everything - 1) >> 16 }

// Chooses says whether pages are chosen at all with a share of 2^16.
func (p *Plan) Chooses(share uint32) bool { return p.choice != nil && share < Everything }

// Cost is what attending with a share of the pages reads: tokens that are scanned, read, and estimated, over KV heads; and bytes, for so many query
// rows a head.
func (p *Plan) Cost(rows int, share uint32) (scanned, read, estimated, bytes int64) {
	if !p.Chooses(share) {
		return p.Tokens, p.Tokens, 0, p.BytesFor(rows)
	}
	for _, n := range p.choice.pages {
		estimated += tiers.PageTokens * int64(n-chosen(n, share))
	}
	read = p.Tokens - estimated
	each := p.choice.scanned + int64(float64(p.Bytes)*float64(read)/float64(p.Tokens))
	return p.Tokens, read, estimated, each * int64((rows+warpRows-1)/warpRows)
}

// choosing is where a choice's tables lie in a call's room, in bytes.
type choosing struct{ masses, rules, totals, tops, ranks, chosen, units, splits, errors int }

func (c *choice) layout(rows int, next func(int) int) (l choosing) {
	pages := candidatePages * c.numCandidates
	l.masses, l.rules = next(4*pages*rows), next(8*pages*rows)
	l.totals, l.tops = next(8*c.scanSplits*rows), next(4*len(c.pages)*rows)
	l.ranks, l.chosen = next(8*c.numCandidates), next(4*c.numCandidates)
	l.units, l.splits = next(unitBytes*c.units), next(splitBytes*c.attended)
	l.errors = next(8 * (c.end - c.attended) * rows)
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
	rows, capped := uint64(n.rows), uint64(math.Float32bits(softcap))
	eight := (n.rows + warpRows - 1) / warpRows // blocks of rows
	launch := func(f cuda.Function, blocks, rows, threads int, args ...uint64) error {
		return c.Launch(f, [3]int{blocks, rows, 1}, [3]int{threads, 1, 1}, 0, s, args...)
	}
	if err := launch(m.scan, x.scanSplits/blockSplits, eight, attendThreads,
		tables, of(x.candidates), of(x.scans), in(l.q), in(at.masses), in(at.rules), in(at.totals), rows, capped); err != nil {
		return err
	}
	if err := launch(m.choose, p.Heads, 1, chooseThreads, of(x.choices), of(x.candidates), of(x.always), in(at.masses), in(at.totals),
		in(at.ranks), in(at.chosen), in(at.units), in(at.splits), in(at.tops), rows, uint64(n.share)); err != nil {
		return err
	}
	if err := launch(m.rest, (x.end-x.attended)/blockSplits, eight, attendThreads, tables, of(x.candidates), of(x.rests), in(at.chosen), in(at.masses), in(at.rules),
		in(at.tops), in(l.ml+8*x.attended*n.rows), in(l.out+4*x.attended*n.rows*p.HeadDim), in(at.errors), rows); err != nil {
		return err
	}
	if err := n.attend(c, m.attend, m.shared, tables+uint64(p.units), tables+uint64(p.splits), 0, x.first, softcap, uint64(x.first/blockSplits)); err != nil {
		return err
	}
	f, shared, more := m.attend, m.shared, []uint64{0} // no drains
	if x.kind == full {
		f, shared, more = m.low, m.lowShared, nil
	}
	if err := n.attend(c, f, shared, in(at.units), in(at.splits), x.first, x.attended, softcap, more...); err != nil {
		return err
	}
	return n.merge(c, m, of(x.ranges), in(at.errors), x.attended)
}

// Unread is what the error of an answer's row comes from where pages were not read: sums over them of the squares of their tokens' weights, times the spread
// of values around their page's mean, and as far as the weights are not known. The unit of weights is that of the row's Partial.
type Unread struct{ Values, Weights float32 }

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

// Unread returns, after Wait, what of each row [heads][rows] was not read; nil if all was.
func (n *Answer) Unread() []Unread { return n.unread }

// unreadOf takes over what the device wrote.
func unreadOf(x []float32) []Unread {
	out := make([]Unread, len(x)/2)
	for i := range out {
		out[i] = Unread{x[2*i], x[2*i+1]}
	}
	return out
}
