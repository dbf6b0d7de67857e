package memtier_test

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"testing"

	"kvtier/attention"
	"kvtier/bench/memtier"
	"kvtier/compress"
	"kvtier/server/sparse"
	"kvtier/tiers"
	"kvtier/tiers/ram"
	"kvtier/tiers/seal"
)

var _ sparse.Reader = (*memtier.Tier)(nil)

const (
	tokens, heads, dim = 300, 2, 32
)

// segment seals random rows.
func segment(rng *rand.Rand) (*tiers.Header, [tiers.NumParts][]byte) {
	rows := func() []byte {
		x := make([]float32, tokens*heads*dim)
		for i := range x {
			x[i] = float32(rng.NormFloat64())
		}
		b := make([]byte, len(x)*compress.BF16.Size())
		compress.FromFloat32(b, x, compress.BF16)
		return b
	}
	m := attention.NewQuerySum(dim).Metric()
	return seal.Segment(&seal.Rows{Heads: heads, HeadDim: dim, Type: compress.BF16, K: rows(), V: rows()},
		seal.Options{Profile: tiers.ProfileBalanced, Sinks: 4, Metrics: []*attention.Metric{m, m}})
}

// requests asks for random ranges of every piece, and for whole pieces.
func requests(rng *rand.Rand, h *tiers.Header) (out []tiers.Request) {
	for head := range heads {
		for p := range tiers.NumPlanes {
			_, n, ok := h.Piece(head, p)
			if !ok {
				continue
			}
			r := tiers.Request{Header: h, Head: head, Plane: p}
			out = append(out, r)
			for range 20 {
				r.Ranges = nil
				for off := 0; off < n; off += rng.IntN(200) {
					r.Ranges = append(r.Ranges, tiers.Range{Off: off, Len: rng.IntN(min(300, n-off) + 1)})
				}
				out = append(out, r)
			}
		}
	}
	return out
}

// The RAM tier is the specification of the account.
func TestCountsAsTheRAMTierDoes(t *testing.T) {
	ctx, rng := context.Background(), rand.New(rand.NewPCG(1, 2))
	h, parts := segment(rng)
	mine := memtier.New()
	if err := mine.Add(h, parts); err != nil {
		t.Fatal(err)
	}
	theirs, err := ram.New(ram.Options{Bytes: 64 << 20})
	if err != nil {
		t.Fatal(err)
	}
	defer theirs.Close()
	if err := theirs.Put(ctx, h, h.Pieces(parts)); err != nil {
		t.Fatal(err)
	}
	reqs := requests(rng, h)
	got, moved, err := mine.Pin(ctx, reqs)
	if err != nil {
		t.Fatal(err)
	}
	want, err := theirs.Pin(ctx, reqs)
	if err != nil {
		t.Fatal(err)
	}
	if live := mine.Live(); live != int64(len(reqs)) {
		t.Errorf("%d pins live, want %d", live, len(reqs))
	}
	var sum int64
	for i := range reqs {
		if !want[i].Held() || got[i].Transferred != want[i].Transferred {
			t.Errorf("request %d: %d bytes, the RAM tier counts %d", i, got[i].Transferred, want[i].Transferred)
		}
		for j := range want[i].Ranges {
			if !bytes.Equal(got[i].Ranges[j], want[i].Ranges[j]) {
				t.Errorf("request %d, range %d: other bytes", i, j)
			}
		}
		sum += int64(want[i].Transferred)
		got[i].Release(0)
		want[i].Release(0)
	}
	if moved.RAM != sum || moved.NVMe != 0 {
		t.Errorf("moved %+v, want %d from RAM", moved, sum)
	}
	if live := mine.Live(); live != 0 {
		t.Errorf("%d pins live after all were released", live)
	}
}

func TestRefuses(t *testing.T) {
	ctx, rng := context.Background(), rand.New(rand.NewPCG(3, 4))
	h, parts := segment(rng)
	tier := memtier.New()
	if _, _, err := tier.Pin(ctx, []tiers.Request{{Header: h}}); !errors.Is(err, tiers.ErrNotFound) {
		t.Errorf("a segment that was not added: %v", err)
	}
	bad := parts
	bad[tiers.PartMain] = bytes.Clone(parts[tiers.PartMain])
	bad[tiers.PartMain][100] ^= 1
	if err := tier.Add(h, bad); !errors.Is(err, tiers.ErrCorrupt) {
		t.Errorf("a flipped bit: %v", err)
	}
	if err := tier.Add(h, [tiers.NumParts][]byte{}); !errors.Is(err, tiers.ErrCorrupt) {
		t.Errorf("no bytes: %v", err)
	}
	if err := tier.Add(h, parts); err != nil {
		t.Fatal(err)
	}
	_, n, _ := h.Piece(0, tiers.PlaneV4)
	outside := tiers.Request{Header: h, Plane: tiers.PlaneV4, Ranges: []tiers.Range{{Off: n - 1, Len: 2}}}
	if _, _, err := tier.Pin(ctx, []tiers.Request{outside}); err == nil {
		t.Error("a range outside its piece was pinned")
	}
	if _, _, err := tier.Pin(ctx, []tiers.Request{{Header: h, Plane: tiers.PlaneK8}}); !errors.Is(err, tiers.ErrNotFound) {
		t.Errorf("a plane that the segment does not have: %v", err)
	}
	if live := tier.Live(); live != 0 {
		t.Errorf("%d pins live after failures", live)
	}
}

func TestClone(t *testing.T) {
	h, parts := segment(rand.New(rand.NewPCG(3, 4)))
	tier := memtier.New()
	if err := tier.Add(h, parts); err != nil {
		t.Fatal(err)
	}
	var placed int64
	clone := tier.Clone(func(part []byte) []byte {
		placed += int64(len(part))
		return bytes.Clone(part)
	})
	var want int64
	for p := range tiers.NumParts {
		want += h.Bytes(p)
	}
	if placed != want {
		t.Errorf("%d bytes were placed, not %d", placed, want)
	}
	before, after := tier.Piece(h, 1, tiers.PlanePages), clone.Piece(h, 1, tiers.PlanePages)
	if !bytes.Equal(before, after) || &before[0] == &after[0] {
		t.Error("no copy")
	}
}
