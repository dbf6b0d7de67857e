package kernels

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"testing"

	"kvtier/tiers"
	"kvtier/tiers/gpu/cuda"
	"kvtier/tiers/seal"
)

// tables is what a plan's bytes say, read as attend.cu reads them.
type tables struct {
	segments int
	units    []unit
	splits   []split
	ranges   [][kinds][2]int // by head
}

type split struct{ head, first, end int }

func parse(t *testing.T, p *Plan) (out tables) {
	t.Helper()
	b, word := p.tables, func(at int) int { return int(binary.LittleEndian.Uint32(p.tables[at:])) }
	if p.units%segmentBytes != 0 || p.splits < p.units || p.ranges < p.splits || len(b)-p.ranges != p.Heads*rangeBytes {
		t.Fatalf("tables end at %d, %d, %d and %d", p.units, p.splits, p.ranges, len(b))
	}
	out.segments = p.units / segmentBytes
	for at := p.units; at < p.splits; at += unitBytes {
		out.units = append(out.units, unit{uint32(word(at)), binary.LittleEndian.Uint16(b[at+4:]), b[at+6], b[at+7]})
	}
	for at := p.splits; at < p.ranges; at += splitBytes {
		out.splits = append(out.splits, split{word(at), word(at + 4), word(at + 8)})
	}
	for head := range p.Heads {
		var r [kinds][2]int
		for kind := range r {
			at := p.ranges + head*rangeBytes + 8*kind
			r[kind] = [2]int{word(at), word(at + 4)}
		}
		out.ranges = append(out.ranges, r)
	}
	return out
}

// header makes one of a segment that nobody sealed: heads have from least to most stored tokens.
func header(rng *rand.Rand, d, heads, least, most int) *tiers.Header {
	h := &tiers.Header{HeadDim: d, Profile: tiers.ProfileBalanced, Heads: make([]tiers.HeadInfo, heads)}
	for i := range h.Heads {
		x := &h.Heads[i]
		x.Body = least + rng.IntN(most-least+1)
		if x.Body > tiers.PageTokens && rng.IntN(3) > 0 { // outliers follow whole pages
			all := x.Body
			x.Body = tiers.PageTokens * (1 + rng.IntN(all/tiers.PageTokens))
			x.Outliers = all - x.Body
		}
		x.KeyExp = rng.IntN(50) - 25
	}
	return h
}

// addresses are those of planes that nobody has.
func addresses(segment int) func(head int, p tiers.Plane) Address {
	return func(head int, p tiers.Plane) Address { return uint64(segment+1)<<32 | uint64(head)<<16 | uint64(p)<<8 }
}

func TestPlan(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	for range 400 {
		heads, d := 1+rng.IntN(4), HeadDims[rng.IntN(len(HeadDims))]
		most := []int{1, 16, 17, 65, 700, tiers.SegmentTokens}[rng.IntN(6)]
		var segments []Segment
		for i := range 1 + rng.IntN(5) {
			segments = append(segments, Segment{header(rng, d, heads, 1, most), rng.IntN(3) == 0, addresses(i)})
		}
		if rng.IntN(2) == 0 { // pages are chosen where all segments know as much
			for i := range segments {
				segments[i].Low = segments[0].Low
			}
		}
		warps := []int{0, 1, 5, 64, 1000}
		checkPlan(t, segments, Warps{warps[rng.IntN(5)], warps[rng.IntN(5)]})
	}
}

