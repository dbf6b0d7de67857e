package sparse

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync/atomic"

	"kvtier/attention"
	"kvtier/compress"
	"kvtier/tiers"
	"kvtier/tiers/seal"
)

// memReader holds segments whole and counts lines as the RAM tier does.
type memReader struct {
	parts map[tiers.ID][tiers.NumParts][]byte
	live  atomic.Int64 // pins that were not released
	calls atomic.Int64
	// fail makes the call of that number, from 1, fail.
	fail int64
	zero tiers.Plane // the plane before it reads as zeros; 0: none
}

var errPin = fmt.Errorf("pin refused: %w", tiers.ErrCorrupt)

func newMemReader() *memReader {
	return &memReader{parts: make(map[tiers.ID][tiers.NumParts][]byte)}
}

func (m *memReader) Pin(ctx context.Context, reqs []tiers.Request) ([]tiers.Pin, tiers.Moved, error) {
	var moved tiers.Moved
	if err := ctx.Err(); err != nil {
		return nil, moved, err
	}
	if m.calls.Add(1) == m.fail {
		return nil, moved, errPin
	}
	pins := make([]tiers.Pin, len(reqs))
	for i, r := range reqs {
		off, n, ok := r.Header.Piece(r.Head, r.Plane)
		if !ok {
			panic(fmt.Sprintf("no plane %v", r.Plane))
		}
		whole := m.parts[r.Header.ID][r.Plane.Part()][off : off+n]
		if r.Plane+1 == m.zero {
			whole = make([]byte, n)
		}
		ranges := r.Ranges
		if len(ranges) == 0 {
			ranges = []tiers.Range{{Off: 0, Len: n}}
		}
		var views [][]byte
		lines, last := 0, -1
		for _, x := range ranges {
			views = append(views, whole[x.Off:x.Off+x.Len:x.Off+x.Len])
			first, end := x.Off/64, (x.Off+x.Len-1)/64
			if first == last {
				first++
			}
			lines += end - first + 1
			last = end
		}
		moved.RAM += int64(lines) * 64
		m.live.Add(1)
		pins[i] = tiers.NewPin(views, lines*64, func(a float32) {
			if !(a >= 0 && a <= 1) {
				panic(fmt.Sprintf("attention received: %v", a))
			}
			m.live.Add(-1)
		})
	}
	return pins, moved, nil
}

// without returns a reader in which a plane is all zero.
func (m *memReader) without(p tiers.Plane) *memReader { return &memReader{parts: m.parts, zero: p + 1} }

// add seals rows and stores them.
func (m *memReader) add(r *seal.Rows, o seal.Options) Segment {
	h, parts := seal.Segment(r, o)
	if err := seal.Check(h); err != nil {
		panic(err)
	}
	m.parts[h.ID] = parts
	return Segment{Header: h, Limit: h.Tokens, Low: h.Blocks(tiers.PartLow) > 0}
}

// sample is a made-up context of one layer: k and v are [n][heads][d].
type sample struct {
	n, heads, d int
	k, v        []float32
}

// newSample makes keys that gather around few centres, with channels of
// different size, as real ones do.
func newSample(rng *rand.Rand, n, heads, d int) *sample {
	s := &sample{n, heads, d, make([]float32, n*heads*d), make([]float32, n*heads*d)}
	centres := make([]float32, 8*d)
	for i := range centres {
		centres[i] = 1.5 * float32(rng.NormFloat64())
	}
	for t := range n * heads {
		c := rng.IntN(8)
		for j := range d {
			s.k[t*d+j] = centres[c*d+j] + float32(rng.NormFloat64())*(.3+float32(j%7)/5)
			s.v[t*d+j] = float32(c%3) + float32(rng.NormFloat64())
		}
	}
	return s
}

// rows returns tokens [lo, hi) as appended.
func (s *sample) rows(lo, hi int, t compress.ElementType) *seal.Rows {
	w := s.heads * s.d
	pack := func(x []float32) []byte {
		b := make([]byte, len(x)*t.Size())
		compress.FromFloat32(b, x, t)
		return b
	}
	return &seal.Rows{Layer: 3, Start: uint64(lo), Heads: s.heads, HeadDim: s.d, Type: t,
		K: pack(s.k[lo*w : hi*w]), V: pack(s.v[lo*w : hi*w])}
}

// head returns one head's rows [lo, hi) as [n][d].
func (s *sample) head(x []float32, head, lo, hi int) []float32 {
	var out []float32
	for t := lo; t < hi; t++ {
		at := (t*s.heads + head) * s.d
		out = append(out, x[at:at+s.d]...)
	}
	return out
}

// metrics are those of random queries.
func (s *sample) metrics(rng *rand.Rand) []*attention.Metric {
	out := make([]*attention.Metric, s.heads)
	for i := range out {
		sum := attention.NewQuerySum(s.d)
		sum.Add(randn(rng, 2*s.d*s.d, 1))
		out[i] = sum.Metric()
	}
	return out
}

func randn(rng *rand.Rand, n int, scale float32) []float32 {
	x := make([]float32, n)
	for i := range x {
		x[i] = scale * float32(rng.NormFloat64())
	}
	return x
}
