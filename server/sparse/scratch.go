package sparse

import (
	"slices"
	"sync"

	"kvtier/compress"
	"kvtier/tiers"
)

// scratch is what a run needs room for by the number of leaves that it may scan.
// Runs use it one after the other: it would be most of what they allocate.
type scratch struct {
	leaves []leaf
	planes [][]byte // of leaves
	// Of each token of a leaf, by the leaf's place at: [rows][stride] its log weight and
	// that as a share of the softmax, 0 once its value is read; [stride] what
	// reading its value takes away of the error, as far as is known.
	log, shares, valueGain []float32
	stride                 int
	hist                   histogram
	keys                   []uint64  // of tokens, see affordable
	unread                 []unread  // what is estimated
	pool                   []float32 // see floats
	chosen                 []int
}

var scratches = sync.Pool{New: func() any { return new(scratch) }}

// newScratch returns room for so many leaves.
func newScratch(rows, leaves int) *scratch {
	s := scratches.Get().(*scratch)
	s.stride = leaves * tiers.LeafTokens
	s.leaves = slices.Grow(s.leaves[:0], leaves)
	s.planes = sized(s.planes, leaves*compress.NumKeyPlanes)
	s.log, s.shares = sized(s.log, rows*s.stride), sized(s.shares, rows*s.stride)
	s.valueGain = sized(s.valueGain, s.stride)
	s.unread, s.pool = s.unread[:0], s.pool[:0]
	return s
}

// free lets another run have the scratch. Nothing of it may be in use.
func (s *scratch) free() {
	clear(s.planes) // of pinned bytes
	clear(s.unread) // of pages
	scratches.Put(s)
}

// sized returns n elements, which may hold anything, in the room of s if it has any.
func sized[T any](s []T, n int) []T { return slices.Grow(s[:0], n)[:n] }

// floats returns n zeros for as long as the run lasts.
func (s *scratch) floats(n int) []float32 {
	if cap(s.pool)-len(s.pool) < n {
		s.pool = make([]float32, 0, max(n, 2*cap(s.pool)))
	}
	at := len(s.pool)
	s.pool = s.pool[:at+n]
	clear(s.pool[at:])
	return s.pool[at : at+n : at+n]
}

// ofRow returns row r of a table of leaves' tokens, as far as there are leaves.
func (s *scratch) ofRow(table []float32, r int) []float32 {
	return table[r*s.stride:][:len(s.leaves)*tiers.LeafTokens]
}