func checkPlan(t *testing.T, segments []Segment, warps Warps) {
	t.Helper()
	p := NewPlan(segments, warps)
	x := parse(t, p)
	if x.segments != len(segments)*p.Heads {
		t.Fatalf("%d segments of %d heads are %d", len(segments), p.Heads, x.segments)
	}
	var tokens int64
	next := 0 // the split that comes next
	for kind := range kinds {
		most := [kinds]int{warps.Most, warps.Most, warps.Full}[kind]
		for head := range p.Heads {
			r := x.ranges[head][kind]
			if r[0] != next || r[1] < r[0] || (r[1]-r[0])%blockSplits != 0 {
				t.Fatalf("head %d, kind %d: splits %v, after %d", head, kind, r, next)
			}
			if n := r[1] - r[0]; n > max(most/p.Heads, blockSplits) {
				t.Fatalf("head %d, kind %d: %d splits for %d warps", head, kind, n, most)
			}
			next = r[1]
		}
		if p.ends[kind] != next {
			t.Fatalf("splits of kind %d end at %d, not %d", kind, p.ends[kind], next)
		}
	}
	if next != len(x.splits) {
		t.Fatalf("%d splits, of which ranges have %d", len(x.splits), next)
	}
	// Every unit is in one split, in turn; every token of every head in one unit.
	at := 0
	attended := make([][]bool, x.segments)
	for kind := range kinds {
		for head := range p.Heads {
			for _, s := range x.splits[x.ranges[head][kind][0]:x.ranges[head][kind][1]] {
				if s.head != head || s.first != at || s.end < s.first || s.end > len(x.units) {
					t.Fatalf("head %d, kind %d: split %+v, unit %d comes next", head, kind, s, at)
				}
				at = s.end
				for _, u := range x.units[s.first:s.end] {
					checkUnit(t, u, segments, head, kind, attended)
				}
			}
		}
	}
	if at != len(x.units) {
		t.Fatalf("%d units, of which splits have %d", len(x.units), at)
	}
	for i, of := range attended {
		v := seal.View{D: p.HeadDim, Info: segments[i%len(segments)].Header.Heads[i/len(segments)]}
		tokens += int64(v.Stored())
		for token := range v.Stored() {
			if token >= len(of) || !of[token] {
				t.Fatalf("segment %d: token %d is in no unit", i, token)
			}
		}
	}
	if tokens != p.Tokens {
		t.Fatalf("%d tokens, not %d", p.Tokens, tokens)
	}
	checkSegments(t, p, segments)
	checkChoice(t, p, x, segments)
}

