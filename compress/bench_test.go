package compress

import (
	"fmt"
	"math/rand/v2"
	"testing"

	"kvtier/attention/kernels"
)

// benchDims are those of SmolLM2, of most models, and of Gemma.
var benchDims = []int{64, 128, 256}

// benchRows reports time by row of d values.
func benchRows(b *testing.B, name string, f func(d int) (rows int, run func())) {
	for _, d := range benchDims {
		b.Run(fmt.Sprintf("%s/d=%d", name, d), func(b *testing.B) {
			n, run := f(d)
			b.ReportAllocs()
			for b.Loop() {
				run()
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*n), "ns/row")
		})
	}
}

func BenchmarkKeys(b *testing.B) {
	const n = 256
	prepare := func(d int) ([]float32, KeySteps, []uint8) {
		x := normal(1, n, d)
		s := FitKeySteps(x, d, KeyExp(x))
		codes := make([]uint8, n*d)
		KeyCodes(codes, x, d, s, nil)
		return x, s, codes
	}
	benchRows(b, "fit", func(d int) (int, func()) {
		x := normal(1, n, d)
		return n, func() { FitKeySteps(x, d, KeyExp(x)) }
	})
	benchRows(b, "codes", func(d int) (int, func()) {
		x, s, codes := prepare(d)
		return n, func() { KeyCodes(codes, x, d, s, nil) }
	})
	benchRows(b, "codes with feedback", func(d int) (int, func()) {
		x, s, codes := prepare(d)
		f := FitKeyFeedback(queryMoment(rand.New(rand.NewPCG(5, uint64(d))), d), anyOrder(d), 0)
		return n, func() { KeyCodes(codes, x, d, s, f) }
	})
	benchRows(b, "fit feedback", func(d int) (int, func()) {
		moment := queryMoment(rand.New(rand.NewPCG(5, uint64(d))), d)
		return 1, func() { FitKeyFeedback(moment, anyOrder(d), 0) }
	})
	benchRows(b, "pack", func(d int) (int, func()) {
		_, _, codes := prepare(d)
		lines := anyOrder(d).Lines
		return n, func() { PackKeyPlanes(codes, n, d, lines) }
	})
	for planes := 1; planes <= NumKeyPlanes; planes++ {
		benchRows(b, fmt.Sprintf("unpack %d planes", planes), func(d int) (int, func()) {
			_, s, codes := prepare(d)
			lines := anyOrder(d).Lines
			packed := PackKeyPlanes(codes[:16*d], 16, d, lines)
			dst := make([]float32, 16*d)
			return 16, func() { UnpackKeys(dst, d, lines, s, packed[:planes]...) }
		})
	}
	benchRows(b, "parse steps", func(d int) (int, func()) {
		x, s, _ := prepare(d)
		exp := KeyExp(x)
		stored := s.Append(nil, exp)
		return 1, func() {
			if _, err := ParseKeySteps(stored, d, exp); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// BenchmarkMeanKeys scores a segment's pages for 4 rows: at 4 bits, in whose bins the query is brought every time, and as signed bytes.
func BenchmarkMeanKeys(b *testing.B) {
	const n, rows = 32, 4
	benchRows(b, "4 bits", func(d int) (int, func()) {
		x, q := normal(1, n, d), normal(2, rows, d)
		exp := KeyExp(x)
		stored := AppendMeanKeys(nil, x, d, exp)
		dst, folded := make([]float32, rows*n), kernels.KeyQuery{Words: make([]int16, rows*d), Scale: make([]float32, 2*rows)}
		var m MeanKeys
		return n * rows, func() {
			if err := m.Parse(stored, n, d, exp); err != nil {
				b.Fatal(err)
			}
			m.Scores(dst, n, q, folded)
		}
	})
	benchRows(b, "int8", func(d int) (int, func()) {
		c, q, dst := make([]byte, n*d), normal(2, rows, d), make([]float32, rows*n)
		return n * rows, func() { kernels.DotsInt8(dst, n, q, c, d) }
	})
}

func BenchmarkValues(b *testing.B) {
	const n = 64
	benchRows(b, "pack", func(d int) (int, func()) {
		x := normal(1, n, d)
		return n, func() { PackValues(x, n, d) }
	})
	for _, bits := range []int{4, 8} {
		benchRows(b, fmt.Sprintf("unpack%d", bits), func(d int) (int, func()) {
			scales, hi, lo := PackValues(normal(1, 1, d), 1, d)
			if bits == 4 {
				lo = nil
			}
			dst := make([]float32, d)
			return 1, func() { UnpackValue(dst, scales, hi, lo, d) }
		})
	}
	benchRows(b, "unrotate", func(d int) (int, func()) {
		x := normal(1, 1, d)
		return 1, func() { Unrotate(x, d) }
	})
}

func BenchmarkExact(b *testing.B) {
	const n = 256
	for _, typ := range elementTypes {
		rows := func(d int) []byte {
			b := make([]byte, n*d*typ.Size())
			FromFloat32(b, normal(1, n, d), typ)
			return b
		}
		benchRows(b, "pack "+typ.String(), func(d int) (int, func()) {
			r := rows(d)
			return n, func() { PackExact(r, n, d, typ) }
		})
		benchRows(b, "unpack "+typ.String(), func(d int) (int, func()) {
			packed, dst := PackExact(rows(d), n, d, typ), make([]byte, 64*d*typ.Size())
			return 64, func() {
				if err := UnpackExactPage(dst, packed, 1, n, d, typ); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkElements(b *testing.B) {
	for _, typ := range elementTypes {
		benchRows(b, "widen "+typ.String(), func(d int) (int, func()) {
			x := normal(1, 64, d)
			src := make([]byte, len(x)*typ.Size())
			FromFloat32(src, x, typ)
			return 64, func() { ToFloat32(x, src, typ) }
		})
		benchRows(b, "narrow "+typ.String(), func(d int) (int, func()) {
			x := normal(1, 64, d)
			dst := make([]byte, len(x)*typ.Size())
			return 64, func() { FromFloat32(dst, x, typ) }
		})
	}
	benchRows(b, "finite", func(d int) (int, func()) {
		x := normal(1, 64, d)
		return 64, func() { Finite(x) }
	})
}
