package tiers

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"reflect"
	"testing"
)

// randomSegment makes a header with pieces of any size.
func randomSegment(rng *rand.Rand) (*Header, [NumParts][]byte, [][NumPlanes][]byte) {
	heads := 1 + rng.IntN(4)
	h := Header{Profile: Profile(1 + rng.IntN(3)), Type: uint8(rng.IntN(256)), HeadDim: 16 * (1 + rng.IntN(16)),
		Layer: rng.IntN(1 << 20), Start: rng.Uint64(), Tokens: rng.IntN(SegmentTokens + 1)}
	pieces := make([][NumPlanes][]byte, heads)
	for i := range pieces {
		h.Heads = append(h.Heads, HeadInfo{Body: rng.IntN(2049), Outliers: rng.IntN(65), Sinks: rng.IntN(17),
			KeyExp: rng.IntN(224) - 110, QueryNorm2: rng.Float32(), CodecError: rng.Float32()})
		for p := range pieces[i] {
			if rng.IntN(3) > 0 {
				b := make([]byte, rng.IntN(3000))
				for j := range b {
					b[j] = byte(rng.Uint32())
				}
				pieces[i][p] = b
			}
		}
	}
	out, parts := NewHeader(h, pieces)
	return out, parts, pieces
}

func TestHeaderRoundTrip(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	for range 100 {
		h, parts, pieces := randomSegment(rng)
		got, err := UnmarshalHeader(h.Marshal())
		if err != nil {
			t.Fatal(err)
		}
		if !reflect.DeepEqual(got, h) {
			t.Fatalf("got %+v\nwant %+v", got, h)
		}
		for part := range NumParts {
			if h.Bytes(part) != int64(len(parts[part])) || h.Bytes(part) != int64(h.Blocks(part))*BlockSize {
				t.Fatalf("part %d: %d bytes, %d blocks, image of %d", part, h.Bytes(part), h.Blocks(part), len(parts[part]))
			}
			if err := h.CheckBlocks(part, 0, parts[part]); err != nil {
				t.Fatal(err)
			}
		}
		listed := make(map[[2]int][]byte)
		for _, p := range h.Pieces(parts) {
			listed[[2]int{p.Head, int(p.Plane)}] = p.Bytes
		}
		for head := range pieces {
			for p, want := range pieces[head] {
				off, n, ok := h.Piece(head, Plane(p))
				if ok != (len(want) > 0) || n != len(want) || off%pieceAlign != 0 {
					t.Fatalf("head %d, %v: [%d, +%d) %v, want %d bytes", head, Plane(p), off, n, ok, len(want))
				}
				if !bytes.Equal(listed[[2]int{head, p}], want) {
					t.Fatalf("head %d, %v: other bytes", head, Plane(p))
				}
			}
		}
		for _, none := range []struct {
			head int
			p    Plane
		}{{-1, 0}, {len(pieces), 0}, {0, NumPlanes}, {0, 255}} {
			if _, _, ok := h.Piece(none.head, none.p); ok {
				t.Fatalf("there is a piece %v", none)
			}
		}
	}
}

// Every flipped byte of a header is found.
func TestHeaderFlippedBytes(t *testing.T) {
	h, _, _ := randomSegment(rand.New(rand.NewPCG(3, 4)))
	b := h.Marshal()
	for i := range b {
		for _, x := range []byte{1, 0x80, 0xff} {
			b[i] ^= x
			if _, err := UnmarshalHeader(b); !errors.Is(err, ErrCorrupt) {
				t.Fatalf("byte %d ^ %#x: %v", i, x, err)
			}
			b[i] ^= x
		}
	}
	for n := range b {
		if _, err := UnmarshalHeader(b[:n]); !errors.Is(err, ErrCorrupt) {
			t.Fatalf("%d of %d bytes: %v", n, len(b), err)
		}
	}
	if _, err := UnmarshalHeader(append(b, 0)); !errors.Is(err, ErrCorrupt) {
		t.Fatalf("a byte too many: %v", err)
	}
}

// resum gives changed header bytes a right checksum, as an attacker or a bug would.
func resum(b []byte) []byte {
	b = bytes.Clone(b[:len(b)-4])
	return appendSum(b)
}

