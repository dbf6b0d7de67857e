package tiertest

import (
	"encoding/binary"
	"math/rand/v2"

	"kvtier/tiers"
)

// Segment makes a random segment with a real header: heads KV heads, pieces of
// up to size bytes. Lengths are ragged, some planes are absent, the main part
// never is. The same arguments give the same segment.
func Segment(seed uint64, heads, size int) (*tiers.Header, []tiers.Piece) {
	rng := rand.New(rand.NewPCG(seed, 0x7f4a7c15))
	pieces := make([][tiers.NumPlanes][]byte, heads)
	low := rng.IntN(4) > 0
	for head := range pieces {
		for p := range tiers.NumPlanes {
			if absent := rng.IntN(4) == 0; absent && p != tiers.PlanePages || p.Part() == tiers.PartLow && !low {
				continue
			}
			n := 1 + rng.IntN(size)
			b := make([]byte, 0, n+8)
			for len(b) < n {
				b = binary.LittleEndian.AppendUint64(b, rng.Uint64())
			}
			pieces[head][p] = b[:n]
		}
	}
	h := tiers.Header{Profile: tiers.ProfileNeutral, HeadDim: 128, Layer: rng.IntN(32),
		Start: seed * tiers.SegmentTokens, Tokens: tiers.SegmentTokens, Heads: make([]tiers.HeadInfo, heads)}
	for i := range h.Heads {
		h.Heads[i] = tiers.HeadInfo{Body: tiers.SegmentTokens - tiers.PageTokens, Outliers: tiers.PageTokens}
	}
	out, parts := tiers.NewHeader(h, pieces)
	return out, out.Pieces(parts)
}

// InPart returns the pieces that lie in a part.
func InPart(pieces []tiers.Piece, part tiers.Part) (out []tiers.Piece) {
	for _, p := range pieces {
		if p.Plane.Part() == part {
			out = append(out, p)
		}
	}
	return out
}

// whole asks for pieces of h, each whole.
func whole(h *tiers.Header, pieces []tiers.Piece) []tiers.Request {
	reqs := make([]tiers.Request, len(pieces))
	for i, p := range pieces {
		reqs[i] = tiers.Request{Header: h, Head: p.Head, Plane: p.Plane}
	}
	return reqs
}

// someRanges picks ranges of n bytes: ascending, sometimes touching,
// overlapping or empty.
func someRanges(rng *rand.Rand, n int) []tiers.Range {
	out := make([]tiers.Range, rng.IntN(5))
	at := 0
	for i := range out {
		if rng.IntN(3) > 0 {
			at += rng.IntN(n - at + 1)
		}
		out[i] = tiers.Range{Off: at, Len: rng.IntN(n - at + 1)}
		if rng.IntN(3) > 0 {
			at += out[i].Len / 2
		}
	}
	return out
}

func size(pieces []tiers.Piece) (n int64) {
	for _, p := range pieces {
		n += int64(len(p.Bytes))
	}
	return n
}
