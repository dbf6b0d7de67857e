package store

import (
	"math/rand/v2"
	"testing"
	"time"

	"kvtier/attention"
	"kvtier/compress"
	"kvtier/tiers"
	"kvtier/tiers/seal"
)

// sealed returns a small segment.
func sealed(seed uint64) (*tiers.Header, [tiers.NumParts][]byte) {
	return sealedAs(seed, seal.Options{Profile: tiers.ProfileBalanced})
}

// sealedLow is sealed, with low planes.
func sealedLow(seed uint64) (*tiers.Header, [tiers.NumParts][]byte) {
	return sealedAs(seed, seal.Options{Profile: tiers.ProfileBalanced, Low: true})
}

func sealedAs(seed uint64, o seal.Options) (*tiers.Header, [tiers.NumParts][]byte) {
	const n, heads, d = 300, 2, 64
	rng := rand.New(rand.NewPCG(seed, 9))
	rows := func() []byte {
		x := make([]float32, n*heads*d)
		for i := range x {
			x[i] = float32(rng.NormFloat64())
		}
		b := make([]byte, len(x)*compress.BF16.Size())
		compress.FromFloat32(b, x, compress.BF16)
		return b
	}
	for range heads {
		o.Metrics = append(o.Metrics, attention.NewQuerySum(d).Metric())
	}
	return seal.Segment(&seal.Rows{Start: seed * tiers.SegmentTokens, Heads: heads, HeadDim: d, Type: compress.BF16, K: rows(), V: rows()}, o)
}

// After a start the means of all segments' pages are in RAM, and nothing else is that nobody asked for.
func TestMeansComeUp(t *testing.T) {
	dir := t.TempDir()
	open := func() *Store {
		s, err := Open(t.Context(), dir, Options{RAMBytes: 32 << 20, DiskBytes: 64 << 20})
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	s := open()
	var headers []*tiers.Header
	b := s.NewBatch()
	for i := range uint64(70) {
		h, parts := sealed(i)
		if err := b.PutSegment(t.Context(), h, parts); err != nil {
			t.Fatal(err)
		}
		headers = append(headers, h)
	}
	if err := b.Commit(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	resident := func(plane tiers.Plane) (here, all int) {
		for _, h := range headers {
			for head := range h.Heads {
				if _, _, ok := h.Piece(head, plane); ok {
					all++
					if s.Resident(h.ID, head, plane) {
						here++
					}
				}
			}
		}
		return here, all
	}
	if here, all := resident(tiers.PlanePages); here < all || all == 0 {
		t.Errorf("%d of %d means are in RAM once they are sealed", here, all)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = open()
	defer s.Close()
	for range 500 {
		if here, all := resident(tiers.PlanePages); here == all {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	if here, all := resident(tiers.PlanePages); here < all {
		t.Errorf("%d of %d means came up", here, all)
	}
	if here, _ := resident(tiers.PlaneV4); here > 0 {
		t.Errorf("%d pieces of values came up", here)
	}
}
