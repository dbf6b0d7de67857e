package server

import (
	"bytes"
	"math/rand/v2"
	"slices"
	"testing"

	"kvtier/compress"
)

// Rows in chunks against rows in one slice: whatever is appended, cut at either
// end or forked, both say the same, and what a reader was given stays as it was.
func TestRowsInChunks(t *testing.T) {
	t.Parallel()
	sp := &spec{kvHeads: 3, headDim: 1, typ: compress.BF16}
	rowBytes := uint64(sp.rowBytes())
	type flat struct {
		base uint64
		k    []byte
	}
	type pair struct {
		rows layerRows
		flat flat
	}
	for seed := range uint64(20) {
		rng := rand.New(rand.NewPCG(seed, 1))
		start := rng.Uint64N(3 * chunkTokens)
		writers := []pair{{layerRows{base: start}, flat{start, nil}}} // a sequence and its forks
		var readers []pair                                            // snapshots of them
		for step := range 200 {
			x := &writers[rng.IntN(len(writers))]
			if readers = append(readers, *x); len(readers) > 8 {
				readers = slices.Delete(readers, 0, 1)
			}
			end := x.flat.base + uint64(len(x.flat.k)/sp.rowBytes())
			switch op := rng.IntN(10); {
			case op < 6:
				n := 1 + rng.IntN(4)
				if op == 0 {
					n = rng.IntN(2 * chunkTokens)
				}
				k := make([]byte, n*sp.rowBytes())
				for i := range k {
					k[i] = byte(rng.Uint32())
				}
				x.rows = x.rows.appended(sp, k, not(k), growth(rng.IntN(3)))
				x.flat.k = slices.Concat(x.flat.k, k)
			case op == 6:
				to := x.flat.base + rng.Uint64N(end-x.flat.base+1)
				x.rows = x.rows.upTo(sp, to)
				x.flat.k = x.flat.k[:(to-x.flat.base)*rowBytes]
			case op == 7:
				from := x.flat.base + rng.Uint64N(end-x.flat.base+1)
				x.rows = x.rows.from(sp, from)
				x.flat = flat{from, x.flat.k[(from-x.flat.base)*rowBytes:]}
			case op == 8:
				x.rows.until = end + rng.Uint64N(2*chunkTokens)
			case rng.IntN(2) == 0:
				x.rows = x.rows.tight(sp)
				if want := int64(2 * len(x.flat.k)); x.rows.bytes(sp) != want {
					t.Fatalf("seed %d, step %d: tight rows take %d bytes, not %d", seed, step, x.rows.bytes(sp), want)
				}
			case len(writers) < 3:
				writers = append(writers, pair{x.rows.forked(sp, end), x.flat})
			}
			for i, x := range slices.Concat(writers, readers) {
				end := x.flat.base + uint64(len(x.flat.k)/sp.rowBytes())
				if got := x.rows.end(); got != end || x.rows.base != x.flat.base {
					t.Fatalf("seed %d, step %d, of %d: rows [%d, %d), want [%d, %d)", seed, step, i, x.rows.base, got, x.flat.base, end)
				}
				lo := x.flat.base + rng.Uint64N(end-x.flat.base+1)
				hi := lo + rng.Uint64N(end-lo+1)
				want := x.flat.k[(lo-x.flat.base)*rowBytes : (hi-x.flat.base)*rowBytes]
				if k, v := x.rows.slice(sp, lo, hi); !bytes.Equal(k, want) || !bytes.Equal(v, not(want)) {
					t.Fatalf("seed %d, step %d, of %d: other rows in [%d, %d)", seed, step, i, lo, hi)
				}
				some := min(hi, lo+100)
				first := want[:(some-lo)*rowBytes]
				if parts := slices.Concat(x.rows.parts(sp, nil, lo, some)...); !bytes.Equal(parts, slices.Concat(first, not(first))) {
					t.Fatalf("seed %d, step %d, of %d: the parts of [%d, %d) are others", seed, step, i, lo, some)
				}
				var pieces []byte
				head := rng.IntN(sp.kvHeads)
				for p := range x.rows.pieces(sp, lo, hi) {
					if p.start/chunkTokens != (p.end()-1)/chunkTokens {
						t.Fatalf("a piece from %d to %d", p.start, p.end())
					}
					k, v := p.head(sp, head)
					if !bytes.Equal(v, not(k)) {
						t.Fatalf("seed %d, step %d, of %d: other values than keys", seed, step, i)
					}
					pieces = append(pieces, k...)
				}
				want = headOf(want, sp, head)
				if !bytes.Equal(pieces, want) {
					t.Fatalf("seed %d, step %d, of %d: pieces say something else", seed, step, i)
				}
			}
		}
	}
}

