package server

import (
	"fmt"
	"iter"
	"slices"

	"kvtier/tiers"
)

// chunkTokens is how many positions a chunk of rows spans at most; chunks begin at its multiples, as segments do: what was sealed is given up chunk
// by chunk, and what follows stays where it lies.
const chunkTokens = tiers.SegmentTokens

// layerRows are a layer's newest rows, unquantised: positions from base on.
// Memory is only written behind what readers see; what is cut off is never
// overwritten, because who cuts has no room left in the chunk that was cut.
type layerRows struct {
	base   uint64
	chunks []rowChunk // one behind the other, none empty
	// until is how far rows are expected: what grows up to there has room for them, and for no others.
	until uint64
}

// growth says for how many rows more than there are what grows may have room.
type growth int

const (
	asNeeded growth = iota
	doubling        // for as many as there are
	prefill         // behind a whole chunk, and if many come at once, for all that a chunk can hold
)

// prefillTokens is how many rows of one append are many.
const prefillTokens = 64

// rowChunk holds the rows of n positions from start on, none of them beyond the next multiple of chunkTokens. A KV head's rows follow one
// another: an answer of that head reads them as one stream.
type rowChunk struct {
	start   uint64
	n, room int
	pitch   int    // rows from one head's first to the next one's
	k, v    []byte // [kvHeads][pitch][headDim] elements
}

func (c *rowChunk) end() uint64 { return c.start + uint64(c.n) }

// bytes is the memory that the chunk takes of its owner's: rows that were cut are others'.
func (c *rowChunk) bytes(sp *spec) int64 { return 2 * int64(c.room*sp.rowBytes()) }

// head returns a head's rows, [n][headDim] elements.
func (c *rowChunk) head(sp *spec, head int) (k, v []byte) {
	row := sp.headBytes()
	a, b := head*c.pitch*row, (head*c.pitch+c.n)*row
	return c.k[a:b:b], c.v[a:b:b]
}

// cut returns the chunk's rows of positions [lo, hi), which are among its own. It has no room for more.
func (c *rowChunk) cut(sp *spec, lo, hi uint64) rowChunk {
	skip, n := int(lo-c.start), int(hi-lo)
	if n == c.n {
		x := *c
		x.room = n
		return x
	}
	a := skip * sp.headBytes()
	return rowChunk{lo, n, n, c.pitch, c.k[a:], c.v[a:]}
}

// moved returns the chunk in memory of its own, with room for so many rows.
func (c *rowChunk) moved(sp *spec, room int) rowChunk {
	size, row := room*sp.rowBytes(), sp.headBytes()
	x := rowChunk{c.start, c.n, room, room, make([]byte, size), make([]byte, size)}
	if c.n == 0 {
		return x
	}
	for head := range sp.kvHeads {
		k, v := c.head(sp, head)
		copy(x.k[head*room*row:], k)
		copy(x.v[head*room*row:], v)
	}
	return x
}

// add writes n rows [n][kvHeads][headDim] behind those that there are. There has to be room.
func (c *rowChunk) add(sp *spec, k, v []byte, n int) {
	row := sp.headBytes()
	for i := range n {
		for head := range sp.kvHeads {
			from, to := (i*sp.kvHeads+head)*row, (head*c.pitch+c.n+i)*row
			copy(c.k[to:to+row], k[from:from+row])
			copy(c.v[to:to+row], v[from:from+row])
		}
	}
	c.n += n
}

// parts appends to list the parts of which the rows of b, the chunk's keys or values, [n][kvHeads][headDim] elements, are made.
func (c *rowChunk) parts(sp *spec, list [][]byte, b []byte) [][]byte {
	row := sp.headBytes()
	for i := range c.n {
		for head := range sp.kvHeads {
			at := (head*c.pitch + i) * row
			list = append(list, b[at:at+row:at+row])
		}
	}
	return list
}

// appendTo appends the rows to k and v, [n][kvHeads][headDim] elements.
func (c *rowChunk) appendTo(sp *spec, k, v []byte) ([]byte, []byte) {
	size, row := c.n*sp.rowBytes(), sp.headBytes()
	k, v = slices.Grow(k, size), slices.Grow(v, size)
	for i := range c.n {
		for head := range sp.kvHeads {
			at := (head*c.pitch + i) * row
			k, v = append(k, c.k[at:at+row]...), append(v, c.v[at:at+row]...)
		}
	}
	return k, v
}

func (r layerRows) end() uint64 {
	if n := len(r.chunks); n > 0 {
		return r.chunks[n-1].end()
	}
	return r.base
}

// bytes is the memory that the rows take.
func (r layerRows) bytes(sp *spec) (n int64) {
	for i := range r.chunks {
		n += r.chunks[i].bytes(sp)
	}
	return n
}

