package sparse

import (
	"slices"
	"sync"

	"kvtier/attention"
	"kvtier/attention/kernels"
	"kvtier/compress"
	"kvtier/tiers"
)

// scratch is what a run needs room for. Runs use it one after the other: it would
// be most of what they allocate.
type scratch struct {
	arena[float32]
	wordArena  arena[int16]
	gradeArena arena[grade]
	lineArena  arena[uint64]
	rowArena   arena[[]float32]
	layouts    arena[compress.KeyLayout]

	segs   []segmentRun
	groups []group // of tokens, those of all segments
	// Tables of slots, see run: estimates of what is not read: its mass, log, -Inf if there is nothing; which part of its
	// square are the squares of its tokens' (1/n if all weigh the same, 1 if one rules); and its relative variance.
	mass, ruled, noise []float32
	rank               []float32       // log weight by which pages are ranked
	tokens             []int32         // [slots], those that are not read
	scanned            []bool          // [pages]
	known              []bool          // [pages], whether the mean value is read, see standins.go
	values             attention.Means // of pages
	pageOf             []int32         // [pages], which one of its segment it is
	typical            []float32       // shares of the softmax by which known mean values stand for others
	norms              []float32       // [pages], squares of mean values
	spreads            []float32       // [pages], of keys
	// Relative to the square of the output: the mean square of a page's values' distance
	// from their mean, and from the output; [pages][rows].
	scatter, far []float32

	scores    []float32        // of all pages' mean keys, [rows][all], capped
	rawScores []float32        // the same, not capped; only if scores are
	folded    kernels.KeyQuery // room for a query in the bins of mean keys

	// See survey: of all pages, [rows][all] and [all].
	surveyed, restWeights []float32
	surprise, rankOfAll   []float32
	tops                  []float32 // [rows][2], log of the heaviest page's weight, and the sum of all in that unit

	leaves []leaf    // of the pages that are scanned
	single [1][]byte // see planesOf
	// Of pages that are skimmed, [pages]; nil: late, or not looked at. Planes of their keys, and bins, of their groups, of the channels that these may know of.
	keys  [][skimPlanes][]byte
	bins  [][]byte
	again []bool // those that are looked at again
	// Of each leaf: [rows][16] its tokens' weights, of which exp(run.base) is 1, 0 once the value is read; [rows][2] their sum and
	// that of their squares.
	w, sums []float32
	// Of deep leaves: planes of keys; [16] what reading a value takes away of the error, as far as is known.
	deepPlanes [][compress.NumKeyPlanes][]byte
	valueGain  []float32
	inOrder    []int // all leaves, by place
	deep       []int // those of which more than the first plane is read

	// What is asked for, see want; and what is pinned, of which segments.
	wanted []wanted
	ranges []tiers.Range
	reqs   []tiers.Request
	pins   []tiers.Pin
	pinned []int

	newGroups      []int32 // see readSteps
	list, outliers []int   // of leaves, tokens or pages
	lines          []valueLines
	hist           histogram
	order, order2  []uint64 // see sortByUpper
	weights        []float32
	chosen         []int
	lost           []int             // pages whose first bits of keys are late
	offsets        []float32         // see offsetsOf
	gainRows       []kernels.GainRow // [rows], see weigh
	places, binsOf []int32           // [all], see byPage.choose
	fetched        []wholePage       // in order, see byPage
	skimmer        skimmer
	rescored       []float32 // [rows][16], see raise
}

var scratches = sync.Pool{New: func() any { return new(scratch) }}

// reset makes room for a run that scans so many leaves at most.
func (s *scratch) reset(u *run, leaves, groups int) {
	s.arena.reset()
	s.wordArena.reset()
	s.gradeArena.reset()
	s.lineArena.reset()
	s.rowArena.reset()
	s.layouts.reset()
	rows := u.rows
	s.groups = sized(s.groups, groups)
	clear(s.groups)
	s.tokens = sized(s.tokens, u.slots)
	clear(s.tokens)
	s.scanned = sized(s.scanned, u.pages)
	clear(s.scanned)
	s.known = sized(s.known, u.pages)
	s.norms, s.spreads, s.pageOf = sized(s.norms, u.pages), sized(s.spreads, u.pages), sized(s.pageOf, u.pages)
	s.values.Reset()
	s.scatter, s.far = sized(s.scatter, rows*u.pages), sized(s.far, rows*u.pages)

	s.leaves, s.inOrder, s.deep = slices.Grow(s.leaves[:0], leaves), slices.Grow(s.inOrder[:0], leaves), s.deep[:0]
	s.lost = s.lost[:0]
	s.lines = sized(s.lines, len(u.segs))
	clear(s.lines)
	s.deepPlanes, s.valueGain = s.deepPlanes[:0], s.valueGain[:0]
	s.w, s.sums = sized(s.w, leaves*rows*tiers.LeafTokens), sized(s.sums, 2*leaves*rows)
	s.weights = sized(s.weights, u.slots)
	s.rescored = sized(s.rescored, rows*tiers.LeafTokens)
	s.gainRows = sized(s.gainRows, rows)
}

// free lets another run have the scratch. Nothing of it may be in use.
func (s *scratch) free() {
	clear(s.segs) // of headers and pinned bytes
	clear(s.reqs)
	clear(s.pins)
	s.pins, s.pinned, s.wanted, s.ranges = s.pins[:0], s.pinned[:0], s.wanted[:0], s.ranges[:0]
	clear(s.leaves) // of pinned bytes
	clear(s.deepPlanes)
	clear(s.fetched)
	s.single[0] = nil
	s.skimmer.lines, s.skimmer.seen = nil, nil
	clear(s.keys)
	clear(s.bins)
	s.keys, s.bins = s.keys[:0], s.bins[:0]
	scratches.Put(s)
}

// sized returns n elements, which may hold anything, in the room of s if it has any.
func sized[T any](s []T, n int) []T { return slices.Grow(s[:0], n)[:n] }

// floats returns n zeros for as long as the run lasts.
func (s *scratch) floats(n int) []float32 { return s.arena.zeros(n) }

// newSteps returns room for the bins of keys.
func (s *scratch) newSteps(d int) compress.KeySteps {
	both := s.floats(2 * d)
	return compress.KeySteps{Lo: both[:d:d], Step: both[d:]}
}

// words is floats of words, and newGrades of grades.
func (s *scratch) words(n int) []int16 { return s.wordArena.zeros(n) }

func (s *scratch) newGrades(n int) []grade { return s.gradeArena.zeros(n) }

// sortKeys returns room for n keys, until the next call.
func (s *scratch) sortKeys(n int) []uint64 {
	s.order, s.order2 = sized(s.order, n), sized(s.order2, n)
	return s.order
}

// arena hands out slices that are used until all of them are given up together.
type arena[T any] struct {
	block []T
	used  int // of earlier blocks
}

func (a *arena[T]) zeros(n int) []T {
	at := len(a.block)
	if cap(a.block)-at < n {
		a.used += at
		a.block, at = make([]T, 0, max(n, 2*cap(a.block), 1024)), 0
	}
	a.block = a.block[:at+n]
	out := a.block[at : at+n : at+n]
	clear(out)
	return out
}

// reset gives up all slices. The next run needs about as much as the last one.
func (a *arena[T]) reset() {
	if n := a.used + len(a.block); n > cap(a.block) {
		a.block = make([]T, 0, n)
	}
	a.block, a.used = a.block[:0], 0
}
