package server

import (
	"iter"
	"slices"

	"kvtier/compress"
	"kvtier/tiers"
)

// chunkTokens is how many positions a chunk of rows spans at most; chunks begin at its multiples, as segments do: what was sealed is given up chunk
// by chunk, and what follows stays where it lies.
const chunkTokens = tiers.SegmentTokens

// prefillTokens is how many rows of one append, behind a whole chunk, are taken for a part of a prefill that will fill the next.
const prefillTokens = 64

// layerRows are a layer's newest rows, unquantised: positions from base on.
// Chunks only grow behind what readers see; what is cut off is never
// overwritten, because cuts also cut the capacity.
type layerRows struct {
	base   uint64
	chunks []rowChunk // one behind the other, none empty
	// until is how far rows are expected: what grows has room for them.
	until uint64
}

// rowChunk holds rows from position start on, none of them beyond the next multiple of chunkTokens.
type rowChunk struct {
	start uint64
	k, v  []byte // [n][kvHeads][headDim] elements
}

func (c rowChunk) end(rowBytes int) uint64 { return c.start + uint64(len(c.k)/rowBytes) }

func (r layerRows) end(rowBytes int) uint64 {
	if n := len(r.chunks); n > 0 {
		return r.chunks[n-1].end(rowBytes)
	}
	return r.base
}

// bytes is the memory that the rows take.
func (r layerRows) bytes() (n int64) {
	for _, c := range r.chunks {
		n += int64(cap(c.k) + cap(c.v))
	}
	return n
}

// appended returns the rows with more behind them. Where memory grows, it doubles if it may.
func (r layerRows) appended(k, v []byte, rowBytes int, double bool) layerRows {
	r.chunks = slices.Clone(r.chunks) // readers have the last one as it was
	for at := r.end(rowBytes); len(k) > 0; at = r.end(rowBytes) {
		if at%chunkTokens == 0 || len(r.chunks) == 0 {
			r.chunks = append(r.chunks, rowChunk{start: at})
		}
		c := &r.chunks[len(r.chunks)-1]
		most := int(chunkTokens-c.start%chunkTokens) * rowBytes
		n := min(len(k), most-len(c.k))
		room := len(c.k) + n
		if room > cap(c.k) {
			switch {
			case double && len(r.chunks) > 1 && n >= prefillTokens*rowBytes:
				room = most
			case double:
				room = max(room, 2*len(c.k))
			}
			if r.until > c.start {
				room = max(room, int(min(r.until-c.start, chunkTokens))*rowBytes)
			}
			room = min(room, most)
		}
		c.k, c.v = append(withRoom(c.k, room), k[:n]...), append(withRoom(c.v, room), v[:n]...)
		k, v = k[n:], v[n:]
	}
	return r
}

// withRoom returns b with room for n bytes in all: append would give a quarter more, so that a long tail is copied over and over.
func withRoom(b []byte, n int) []byte {
	if n <= cap(b) {
		return b
	}
	return append(make([]byte, 0, n), b...)
}

// pieces yields the rows of positions [lo, hi), which are there, as they lie in memory: each piece with its first position.
func (r layerRows) pieces(lo, hi uint64, rowBytes int) iter.Seq[rowChunk] {
	return func(yield func(rowChunk) bool) {
		for _, c := range r.chunks {
			from, to := max(lo, c.start), min(hi, c.end(rowBytes))
			if from >= to {
				continue
			}
			a, b := int(from-c.start)*rowBytes, int(to-c.start)*rowBytes
			if !yield(rowChunk{from, c.k[a:b:b], c.v[a:b:b]}) {
				return
			}
		}
	}
}

// slice returns the bytes of positions [lo, hi): a copy of them, if they lie in several chunks.
func (r layerRows) slice(lo, hi uint64, rowBytes int) (k, v []byte) {
	for p := range r.pieces(lo, hi, rowBytes) {
		if p.end(rowBytes) == hi && k == nil {
			return p.k, p.v
		}
		k, v = append(k, p.k...), append(v, p.v...)
	}
	return k, v
}

// upTo returns the rows of positions before end.
func (r layerRows) upTo(end uint64, rowBytes int) layerRows {
	out := layerRows{base: r.base}
	for p := range r.pieces(r.base, end, rowBytes) {
		out.chunks = append(out.chunks, p)
	}
	return out
}

