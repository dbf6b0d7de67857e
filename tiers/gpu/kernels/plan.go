package kernels

import (
	"encoding/binary"

	"kvtier/tiers"
	"kvtier/tiers/seal"
)

// HeadDims are the head dimensions that there are kernels for.
var HeadDims = []int{64, 128, 256}

// Segment is a sealed segment in device memory.
type Segment struct {
	Header *tiers.Header
	// Low says that bits 5 to 8 are there.
	Low bool
	// At returns the address of a plane of a head; 0 if it is not there.
	At func(head int, p tiers.Plane) Address
}

// Address is one in device memory. It is a multiple of 64.
type Address = uint64

// Planes returns the planes that have to be in device memory for a segment to be attended there: what is read, and what pages are chosen by.
func Planes(low bool) tiers.PlaneSet {
	s := tiers.PlaneSet(1<<tiers.PlaneSteps | 1<<tiers.PlaneK1 | 1<<tiers.PlaneK2 | 1<<tiers.PlaneK3 | 1<<tiers.PlaneK4 | 1<<tiers.PlaneV4 | 1<<tiers.PlanePages)
	if low {
		return s | tiers.LowPlanes
	}
	return s | 1<<tiers.PlaneDrains
}

// Supported says whether there are kernels for what a segment holds: quantised
// rows of one of HeadDims. Rows that are stored lossless are read by the host.
func Supported(h *tiers.Header) bool {
	if h.Profile == tiers.ProfileExact {
		return false
	}
	tokens := 0
	for _, x := range h.Heads {
		tokens += x.Body + x.Outliers
	}
	if tokens == 0 {
		return false // a window
	}
	for _, d := range HeadDims {
		if h.HeadDim == d {
			return true
		}
	}
	return false
}

// The tables of segments.h: the sizes of their entries in bytes.
const (
	segmentBytes = 88
	unitBytes    = 8
	splitBytes   = 12
	rangeBytes   = 8 * 4 // of merge
	pageLeaves   = tiers.PageTokens / tiers.LeafTokens
)

// The kinds of units, in the order of their splits: drains of which more is known than of the tokens beside them, tokens of
// which most bits are known, and tokens of which all are.
const (
	drains = iota
	most
	full
	kinds
)

// unit is struct Unit of segments.h.
type unit struct {
	segment      uint32
	leaf         uint16
	leaves, skip uint8
}

// Plan says how the attention of one layer is divided among warps: the tables that kernels read. It
// holds for the segments that it was made of, wherever queries come from.
type Plan struct {
	HeadDim, Heads int
	// Tokens are those of all heads. Bytes is what they take.
	Tokens, Bytes int64

	tables                []byte     // segments, units, splits, ranges
	units, splits, ranges int        // where they begin
	ends                  [kinds]int // of the splits of each kind, by number
	choice                *choice    // or nil: nothing can be chosen
}

// Warps is how many warps a device holds at a time of the kernel for tokens of which most bits are known, and of that for tokens of
// which all are.
type Warps struct{ Most, Full int }

// NewPlan divides segments, which have the same heads, among so many warps at most. There is at least one segment.
func NewPlan(segments []Segment, warps Warps) *Plan {
	h := segments[0].Header
	p := &Plan{HeadDim: h.HeadDim, Heads: len(h.Heads)}
	var lists [kinds][][]unit
	for kind := range lists {
		lists[kind] = make([][]unit, p.Heads)
	}
	of := [kinds]int{warps.Most, warps.Most, warps.Full}
	tokens := unitTokens(segments, max(warps.Most, warps.Full))
	for head := range p.Heads {
		for _, s := range segments {
			n := uint32(len(p.tables) / segmentBytes)
			view := seal.View{D: p.HeadDim, Info: s.Header.Heads[head]}
			p.tables = appendSegment(p.tables, &s, head, view)
			addUnits(func(kind int, u unit) {
				u.segment = n
				lists[kind][head] = append(lists[kind][head], u)
			}, view, s.Low, tokens)
			p.count(&s, head, view)
		}
	}
	p.units = len(p.tables)
	var splits []byte
	ranges := make([]byte, p.Heads*rangeBytes)
	first := 0
	for kind := range lists {
		for head, units := range lists[kind] {
			for _, u := range units {
				p.tables = appendUnit(p.tables, u)
			}
			begin := len(splits) / splitBytes
			splits = appendSplits(splits, head, first, len(units), of[kind]/p.Heads)
			first += len(units)
			r := ranges[head*rangeBytes+8*kind:]
			binary.LittleEndian.PutUint32(r, uint32(begin))
			binary.LittleEndian.PutUint32(r[4:], uint32(len(splits)/splitBytes))
		}
		p.ends[kind] = len(splits) / splitBytes
	}
	p.splits = len(p.tables)
	p.tables = append(p.tables, splits...)
	p.ranges = len(p.tables)
	p.tables = append(p.tables, ranges...)
	p.choice = newChoice(p, segments, warps, ranges)
	return p
}

