package seal

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"testing"

	"kvtier/tiers"
)

// What was sealed is right, and whatever is made of it is no panic.
func FuzzCheckImage(f *testing.F) {
	type image struct {
		h    *tiers.Header
		main []byte
	}
	var images []image
	for p := tiers.ProfileExact; p <= tiers.ProfileBalanced; p++ {
		r, o := golden()
		o.Profile = p
		h, parts := Segment(r, o)
		images = append(images, image{h, parts[tiers.PartMain]})
	}
	r, _ := golden()
	h, parts := Window(r, tiers.ProfileExact, r.Start, r.Tokens())
	images = append(images, image{h, parts[tiers.PartMain]})
	for i := range uint64(40) {
		f.Add(i, uint8(i*7%100))
	}
	f.Fuzz(func(t *testing.T, seed uint64, flips uint8) {
		rng := rand.New(rand.NewPCG(seed, 1))
		m := images[rng.IntN(len(images))]
		b := bytes.Clone(m.main)
		if err := CheckImage(m.h, tiers.PartMain, b); err != nil {
			t.Fatalf("as it was sealed: %v", err)
		}
		for range flips {
			b[rng.IntN(len(b))] ^= byte(1 + rng.IntN(255))
		}
		b = b[:len(b)-rng.IntN(2)*rng.IntN(len(b))]
		err := CheckImage(m.h, tiers.PartMain, b)
		if err != nil && !errors.Is(err, tiers.ErrCorrupt) || err == nil && len(b) < len(m.main) {
			t.Errorf("%d of %d bytes: %v", len(b), len(m.main), err)
		}
	})
}

// Two tokens in one place, an order of bits that is none, rows that do not
// unpack: noticed although no checksum is looked at.
func TestCheckImageNotices(t *testing.T) {
	r, o := golden()
	o.Profile = tiers.ProfileExact
	h, parts := Segment(r, o)
	for _, p := range []tiers.Plane{tiers.PlaneOrder, tiers.PlaneSteps, tiers.PlaneKX, tiers.PlaneVX} {
		b := bytes.Clone(parts[tiers.PartMain])
		off, _, _ := h.Piece(0, p)
		copy(b[off:], b[off+2:off+4])
		if err := CheckImage(h, tiers.PartMain, b); !errors.Is(err, tiers.ErrCorrupt) {
			t.Errorf("%v: %v", p, err)
		}
	}
}
