package tiertest

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"testing"

	"kvtier/tiers"
)

// Limits that the suite opens tiers with, in bytes.
const (
	roomy = 64 << 20
	tight = 1 << 20
)

// Run tests a tier. open makes an empty one with a byte limit; the suite closes it.
func Run(t *testing.T, open func(t *testing.T, limit int64) tiers.Tier) {
	for _, c := range []struct {
		name  string
		limit int64
		test  func(*suite)
	}{
		{"PutPin", roomy, (*suite).putPin},
		{"Ranges", roomy, (*suite).ranges},
		{"RangeOutside", roomy, (*suite).rangeOutside},
		{"PutTwice", roomy, (*suite).putTwice},
		{"PutWrongSize", roomy, (*suite).putWrongSize},
		{"Miss", roomy, (*suite).miss},
		{"DropPinned", roomy, (*suite).dropPinned},
		{"DropPlanes", roomy, (*suite).dropPlanes},
		{"Limit", tight, (*suite).limit},
		{"LimitPinned", tight, (*suite).limitPinned},
		{"TooLarge", tight, (*suite).tooLarge},
		{"Cancelled", roomy, (*suite).cancelled},
		{"Corrupt", roomy, (*suite).corrupt},
		{"Concurrent", roomy, (*suite).concurrent},
		{"ConcurrentTight", tight, (*suite).concurrent},
		{"Close", roomy, (*suite).close},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := &suite{T: t, tier: open(t, c.limit), max: c.limit}
			c.test(s)
			s.usage()
			s.ok(s.tier.Close())
		})
	}
	t.Run("Model", func(t *testing.T) { model(t, open) })
}

type suite struct {
	*testing.T
	tier tiers.Tier
	max  int64
}

var ctx = context.Background()

func (s *suite) ok(err error) {
	s.Helper()
	if err != nil {
		s.Fatal(err)
	}
}

func (s *suite) is(err, want error) {
	s.Helper()
	if !errors.Is(err, want) {
		s.Fatalf("error %v, want %v", err, want)
	}
}

// usage checks what holds at any time.
func (s *suite) usage() tiers.Usage {
	s.Helper()
	u := s.tier.Usage()
	if u.BytesLimit != s.max || u.BytesUsed < 0 || u.BytesUsed > u.BytesLimit {
		s.Fatalf("%d bytes used of %d, opened with %d", u.BytesUsed, u.BytesLimit, s.max)
	}
	if u.Pieces < 0 || u.Hits < 0 || u.Misses < 0 || u.BytesRead < 0 || u.BytesWritten < 0 {
		s.Fatalf("usage %+v", u)
	}
	return u
}

// pin pins and checks that what is held has the right bytes.
func (s *suite) pin(h *tiers.Header, pieces []tiers.Piece) []tiers.Pin {
	s.Helper()
	pins, err := s.tier.Pin(ctx, whole(h, pieces))
	s.ok(err)
	if len(pins) != len(pieces) {
		s.Fatalf("%d pins for %d requests", len(pins), len(pieces))
	}
	s.compare(pins, pieces)
	return pins
}

func (s *suite) compare(pins []tiers.Pin, pieces []tiers.Piece) {
	s.Helper()
	for i := range pins {
		if pins[i].Held() && (len(pins[i].Ranges) != 1 || !bytes.Equal(pins[i].Ranges[0], pieces[i].Bytes)) {
			s.Fatalf("head %d, %v: other bytes", pieces[i].Head, pieces[i].Plane)
		}
	}
}

// held says which pieces the tier holds.
func (s *suite) held(h *tiers.Header, pieces []tiers.Piece) (held []bool, n int) {
	s.Helper()
	pins := s.pin(h, pieces)
	held = make([]bool, len(pins))
	for i := range pins {
		if held[i] = pins[i].Held(); held[i] {
			n++
		}
		pins[i].Release(0)
	}
	return held, n
}

func (s *suite) wantHeld(h *tiers.Header, pieces []tiers.Piece, want int) {
	s.Helper()
	if _, n := s.held(h, pieces); n != want {
		s.Fatalf("%d of %d pieces held, want %d", n, len(pieces), want)
	}
}

func (s *suite) putPin() {
	for seed := range uint64(8) {
		h, pieces := Segment(seed, 1+int(seed)%5, 20000)
		before := s.usage()
		s.ok(s.tier.Put(ctx, h, pieces))
		pins := s.pin(h, pieces)
		read := 0
		for i := range pins {
			if !pins[i].Held() {
				s.Fatalf("piece %d is not held", i)
			}
			read += pins[i].Transferred
			pins[i].Release(rand.Float32())
			pins[i].Release(1) // does nothing
		}
		after := s.usage()
		if after.BytesWritten-before.BytesWritten < size(pieces) {
			s.Fatalf("%d bytes written, %d put", after.BytesWritten-before.BytesWritten, size(pieces))
		}
		if got := after.BytesRead - before.BytesRead; got != int64(read) || got < size(pieces) {
			s.Fatalf("%d bytes read, the pins say %d, the pieces have %d", got, read, size(pieces))
		}
		if after.Hits-before.Hits != int64(len(pieces)) || after.Misses != before.Misses {
			s.Fatalf("%d hits, %d misses, want %d, 0", after.Hits-before.Hits, after.Misses-before.Misses, len(pieces))
		}
		if after.Pieces <= before.Pieces || after.BytesUsed < size(pieces) {
			s.Fatalf("usage before %+v, after %+v", before, after)
		}
	}
}