// Bytes of all tables together, those of the choice behind the others.
func (p *Plan) tableBytes() int {
	if p.choice == nil {
		return len(p.tables)
	}
	return p.choiceAt() + len(p.choice.tables)
}

// choiceAt is where the choice's tables begin.
func (p *Plan) choiceAt() int { return (len(p.tables) + 7) &^ 7 }

// BytesFor is what attending reads for so many query rows a head: up to 8 share each byte.
func (p *Plan) BytesFor(rows int) int64 { return p.Bytes * int64((rows+warpRows-1)/warpRows) }

// unitTokens is how many tokens a unit has at most: fewer than share bins where warps would have nothing to do otherwise.
func unitTokens(segments []Segment, warps int) int {
	all := 0
	for _, s := range segments {
		for _, h := range s.Header.Heads {
			all += h.Body + h.Outliers
		}
	}
	n := tiers.StepTokens
	for n > tiers.PageTokens && all/n < warps {
		n /= 2
	}
	return n
}

// count adds a head of a segment up.
func (p *Plan) count(s *Segment, head int, view seal.View) {
	p.Tokens += int64(view.Stored())
	for plane := range tiers.NumPlanes {
		if _, n, ok := s.Header.Piece(head, plane); ok && plane != tiers.PlanePages && Planes(s.Low).Has(plane) {
			p.Bytes += int64(n)
		}
	}
}

// appendSegment appends struct Segment of segments.h.
func appendSegment(b []byte, s *Segment, head int, view seal.View) []byte {
	k8, v8, lowLeaf := s.At(head, tiers.PlaneK8), s.At(head, tiers.PlaneV8), 0
	if !s.Low && view.Drains() > 0 {
		lowLeaf = view.Info.Body / tiers.LeafTokens
		k8 = s.At(head, tiers.PlaneDrains)
		v8 = k8 + uint64(view.DrainKeys().Len)
	}
	for _, p := range []tiers.Plane{tiers.PlaneSteps, tiers.PlaneK1, tiers.PlaneK2, tiers.PlaneK3, tiers.PlaneK4} {
		b = binary.LittleEndian.AppendUint64(b, s.At(head, p))
	}
	b = binary.LittleEndian.AppendUint64(b, k8)
	b = binary.LittleEndian.AppendUint64(b, s.At(head, tiers.PlaneV4))
	b = binary.LittleEndian.AppendUint64(b, v8)
	b = binary.LittleEndian.AppendUint64(b, s.At(head, tiers.PlanePages))
	for _, x := range []int{view.Stored(), view.Info.KeyExp, view.Info.Body, lowLeaf} {
		b = binary.LittleEndian.AppendUint32(b, uint32(int32(x)))
	}
	return b
}

// appendUnit appends struct Unit of segments.h.
func appendUnit(b []byte, u unit) []byte {
	b = binary.LittleEndian.AppendUint32(b, u.segment)
	b = binary.LittleEndian.AppendUint16(b, u.leaf)
	return append(b, u.leaves, u.skip)
}

// addUnits lists the units of a head of a segment: of the body, then of the outliers, whose bins are their own.
func addUnits(add func(kind int, u unit), view seal.View, low bool, tokens int) {
	addRun(add, view, low, 0, view.Info.Body, tokens)
	addRun(add, view, low, view.Info.Body, view.Stored(), tokens)
}

// addRun lists the units of places [lo, hi), of so many tokens each.
func addRun(add func(kind int, u unit), view seal.View, low bool, lo, hi, tokens int) {
	kind := most
	if low {
		kind = full
	}
	for ; lo < hi; lo += tokens {
		u := unit{leaf: uint16(lo / tiers.LeafTokens), leaves: uint8((min(hi-lo, tokens) + tiers.LeafTokens - 1) / tiers.LeafTokens)}
		if view.IsDrain(int(u.leaf)) && !low {
			add(drains, unit{leaf: u.leaf, leaves: 1})
			u.skip = 1
		}
		if u.leaves > u.skip {
			add(kind, u)
		}
	}
}

// appendSplits divides n units of a head, from first on, among so many warps at most: whole blocks of them, of whose splits some may be empty.
func appendSplits(b []byte, head, first, n, warps int) []byte {
	warps = max(1, warps/blockSplits) * blockSplits
	warps = min(warps, (n+blockSplits-1)/blockSplits*blockSplits)
	for i := range warps {
		for _, x := range []int{head, first + i*n/warps, first + (i+1)*n/warps} {
			b = binary.LittleEndian.AppendUint32(b, uint32(x))
		}
	}
	return b
}
