package server

import (
	"iter"
	"slices"

	"kvtier/tiers"
)

// chunkTokens is how many positions a chunk of rows spans at most; chunks begin at its multiples, as segments do: what was sealed is given up chunk
// by chunk, and what follows stays where it lies.
const chunkTokens = tiers.SegmentTokens

// prefillTokens is how many rows of one append, behind a whole chunk, are taken for a part of a prefill that will fill the next.
const prefillTokens = 64

// layerRows are a layer's newest rows, unquantised: positions from base on.
// Memory is only written behind what readers see; what is cut off is never
// overwritten, because who cuts has no room left in the chunk that was cut.
type layerRows struct {
	base   uint64
	chunks []rowChunk // one behind the other, none empty
	// until is how far rows are expected: what grows has room for them.
	until uint64
}

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

// appended returns the rows with more behind them, [n][kvHeads][headDim] elements. Where memory grows, it doubles if it may.
func (r layerRows) appended(sp *spec, k, v []byte, double bool) layerRows {
	r.chunks = slices.Clone(r.chunks) // readers have the last one as it was
	for row := sp.rowBytes(); len(k) > 0; {
		if at := r.end(); at%chunkTokens == 0 || len(r.chunks) == 0 {
			r.chunks = append(r.chunks, rowChunk{start: at})
		}
		c := &r.chunks[len(r.chunks)-1]
		most := int(chunkTokens - c.start%chunkTokens)
		n := min(len(k)/row, most-c.n)
		if c.n+n > c.room {
			room := c.n + n
			switch {
			case double && len(r.chunks) > 1 && n >= prefillTokens:
				room = most
			case double:
				room = max(room, 2*c.n)
			}
			if r.until > c.start {
				room = max(room, int(min(r.until-c.start, chunkTokens)))
			}
			*c = c.moved(sp, min(room, most))
		}
		c.add(sp, k[:n*row], v[:n*row], n)
		k, v = k[n*row:], v[n*row:]
	}
	return r
}

// pieces yields the rows of positions [lo, hi), as far as they are there, as they lie in memory.
func (r layerRows) pieces(sp *spec, lo, hi uint64) iter.Seq[rowChunk] {
	return func(yield func(rowChunk) bool) {
		for i := range r.chunks {
			c := &r.chunks[i]
			if from, to := max(lo, c.start), min(hi, c.end()); from < to && !yield(c.cut(sp, from, to)) {
				return
			}
		}
	}
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

// upTo returns the rows of positions before end.
func (r layerRows) upTo(sp *spec, end uint64) layerRows {
	out := layerRows{base: r.base}
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