func (s *suite) ranges() {
	rng := rand.New(rand.NewPCG(1, 2))
	h, pieces := Segment(7, 4, 60000)
	s.ok(s.tier.Put(ctx, h, pieces))
	for range 200 {
		var reqs []tiers.Request
		var of []tiers.Piece
		for range 1 + rng.IntN(12) {
			p := pieces[rng.IntN(len(pieces))]
			of = append(of, p)
			reqs = append(reqs, tiers.Request{Header: h, Head: p.Head, Plane: p.Plane, Ranges: someRanges(rng, len(p.Bytes))})
		}
		pins, err := s.tier.Pin(ctx, reqs)
		s.ok(err)
		for i := range pins {
			s.sameRanges(&pins[i], reqs[i], of[i].Bytes)
		}
		rng.Shuffle(len(pins), func(i, j int) { pins[i], pins[j] = pins[j], pins[i] })
		for i := range pins {
			pins[i].Release(0.5)
		}
	}
}

func (s *suite) sameRanges(pin *tiers.Pin, r tiers.Request, piece []byte) {
	s.Helper()
	ranges := r.Ranges
	if len(ranges) == 0 {
		ranges = []tiers.Range{{Off: 0, Len: len(piece)}}
	}
	if !pin.Held() || len(pin.Ranges) != len(ranges) {
		s.Fatalf("held %v, %d ranges, want %d", pin.Held(), len(pin.Ranges), len(ranges))
	}
	for j, g := range ranges {
		if !bytes.Equal(pin.Ranges[j], piece[g.Off:g.Off+g.Len]) {
			s.Fatalf("head %d, %v, range %+v: other bytes", r.Head, r.Plane, g)
		}
	}
}

func (s *suite) rangeOutside() {
	h, pieces := Segment(3, 1, 1000)
	s.ok(s.tier.Put(ctx, h, pieces))
	n := len(pieces[0].Bytes)
	for _, g := range []tiers.Range{{Off: -1, Len: 1}, {Off: 0, Len: -1}, {Off: 0, Len: n + 1}, {Off: n, Len: 1},
		{Off: n + 1, Len: 0}, {Off: 1, Len: int(^uint(0) >> 1)}} {
		_, err := s.tier.Pin(ctx, []tiers.Request{
			{Header: h, Head: pieces[0].Head, Plane: pieces[0].Plane, Ranges: []tiers.Range{g}}})
		if err == nil {
			s.Fatalf("range %+v of %d bytes: no error", g, n)
		}
	}
}

func (s *suite) putTwice() {
	h, pieces := Segment(11, 3, 9000)
	s.ok(s.tier.Put(ctx, h, pieces))
	pins := s.pin(h, pieces)
	before := s.usage()
	s.ok(s.tier.Put(ctx, h, pieces))
	if after := s.usage(); after.BytesUsed != before.BytesUsed || after.Pieces != before.Pieces {
		s.Fatalf("before %+v, after %+v", before, after)
	}
	s.compare(pins, pieces)
	for i := range pins {
		pins[i].Release(0)
	}
	s.wantHeld(h, pieces, len(pieces))
}

func (s *suite) putWrongSize() {
	h, pieces := Segment(12, 2, 9000)
	pieces[1].Bytes = append([]byte{1}, pieces[1].Bytes...)
	s.is(s.tier.Put(ctx, h, pieces), tiers.ErrCorrupt)
	pieces[1].Bytes = pieces[1].Bytes[1:]
	s.wantHeld(h, pieces, 0)
}

func (s *suite) miss() {
	h, pieces := Segment(13, 2, 9000)
	other, otherPieces := Segment(14, 2, 9000)
	s.ok(s.tier.Put(ctx, other, otherPieces))
	s.wantHeld(h, pieces, 0)
	if u := s.usage(); u.Misses != int64(len(pieces)) {
		s.Fatalf("%d misses, want %d", u.Misses, len(pieces))
	}
	pins, err := s.tier.Pin(ctx, append(whole(h, pieces[:1]), whole(other, otherPieces[:1])...))
	s.ok(err)
	if pins[0].Held() || !pins[1].Held() {
		s.Fatal("a miss and a hit in one call: not in order")
	}
	pins[0].Release(1)
	pins[1].Release(1)
	s.ok(s.tier.Drop(h.ID, tiers.AllPlanes))
}

func (s *suite) close() {
	h, pieces := Segment(15, 2, 9000)
	s.ok(s.tier.Put(ctx, h, pieces))
	s.wantHeld(h, pieces, len(pieces))
	s.ok(s.tier.Close())
	s.is(s.tier.Put(ctx, h, pieces), tiers.ErrClosed)
	_, err := s.tier.Pin(ctx, whole(h, pieces))
	s.is(err, tiers.ErrClosed)
	s.is(s.tier.Drop(h.ID, tiers.AllPlanes), tiers.ErrClosed)
}

func (s *suite) cancelled() {
	h, pieces := Segment(16, 1, 9000)
	dead, cancel := context.WithCancel(ctx)
	cancel()
	s.is(s.tier.Put(dead, h, pieces), context.Canceled)
	_, err := s.tier.Pin(dead, whole(h, pieces))
	s.is(err, context.Canceled)
	s.wantHeld(h, pieces, 0)
}
