package compress

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math/rand"
	"testing"

	"pgregory.net/rapid"
)

var elementTypes = []ElementType{F32, BF16, F16}

// checkExact packs rows and unpacks every page; it returns bits per value.
func checkExact(t interface{ Fatalf(string, ...any) }, rows []byte, n, d int, typ ElementType) float64 {
	packed := PackExact(rows, n, d, typ)
	size := d * typ.Size()
	for page := range ExactPages(n) {
		want := rows[page*64*size : min((page+1)*64, n)*size]
		got := make([]byte, len(want))
		if err := UnpackExactPage(got, packed, page, n, d, typ); err != nil {
			t.Fatalf("%v n %d d %d page %d: %v", typ, n, d, page, err)
		}
		if !bytes.Equal(got, want) {
			t.Fatalf("%v n %d d %d page %d differs", typ, n, d, page)
		}
	}
	if most := len(rows) + 5*ExactPages(n); len(packed) > most {
		t.Fatalf("%d bytes became %d, more than %d", len(rows), len(packed), most)
	}
	return float64(8*len(packed)) / float64(n*d)
}

func TestExactRows(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		x, n, d := drawRows(t, 300)
		typ := rapid.SampledFrom(elementTypes).Draw(t, "type")
		rows := make([]byte, len(x)*typ.Size())
		FromFloat32(rows, x, typ)
		checkExact(t, rows, n, d, typ)
	})
}

func TestExactEveryShape(t *testing.T) {
	for _, typ := range elementTypes {
		for _, d := range allDims {
			for _, n := range []int{1, 63, 64, 65, 2048} {
				if n == 2048 && d != 64 {
					continue
				}
				rows := make([]byte, n*d*typ.Size())
				FromFloat32(rows, normal(1, n, d), typ)
				bits := checkExact(t, rows, n, d, typ)
				if n == 2048 {
					t.Logf("%v: %.2f bits a value", typ, bits)
				}
			}
		}
	}
}

// Any bits at all survive: NaNs, infinities, subnormals, minus zero.
func TestExactAnyBits(t *testing.T) {
	r := rand.New(rand.NewSource(1))
	for _, typ := range elementTypes {
		n, d := 70, 32
		rows := make([]byte, n*d*typ.Size())
		for range 20 {
			r.Read(rows)
			checkExact(t, rows, n, d, typ)
			for i := range rows { // few exponents, many escapes
				if r.Intn(3) > 0 {
					rows[i] = 0
				}
			}
			checkExact(t, rows, n, d, typ)
		}
		checkExact(t, make([]byte, len(rows)), n, d, typ)
		checkExact(t, bytes.Repeat([]byte{0xff}, len(rows)), n, d, typ)
	}
}

// Each width of code is chosen by some page, and read back.
func TestExactWidths(t *testing.T) {
	seen := map[byte]bool{}
	for width := range 8 {
		n, d := 64, 32
		rows := make([]byte, 2*n*d)
		for i := range n * d {
			e := 200 - i/d%(1<<width)
			binary.LittleEndian.PutUint16(rows[2*i:], uint16(e<<7|i&0x7f))
		}
		checkExact(t, rows, n, d, BF16)
		seen[PackExact(rows, n, d, BF16)[4]] = true
	}
	if len(seen) < 6 {
		t.Errorf("only widths %v", seen)
	}
}

func TestExactRefusesDamage(t *testing.T) {
	n, d := 100, 32
	rows := make([]byte, 2*n*d)
	FromFloat32(rows, normal(1, n, d), BF16)
	packed := PackExact(rows, n, d, BF16)
	dst := make([]byte, 2*64*d)
	f := func(what string, damage func(b []byte) []byte, page, n, d int, typ ElementType) {
		t.Helper()
		b := damage(bytes.Clone(packed))
		if err := UnpackExactPage(dst, b, page, n, d, typ); !errors.Is(err, ErrCorrupt) {
			t.Errorf("%s: %v", what, err)
		}
	}
	same := func(b []byte) []byte { return b }
	f("page too high", same, 2, n, d, BF16)
	f("page negative", same, -1, n, d, BF16)
	f("no rows", same, 0, 0, d, BF16)
	f("odd dimension", same, 0, n, 24, BF16)
	f("large dimension", same, 0, n, 272, BF16)
	f("unknown type", same, 0, n, d, 9)
	f("wrong dimension", same, 0, n, 48, BF16)
	f("cut table", func(b []byte) []byte { return b[:7] }, 0, n, d, BF16)
	f("cut page", func(b []byte) []byte { return b[:len(b)-1] }, 1, n, d, BF16)
	f("width", func(b []byte) []byte { b[8] = 8; return b }, 0, n, d, BF16)
	f("one escape less", func(b []byte) []byte { b[0]--; return b }, 0, n, d, BF16)
	f("start above end", func(b []byte) []byte { b[2] = 9; return b }, 1, n, d, BF16)
	f("short destination", same, 0, n, d, F32)
}