// A header whose checksum is right is still checked for what it claims.
func TestHeaderClaims(t *testing.T) {
	h, _, _ := randomSegment(rand.New(rand.NewPCG(5, 6)))
	b := h.Marshal()
	for _, c := range []struct {
		name string
		at   int
		to   byte
		want error
	}{
		{"magic", 0, 'X', ErrCorrupt},
		{"version", 8, formatVersion + 1, ErrVersion},
		{"profile 0", 12, 0, ErrCorrupt},
		{"profile 9", 12, 9, ErrCorrupt},
		{"heads", 33, 0xff, ErrCorrupt},
		{"planes", 34, byte(NumPlanes) + 1, ErrCorrupt},
		{"tokens", 30, 0xff, ErrCorrupt},
		{"head dimension", 15, 0xff, ErrCorrupt},
		{"blocks", len(b) - 4 - 4 - 4*h.Blocks(PartLow), byte(h.Blocks(PartLow)) + 1, ErrCorrupt},
	} {
		x := bytes.Clone(b)
		x[c.at] = c.to
		if _, err := UnmarshalHeader(resum(x)); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", c.name, err, c.want)
		}
	}
}

// Blocks pass only in their own place of their own segment.
func TestCheckBlocks(t *testing.T) {
	rng := rand.New(rand.NewPCG(7, 8))
	h, parts, pieces := randomSegment(rng)
	b := parts[PartMain]
	if len(b) < 3*BlockSize {
		t.Fatal("too few blocks")
	}
	if err := h.CheckBlocks(PartMain, 1, b[BlockSize:3*BlockSize]); err != nil {
		t.Fatal(err)
	}
	bad := func(name string, err error) {
		if !errors.Is(err, ErrCorrupt) {
			t.Errorf("%s: %v", name, err)
		}
	}
	bad("another place", h.CheckBlocks(PartMain, 0, b[BlockSize:2*BlockSize]))
	bad("half a block", h.CheckBlocks(PartMain, 0, b[:BlockSize/2]))
	bad("past the end", h.CheckBlocks(PartMain, h.Blocks(PartMain), b[:BlockSize]))
	bad("before the start", h.CheckBlocks(PartMain, -1, b[:BlockSize]))
	for i := 0; i < BlockSize; i += 61 {
		b[i] ^= 4
		bad("flipped bit", h.CheckBlocks(PartMain, 0, b[:BlockSize]))
		b[i] ^= 4
	}
	// The same bytes under another header have another id, and other checksums.
	other := *h
	other.Layer++
	o, same := NewHeader(other, pieces)
	if o.ID == h.ID || !bytes.Equal(same[PartMain], b) {
		t.Fatal("the id does not cover the header")
	}
	if o.crcs[PartMain][0] == h.crcs[PartMain][0] {
		t.Fatal("checksums do not depend on the id")
	}
	pieces[0][0] = append(pieces[0][0], 1)
	if o, _ := NewHeader(*h, pieces); o.ID == h.ID {
		t.Fatal("the id does not cover the pieces")
	}
}

func TestPlanes(t *testing.T) {
	for p := range NumPlanes {
		if want := map[bool]Part{true: PartLow, false: PartMain}[p == PlaneK8 || p == PlaneV8]; p.Part() != want {
			t.Errorf("%v lies in part %d", p, p.Part())
		}
		if !AllPlanes.Has(p) {
			t.Errorf("%v is not in AllPlanes", p)
		}
	}
	if s := Plane(99).String(); s != "plane(99)" {
		t.Error(s)
	}
}

func FuzzUnmarshalHeader(f *testing.F) {
	rng := rand.New(rand.NewPCG(9, 10))
	for range 4 {
		h, _, _ := randomSegment(rng)
		f.Add(h.Marshal())
	}
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) >= 4 {
			b = resum(b) // or nothing gets past the checksum
		}
		h, err := UnmarshalHeader(b)
		if err != nil {
			if !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrVersion) {
				t.Fatalf("error of no kind: %v", err)
			}
			return
		}
		if !bytes.Equal(h.Marshal(), b) {
			t.Fatal("does not marshal to what was read")
		}
		for head := range h.Heads {
			for p := range NumPlanes {
				off, n, ok := h.Piece(head, p)
				if ok && int64(off+n) > h.Bytes(p.Part()) {
					t.Fatal("a piece outside its part")
				}
			}
		}
	})
}
