package compress

import (
	"crypto/sha256"
	"flag"
	"fmt"
	"os"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "rewrite testdata/golden.txt")

// goldenRows are made of integers only, so that every platform has the same:
// sums of four bytes, by channel on another scale and bias.
func goldenRows(n, d int) []float32 {
	x := make([]float32, n*d)
	state := uint32(1)
	for i := range x {
		sum := 0
		for range 4 {
			state = state*1664525 + 1013904223
			sum += int(state >> 24)
		}
		j := i % d
		x[i] = float32((sum-510)<<(j%5)+(j*j%97-48)*64) / 1024
	}
	return x
}

// The stored form is a promise: what is on disk must decode tomorrow. A changed
// hash needs a new version of the format.
func TestGolden(t *testing.T) {
	var out strings.Builder
	for _, d := range []int{16, 64, 80, 128, 256} {
		n := 150
		x := goldenRows(n, d)
		line := func(name string, b []byte) {
			fmt.Fprintf(&out, "d %d %s: %d bytes, sha256 %.12x\n", d, name, len(b), sha256.Sum256(b))
		}
		floats := func(name string, x []float32) {
			b := make([]byte, 4*len(x))
			FromFloat32(b, x, F32)
			line(name, b)
		}

		exp := KeyExp(x)
		s := FitKeySteps(x, d, exp)
		codes := make([]uint8, n*d)
		KeyCodes(codes, x, d, s, nil)
		o := anyOrder(d)
		planes := PackKeyPlanes(codes, n, d, o.Lines)
		line(fmt.Sprintf("key steps, exponent %d", exp), s.Append(nil, exp))
		line("key order", o.Append(nil))
		for p, b := range planes {
			line(fmt.Sprintf("key plane %d", p), b)
			floats(fmt.Sprintf("keys of %d planes", p+1), unpackAll(planes, n, d, p+1, o.Lines, s))
		}

		scales, hi, lo := PackValues(x, n, d)
		line("value scales", scales)
		line("v4", hi)
		line("v8", lo)
		w := ValueRowBytes(d)
		v4, v8 := make([]float32, n*d), make([]float32, n*d)
		for i := range n {
			UnpackValue(v4[i*d:], scales[3*i:], hi[i*w:], nil, d)
			UnpackValue(v8[i*d:], scales[3*i:], hi[i*w:], lo[i*w:], d)
		}
		floats("4-bit values, rotated", v4)
		Unrotate(v8, d)
		floats("8-bit values", v8)

		for _, typ := range elementTypes {
			rows := make([]byte, n*d*typ.Size())
			FromFloat32(rows, x, typ)
			line("exact "+typ.String(), PackExact(rows, n, d, typ))
		}
	}
	const file = "testdata/golden.txt"
	if *update {
		if err := os.WriteFile(file, []byte(out.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	got, lines := strings.Split(out.String(), "\n"), strings.Split(string(want), "\n")
	for i := range max(len(got), len(lines)) {
		if i >= len(got) || i >= len(lines) || got[i] != lines[i] {
			t.Fatalf("line %d differs from %s:\n%s", i+1, file, out.String())
		}
	}
}