// checkChoice checks the tables that pages are chosen by: every token is in a candidate, in a unit that is always attended, or among drains.
func checkChoice(t *testing.T, p *Plan, x tables, segments []Segment) {
	t.Helper()
	c, alike, pages := p.choice, true, 0
	for _, s := range segments {
		alike = alike && s.Low == segments[0].Low
		for _, h := range s.Header.Heads {
			pages += h.Body / tiers.PageTokens
		}
	}
	if (c != nil) != (alike && pages > 0) {
		t.Fatalf("something can be chosen: %v, of %d pages, segments alike: %v", c != nil, pages, alike)
	}
	if c == nil {
		return
	}
	list := func(at, i int) unit {
		b := c.tables[at+i*unitBytes:]
		return unit{binary.LittleEndian.Uint32(b), binary.LittleEndian.Uint16(b[4:]), b[6], b[7]}
	}
	splits := func(at, lo, hi, head, first, end int) {
		t.Helper()
		for i := lo; i < hi; i++ {
			b := c.tables[at+i*splitBytes:]
			if h, f, e := int(binary.LittleEndian.Uint32(b)), int(binary.LittleEndian.Uint32(b[4:])), int(binary.LittleEndian.Uint32(b[8:])); h != head || f != first || e < f {
				t.Fatalf("split %d is of head %d, candidates %d to %d, where head %d, %d comes", i, h, f, e, head, first)
			} else {
				first = e
			}
		}
		if first != end {
			t.Fatalf("splits end with candidate %d, not %d", first, end)
		}
	}
	attended := make([][]bool, x.segments)
	kind := most
	if segments[0].Low {
		kind = full
	}
	next, rest, fixed, always := [8]int{}, c.attended, p.ends[drains], 0
	if fixed > 0 {
		always = x.splits[fixed-1].end
	}
	if !bytes.Equal(c.tables[c.always:][:always*unitBytes], p.tables[p.units:][:always*unitBytes]) || !bytes.Equal(c.tables[c.fixed:][:fixed*splitBytes], p.tables[p.splits:][:fixed*splitBytes]) {
		t.Fatal("the choice has other drains than the plan")
	}
	for head := range p.Heads {
		h := c.of(head)
		if h[0] != next[1] || h[3] != next[4] || h[5] != next[5] || h[6] != next[7] {
			t.Fatalf("head %d: %v after %v", head, h, next)
		}
		got := 0
		for i := h[0]; i < h[1]; i++ {
			u := list(c.candidates, i)
			checkUnit(t, u, segments, head, kind, attended)
			if u.leaves%pageLeaves != 0 || int(u.leaf+uint16(u.leaves))*tiers.LeafTokens > segments[int(u.segment)%len(segments)].Header.Heads[head].Body {
				t.Fatalf("candidate %+v is not whole pages of a body", u)
			}
			got += int(u.leaves) / pageLeaves
		}
		if got != h[2] || got != c.pages[head] {
			t.Fatalf("head %d: %d and %d pages, not %d", head, h[2], c.pages[head], got)
		}
		drained := x.ranges[head][drains]
		for _, s := range x.splits[drained[0]:drained[1]] {
			for _, u := range x.units[s.first:s.end] {
				checkUnit(t, u, segments, head, drains, attended)
			}
		}
		splits(c.scans, h[3], h[4], head, h[0], h[1])
		ranges := c.rangesOf(head)
		if want := [...][2]int{drained, {fixed, ranges[1][1]}, {c.first + h[6], c.first + h[7]}, {rest, ranges[3][1]}}; ranges != want {
			t.Fatalf("head %d: ranges %v, not %v", head, ranges, want)
		}
		from := always
		for i := ranges[1][0]; i < ranges[1][1]; i++ {
			s := c.tables[c.fixed+i*splitBytes:]
			for end := int(binary.LittleEndian.Uint32(s[8:])); always < end; always++ {
				checkUnit(t, list(c.always, always), segments, head, kind, attended)
			}
		}
		splits(c.fixed, ranges[1][0], ranges[1][1], head, from, always)
		fixed = ranges[1][1]
		splits(c.rests, rest-c.attended, ranges[3][1]-c.attended, head, h[0], h[1])
		for _, n := range []int{h[4] - h[3], h[7] - h[6], ranges[1][1] - ranges[1][0], ranges[3][1] - rest} {
			if n%blockSplits != 0 {
				t.Fatalf("head %d: %d splits are no whole blocks", head, n)
			}
		}
		next, rest = h, ranges[3][1]
		next[3], next[5] = h[4], h[5]+2*(h[1]-h[0])
	}
	if rest != c.end || fixed != c.first || c.first+next[7] != c.attended || next[5] != c.units || next[4] != c.scanSplits {
		t.Fatalf("%+v, after %v", c, next)
	}
	for i, of := range attended {
		v := seal.View{D: p.HeadDim, Info: segments[i%len(segments)].Header.Heads[i/len(segments)]}
		for token := range v.Stored() {
			if token >= len(of) || !of[token] {
				t.Fatalf("segment %d: token %d is neither chosen from nor read", i, token)
			}
		}
	}
	for _, share := range []uint32{0, 1, Everything / 5, Everything - 1} {
		const rows = 9 // two blocks, of which the second leaves a fourth of the chosen pages' tokens unread, too
		unread, unchosen, more := make([]Unread, rows*p.Heads), 0, 0
		for i := range unread {
			pages := c.pages[i/rows]
			left := tiers.PageTokens * (pages - chosen(pages, share))
			if i%rows == warpRows {
				unchosen, more = unchosen+left, more+tiers.PageTokens/4*chosen(pages, share)
			}
			unread[i].Tokens = float32(left)
		}
		scanned, read, estimated, bytes := p.Cost(rows, share, unread)
		if int(estimated) != unchosen || scanned != p.Tokens || read+estimated != p.Tokens || bytes < 2*c.scanned || bytes > 2*(c.scanned+p.Bytes) {
			t.Fatalf("share %d: %d scanned, %d read, %d estimated of %d, %d bytes", share, scanned, read, estimated, p.Tokens, bytes)
		}
		for head := range p.Heads {
			unread[head*rows+warpRows].Tokens += float32(tiers.PageTokens / 4 * chosen(c.pages[head], share))
		}
		value := p.HeadDim / 2
		if segments[0].Low {
			value = p.HeadDim
		}
		if _, _, e, b := p.Cost(rows, share, unread); int(e) != unchosen+more/2 || int(bytes-b) != more*value {
			t.Fatalf("share %d: %d more estimated and %d bytes less, of %d tokens that are not read", share, int(e)-unchosen, bytes-b, more)
		}
	}
}

