package server

import (
	"bytes"
	"math"
	"math/rand/v2"
	"slices"
	"testing"
)

// Rows in chunks against rows in one slice: whatever is appended, cut at either
// end or forked, both say the same, and what a reader was given stays as it was.
func TestRowsInChunks(t *testing.T) {
	t.Parallel()
	const rowBytes = 2
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
			end := x.flat.base + uint64(len(x.flat.k)/rowBytes)
			switch op := rng.IntN(10); {
			case op < 6:
				n := 1 + rng.IntN(4)
				if op == 0 {
					n = rng.IntN(2 * chunkTokens)
				}
				k := make([]byte, n*rowBytes)
				for i := range k {
					k[i] = byte(rng.Uint32())
				}
				x.rows = x.rows.appended(k, not(k), rowBytes, op%2 == 0)
				x.flat.k = slices.Concat(x.flat.k, k)
			case op == 6:
				to := x.flat.base + rng.Uint64N(end-x.flat.base+1)
				x.rows = x.rows.upTo(to, rowBytes)
				x.flat.k = x.flat.k[:(to-x.flat.base)*rowBytes]
			case op == 7:
				from := x.flat.base + rng.Uint64N(end-x.flat.base+1)
				x.rows = x.rows.from(from, rowBytes)
				x.flat = flat{from, x.flat.k[(from-x.flat.base)*rowBytes:]}
			case op == 8:
				x.rows.until = end + rng.Uint64N(2*chunkTokens)
			case len(writers) < 3:
				writers = append(writers, pair{x.rows.upTo(end, rowBytes), x.flat})
			}
			for i, x := range slices.Concat(writers, readers) {
				end := x.flat.base + uint64(len(x.flat.k)/rowBytes)
				if got := x.rows.end(rowBytes); got != end || x.rows.base != x.flat.base {
					t.Fatalf("seed %d, step %d, of %d: rows [%d, %d), want [%d, %d)", seed, step, i, x.rows.base, got, x.flat.base, end)
				}
				lo := x.flat.base + rng.Uint64N(end-x.flat.base+1)
				hi := lo + rng.Uint64N(end-lo+1)
				want := x.flat.k[(lo-x.flat.base)*rowBytes : (hi-x.flat.base)*rowBytes]
				if k, v := x.rows.slice(lo, hi, rowBytes); !bytes.Equal(k, want) || !bytes.Equal(v, not(want)) {
					t.Fatalf("seed %d, step %d, of %d: other rows in [%d, %d)", seed, step, i, lo, hi)
				}
				var pieces []byte
				for p := range x.rows.pieces(0, math.MaxUint64, rowBytes) {
					if p.start/chunkTokens != (p.end(rowBytes)-1)/chunkTokens {
						t.Fatalf("a piece from %d to %d", p.start, p.end(rowBytes))
					}
					pieces = append(pieces, p.k...)
				}
				if !bytes.Equal(pieces, x.flat.k) {
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

// What a prefill appends is copied to its place once: chunks behind the first have room at once, and no more than they may hold.
func TestChunksHaveRoom(t *testing.T) {
	t.Parallel()
	const rowBytes, piece = 2, 256
	var r layerRows
	b := make([]byte, piece*rowBytes)
	for range 3 * chunkTokens / piece {
		r = r.appended(b, b, rowBytes, true)
		if n := len(r.chunks); n > 1 && cap(r.chunks[n-1].k) != chunkTokens*rowBytes {
			t.Fatalf("chunk %d has room for %d bytes", n, cap(r.chunks[n-1].k))
		}
	}
	if r.bytes() != 2*3*chunkTokens*rowBytes {
		t.Errorf("%d bytes", r.bytes())
	}
	one := layerRows{until: 10}.appended(b[:rowBytes], b[:rowBytes], rowBytes, false)
	if one.bytes() != 2*10*rowBytes {
		t.Errorf("10 rows are expected, there is room for %d bytes", one.bytes())
	}
}