// appended returns the rows with more behind them, [n][kvHeads][headDim] elements.
func (r layerRows) appended(sp *spec, k, v []byte, g growth) layerRows {
	r.chunks = slices.Clone(r.chunks) // readers have the last one as it was
	r.add(sp, k, v, g)
	return r
}

// add is appended of rows that nobody reads yet.
func (r *layerRows) add(sp *spec, k, v []byte, g growth) {
	for row := sp.rowBytes(); len(k) > 0; {
		if at := r.end(); at%chunkTokens == 0 || len(r.chunks) == 0 {
			r.chunks = append(r.chunks, rowChunk{start: at})
		}
		c := &r.chunks[len(r.chunks)-1]
		most := int(chunkTokens - c.start%chunkTokens)
		n := min(len(k)/row, most-c.n)
		need := c.n + n
		room := need
		switch {
		case r.until >= c.start+uint64(need):
			room = int(min(r.until-c.start, chunkTokens))
		case g == prefill && len(r.chunks) > 1 && n >= prefillTokens:
			room = most
		case g >= doubling:
			room = max(room, 2*c.n)
		}
		over := n < prefillTokens && c.room > 2*max(room, need+prefillTokens) // it was made for a prefill, which is over
		switch {
		case need > c.room:
			*c = c.moved(sp, min(room, most))
		case over:
			*c = c.moved(sp, min(max(room, need+prefillTokens), most))
		}
		c.add(sp, k[:n*row], v[:n*row], n)
		k, v = k[n*row:], v[n*row:]
	}
}

// pieces yields the rows of positions [lo, hi), as they lie in memory. It panics if any of them is not there: nothing may be answered, logged or sealed without.
func (r layerRows) pieces(sp *spec, lo, hi uint64) iter.Seq[rowChunk] {
	if lo < hi && (lo < r.base || hi > r.end()) {
		panic(fmt.Sprintf("rows [%d, %d) of [%d, %d)", lo, hi, r.base, r.end()))
	}
	return func(yield func(rowChunk) bool) {
		for i := range r.chunks {
			c := &r.chunks[i]
			if from, to := max(lo, c.start), min(hi, c.end()); from < to && !yield(c.cut(sp, from, to)) {
				return
			}
		}
	}
}

// parts appends to list the parts of which the keys, and then the values, of positions [lo, hi) are made, [hi-lo][kvHeads][headDim] elements each.
func (r layerRows) parts(sp *spec, list [][]byte, lo, hi uint64) [][]byte {
	for c := range r.pieces(sp, lo, hi) {
		list = c.parts(sp, list, c.k)
	}
	for c := range r.pieces(sp, lo, hi) {
		list = c.parts(sp, list, c.v)
	}
	return list
}

// appendTo appends the rows of positions [lo, hi) to k and v, [hi-lo][kvHeads][headDim] elements.
func (r layerRows) appendTo(sp *spec, k, v []byte, lo, hi uint64) ([]byte, []byte) {
	for c := range r.pieces(sp, lo, hi) {
		k, v = c.appendTo(sp, k, v)
	}
	return k, v
}

// slice returns a copy of the rows of positions [lo, hi), [hi-lo][kvHeads][headDim] elements.
func (r layerRows) slice(sp *spec, lo, hi uint64) (k, v []byte) {
	return r.appendTo(sp, nil, nil, lo, hi)
}

// upTo returns the rows of positions before end. Where none is behind them, who had the rows goes on with these.
func (r layerRows) upTo(sp *spec, end uint64) layerRows {
	if end >= r.end() {
		return r
	}
	return r.forked(sp, end)
}

// forked returns the rows of positions before end, for another sequence, too: none writes where the other does.
func (r layerRows) forked(sp *spec, end uint64) layerRows {
	out := layerRows{base: r.base, until: r.until}
	for c := range r.pieces(sp, r.base, end) {
		out.chunks = append(out.chunks, c)
	}
	return out
}

// from returns the rows of positions from base on. Of a chunk that is cut it
// has a copy, so that what lies before can be freed.
func (r layerRows) from(sp *spec, base uint64) layerRows {
	if base <= r.base {
		return r
	}
	out := layerRows{base: min(base, r.end()), until: r.until}
	for i := range r.chunks {
		c := r.chunks[i]
		switch {
		case c.end() <= base:
			continue
		case c.start < base:
			c = c.cut(sp, base, c.end())
			c = c.moved(sp, c.n)
		}
		out.chunks = append(out.chunks, c)
	}
	return out
}

// tight returns the rows in no more memory than they need.
func (r layerRows) tight(sp *spec) layerRows {
	r.chunks = slices.Clone(r.chunks)
	for i := range r.chunks {
		if c := &r.chunks[i]; c.room > c.n {
			*c = c.moved(sp, c.n)
		}
	}
	return r
}