// checkUnit checks a unit and notes which tokens of its segment it attends.
func checkUnit(t *testing.T, u unit, segments []Segment, head, kind int, attended [][]bool) {
	t.Helper()
	s := segments[int(u.segment)%len(segments)]
	v := seal.View{D: s.Header.HeadDim, Info: s.Header.Heads[head]}
	leaf, end := int(u.leaf), int(u.leaf)+int(u.leaves)
	drainsOf := kind == drains
	if int(u.segment)/len(segments) != head || s.Low != (kind == full) {
		t.Fatalf("head %d, kind %d: unit %+v of another head or kind", head, kind, u)
	}
	if u.leaf%2 != 0 || u.leaves < 1 || u.leaves > 16 || u.skip >= u.leaves || end > v.Leaves() {
		t.Fatalf("head %d, kind %d: unit %+v of %d leaves", head, kind, u, v.Leaves())
	}
	if drainsOf && (u.leaves != 1 || u.skip != 0) || u.skip > 0 && !v.IsDrain(leaf) {
		t.Fatalf("head %d, kind %d: unit %+v", head, kind, u)
	}
	if attended[u.segment] == nil {
		attended[u.segment] = make([]bool, v.Stored())
	}
	for l := leaf; l < end; l++ {
		if v.StepGroup(l) != v.StepGroup(leaf) {
			t.Fatalf("leaves %d and %d have other bins", leaf, l)
		}
		if l < leaf+int(u.skip) {
			continue
		}
		if (v.IsDrain(l) && !s.Low) != drainsOf {
			t.Fatalf("kind %d: leaf %d is among drains: %v", kind, l, v.IsDrain(l))
		}
		for token := l * tiers.LeafTokens; token < l*tiers.LeafTokens+v.LeafTokens(l); token++ {
			if attended[u.segment][token] {
				t.Fatalf("head %d: token %d is attended twice", head, token)
			}
			attended[u.segment][token] = true
		}
	}
}

// checkSegments checks what the tables say of segments, head after head.
func checkSegments(t *testing.T, p *Plan, segments []Segment) {
	t.Helper()
	for i := range len(segments) * p.Heads {
		head, s := i/len(segments), segments[i%len(segments)]
		v := seal.View{D: p.HeadDim, Info: s.Header.Heads[head]}
		b := p.tables[i*segmentBytes:]
		address := func(j int) uint64 { return binary.LittleEndian.Uint64(b[8*j:]) }
		number := func(j int) int { return int(int32(binary.LittleEndian.Uint32(b[72+4*j:]))) }
		for j, plane := range []tiers.Plane{tiers.PlaneSteps, tiers.PlaneK1, tiers.PlaneK2, tiers.PlaneK3, tiers.PlaneK4, tiers.PlaneK8, tiers.PlaneV4, tiers.PlaneV8, tiers.PlanePages} {
			want := s.At(head, plane)
			if apart := !s.Low && v.Drains() > 0; apart && plane == tiers.PlaneK8 {
				want = s.At(head, tiers.PlaneDrains)
			} else if apart && plane == tiers.PlaneV8 {
				want = s.At(head, tiers.PlaneDrains) + uint64(v.DrainValue(v.Info.Body).Off)
			}
			if address(j) != want {
				t.Fatalf("segment %d: %v at %#x, not %#x", i, plane, address(j), want)
			}
		}
		lowLeaf := 0
		if !s.Low && v.Drains() > 0 {
			lowLeaf = v.Info.Body / tiers.LeafTokens
		}
		for j, want := range []int{v.Stored(), v.Info.KeyExp, v.Info.Body, lowLeaf} {
			if number(j) != want {
				t.Fatalf("segment %d: number %d is %d, not %d", i, j, number(j), want)
			}
		}
	}
}

func TestSupported(t *testing.T) {
	h := func(d int, p tiers.Profile, body int) *tiers.Header {
		return &tiers.Header{HeadDim: d, Profile: p, Heads: []tiers.HeadInfo{{Body: body}}}
	}
	for _, c := range []struct {
		h    *tiers.Header
		want bool
	}{
		{h(64, tiers.ProfileBalanced, 5), true},
		{h(256, tiers.ProfileNeutral, 5), true},
		{h(128, tiers.ProfileExact, 5), false},
		{h(96, tiers.ProfileBalanced, 5), false},
		{h(128, tiers.ProfileBalanced, 0), false}, // a window
	} {
		if got := Supported(c.h); got != c.want {
			t.Errorf("%+v: %v", c.h, got)
		}
	}
}

// TestFit: an H100 and an A100 have room for all kernels, smaller GPUs not for those of dimension 256.
func TestFit(t *testing.T) {
	for shared, most := range map[int]int{227 << 10: 256, 163 << 10: 256, 99 << 10: 128, 64 << 10: 64} {
		for _, d := range HeadDims {
			if Fit(d, cuda.Info{SharedOptin: shared}) != (d <= most) {
				t.Errorf("head dimension %d, %d bytes of shared memory", d, shared)
			}
		}
	}
}