// from returns the rows of positions from base on. Of a chunk that is cut it
// has a copy, so that what lies before can be freed.
func (r layerRows) from(base uint64, rowBytes int) layerRows {
	if base <= r.base {
		return r
	}
	out := layerRows{base: min(base, r.end(rowBytes)), until: r.until}
	for _, c := range r.chunks {
		switch {
		case c.end(rowBytes) <= base:
			continue
		case c.start < base:
			cut := int(base-c.start) * rowBytes
			c = rowChunk{base, slices.Clone(c.k[cut:]), slices.Clone(c.v[cut:])}
		}
		out.chunks = append(out.chunks, c)
	}
	return out
}

// widenRows writes n rows [d], pitch elements from one to the next, as float32 to dst [n][d].
func widenRows(dst []float32, b []byte, n, pitch, d int, t compress.ElementType) {
	for i := range n {
		compress.ToFloat32(dst[i*d:(i+1)*d], b[i*pitch*t.Size():][:d*t.Size()], t)
	}
}

// convertRows returns rows in the sequence's element type: as they are, or
// converted if that loses nothing or lossy is allowed. They must be finite.
func convertRows(what string, b []byte, from, to compress.ElementType, lossy bool) ([]byte, error) {
	if from == to {
		return b, checkRows(what, b, from)
	}
	f, err := toFloats(what, b, from)
	if err != nil {
		return nil, err
	}
	if !lossy && !compress.Lossless(f, to) {
		return nil, invalid(ReasonLossy, "%s does not fit the sequence's element type: round it before, or set convert", what)
	}
	out := make([]byte, len(f)*to.Size())
	compress.FromFloat32(out, f, to)
	if lossy {
		compress.ToFloat32(f, out, to)
		if !compress.Finite(f) {
			return nil, invalid(ReasonValue, "%s overflows the sequence's element type", what)
		}
	}
	return out, nil
}

// maxMagnitude bounds queries, keys and values, so that no score and no sum of
// values leaves float32: dense attention over larger ones would give NaN, too.
const maxMagnitude = 0x1p56

// toFloats decodes a tensor and checks that it is finite, and not beyond maxMagnitude.
func toFloats(what string, b []byte, t compress.ElementType) ([]float32, error) {
	if t.Size() == 0 {
		return nil, invalid(ReasonArgument, "dtype %d of %s is unknown", t, what)
	}
	if len(b)%t.Size() != 0 {
		return nil, invalid(ReasonShape, "%s has %d bytes, not a multiple of its element's %d", what, len(b), t.Size())
	}
	f := make([]float32, len(b)/t.Size())
	compress.ToFloat32(f, b, t)
	return f, checkMagnitude(what, f, 1)
}

// checkRows is toFloats for its checks alone: rows of a prefill are large.
func checkRows(what string, b []byte, t compress.ElementType) error {
	var f [1024]float32
	size := t.Size()
	if size == 0 || len(b)%size != 0 {
		_, err := toFloats(what, b, t)
		return err
	}
	for n := 0; len(b) > 0; b = b[n*size:] {
		n = min(len(f), len(b)/size)
		compress.ToFloat32(f[:n], b, t)
		if err := checkMagnitude(what, f[:n], 1); err != nil {
			return err
		}
	}
	return nil
}

// checkMagnitude checks x times a factor, 0 or more.
func checkMagnitude(what string, x []float32, factor float32) error {
	for _, v := range x {
		switch y := v * factor; {
		case y >= -maxMagnitude && y <= maxMagnitude:
		case !finite(v):
			return invalid(ReasonValue, "%s holds NaN or infinity: the worker's computation went wrong before", what)
		default:
			return invalid(ReasonValue, "%s holds %g: attention in float32 takes magnitudes up to %g", what, y, float64(maxMagnitude))
		}
	}
	return nil
}

// putRow writes row i of one head's rows to the place of token at, in the
// sequence's element type.
func (s *sequence) putRow(dst []byte, rows []float32, i, at, head int) {
	d, size := s.spec.headDim, s.spec.typ.Size()
	off := at*s.spec.rowBytes() + head*d*size
	compress.FromFloat32(dst[off:off+d*size], rows[i*d:(i+1)*d], s.spec.typ)
}