func not(b []byte) []byte {
	out := make([]byte, len(b))
	for i, x := range b {
		out[i] = ^x
	}
	return out
}

// headOf returns a KV head's part of rows.
func headOf(rows []byte, sp *spec, head int) (out []byte) {
	for at := head * sp.headBytes(); at < len(rows); at += sp.rowBytes() {
		out = append(out, rows[at:at+sp.headBytes()]...)
	}
	return out
}

// What a prefill appends is copied to its place once: chunks behind the first have room at once, and no more than they may hold.
func TestChunksHaveRoom(t *testing.T) {
	t.Parallel()
	const piece = 256
	sp := &spec{kvHeads: 2, headDim: 16, typ: compress.BF16}
	var r layerRows
	b := make([]byte, piece*sp.rowBytes())
	for range 3 * chunkTokens / piece {
		r = r.appended(sp, b, b, prefill)
		if n := len(r.chunks); n > 1 && r.chunks[n-1].room != chunkTokens {
			t.Fatalf("chunk %d has room for %d rows", n, r.chunks[n-1].room)
		}
	}
	if want := int64(2 * 3 * chunkTokens * sp.rowBytes()); r.bytes(sp) != want {
		t.Errorf("%d bytes, want %d", r.bytes(sp), want)
	}
	// When few come at a time the prefill is over, and what it would have needed is given back, once.
	row := b[:sp.rowBytes()]
	for _, g := range []growth{asNeeded, prefill} {
		x := r.appended(sp, b, b, prefill).appended(sp, row, row, g)
		last := &x.chunks[len(x.chunks)-1]
		if last.n != piece+1 || last.room > 2*(piece+prefillTokens) {
			t.Errorf("%v: %d rows have room for %d", g, last.n, last.room)
		}
		if y := x.appended(sp, row, row, g); &y.chunks[len(y.chunks)-1].k[0] != &last.k[0] {
			t.Errorf("%v: rows were moved twice", g)
		}
	}
	// Where it is known how many come, there is room for these alone, also behind a whole chunk.
	const known = chunkTokens + 300
	many := make([]byte, known*sp.rowBytes())
	for _, g := range []growth{asNeeded, doubling, prefill} {
		r := layerRows{until: known}.appended(sp, b, b, g).appended(sp, many[len(b):], many[len(b):], g)
		if r.end() != known || r.bytes(sp) != int64(2*len(many)) {
			t.Errorf("%v: %d rows in %d bytes, want %d in %d", g, r.end(), r.bytes(sp), known, 2*len(many))
		}
	}
	// Who cuts nothing keeps the room, and a fork has none.
	r = r.appended(sp, b, b, prefill)
	last := len(r.chunks) - 1
	if x := r.upTo(sp, r.end()); x.chunks[last].room != chunkTokens {
		t.Errorf("nothing was cut, and there is room for %d", x.chunks[last].room)
	}
	if x := r.forked(sp, r.end()); x.chunks[last].room != piece {
		t.Errorf("a fork of %d rows has room for %d", piece, x.chunks[last].room)
	}
}
