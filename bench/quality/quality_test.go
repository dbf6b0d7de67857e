package quality

import (
	"archive/zip"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"kvtier/compress"
	"kvtier/tiers"
)

// npy writes an array as numpy does.
func npy(descr, shape string, data []byte) []byte {
	head := fmt.Sprintf("{'descr': '%s', 'fortran_order': False, 'shape': (%s), }", descr, shape)
	head += strings.Repeat(" ", 63-(10+len(head))%64) + "\n"
	b := append([]byte("\x93NUMPY\x01\x00"), byte(len(head)), byte(len(head)>>8))
	return append(append(b, head...), data...)
}

func floats(x []float32, t compress.ElementType) []byte {
	b := make([]byte, len(x)*t.Size())
	compress.FromFloat32(b, x, t)
	return b
}

func archive(t testing.TB, arrays map[string][]byte) string {
	t.Helper()
	var b bytes.Buffer
	z := zip.NewWriter(&b)
	for name, data := range arrays {
		w, err := z.CreateHeader(&zip.FileHeader{Name: name + ".npy", Method: zip.Store})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(data); err != nil {
			t.Fatal(err)
		}
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "L00.npz")
	if err := os.WriteFile(path, b.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

const (
	testTokens, testHeads, testGroup, testDim, testQueries = 2900, 1, 2, 64, 64
)

// madeUp is a dump whose keys gather around few centres, and whose queries look
// for one of them or, every other one, for a single token.
func madeUp(t testing.TB) string {
	rng := rand.New(rand.NewPCG(1, 2))
	normal := func(n int, scale float32) []float32 {
		x := make([]float32, n)
		for i := range x {
			x[i] = scale * float32(rng.NormFloat64())
		}
		return x
	}
	k, v := normal(testTokens*testDim, .6), normal(testTokens*testDim, 1)
	centres := normal(8*testDim, 1.5)
	for i := range testTokens {
		c := rng.IntN(8)
		for j := range testDim {
			k[i*testDim+j] += centres[c*testDim+j]
		}
	}
	ask := func(rows int) []float32 {
		q := normal(rows*testDim, .3)
		for i := range rows {
			at, scale := centres[rng.IntN(8)*testDim:], float32(1)
			if i%2 == 0 {
				at, scale = k[rng.IntN(testTokens)*testDim:], 1.8
			}
			for j := range testDim {
				q[i*testDim+j] += scale * at[j]
			}
		}
		return q
	}
	samples := testTokens / 16
	pos := make([]byte, 8*samples)
	for i := range samples {
		binary.LittleEndian.PutUint64(pos[8*i:], uint64(16*i))
	}
	rows := fmt.Sprintf("%d, %d, %d", testTokens, testHeads, testDim)
	return archive(t, map[string][]byte{
		"k": npy("<f2", rows, floats(k, compress.F16)), "v": npy("<f4", rows, floats(v, compress.F32)),
		"q":            npy("<f4", fmt.Sprintf("%d, %d, %d", testQueries, testGroup, testDim), floats(ask(testQueries*testGroup), compress.F32)),
		"q_sample":     npy("<f4", fmt.Sprintf("%d, %d, %d", samples, testGroup, testDim), floats(ask(samples*testGroup), compress.F32)),
		"q_sample_pos": npy("<i8", fmt.Sprintf("%d,", samples), pos),
	})
}

func TestMeasure(t *testing.T) {
	file := madeUp(t)
	results, err := Measure(context.Background(), []string{file}, Options{Profile: tiers.ProfileExact, Shares: []float64{.1, .3}, Step: 8})
	if err != nil {
		t.Fatal(err)
	}
	by := make(map[key]Result)
	for _, r := range results {
		by[key{r.Method, r.Share}] = r
		if r.Strong3.Tokens == 0 || r.Strong10.Tokens > r.Strong3.Tokens {
			t.Errorf("%s: %d tokens of 3 %%, %d of 10 %%", r.Method, r.Strong3.Tokens, r.Strong10.Tokens)
		}
	}
	if e := by[key{"exact", 1}]; e.Error.Max > 1e-4 || e.KL.Max > 1e-5 || e.Strong3.Unread != 0 {
		t.Errorf("profile exact, everything read: %+v", e)
	}
	if e := by[key{"k4v4", 1}]; e.Error.Mean < 1e-3 || e.Error.Mean > .4 || e.RAM < 1 || e.RAM > 1.2 || e.Strong3.Unread != 0 {
		t.Errorf("everything read at 4 bits: %+v", e)
	}
	for _, share := range []float64{.1, .3} {
		if r := by[key{"kvtier", share}]; r.RAM > 1.05*share || r.RAM < .5*share || r.Disk < r.RAM || r.Stated == nil {
			t.Errorf("kvtier at %v: %+v", share, r)
		}
	}
	if a, b := by[key{"oracle", .1}], by[key{"streaming", .1}]; a.Error.Mean >= b.Error.Mean || a.Strong3.Unread >= b.Strong3.Unread {
		t.Errorf("the oracle is no better than the newest tokens: %+v, %+v", a, b)
	}
	if a, b := by[key{"kvtier", .1}], by[key{"kvtier", .3}]; a.Error.Mean <= b.Error.Mean {
		t.Errorf("more bytes, more error: %v, %v", a.Error, b.Error)
	}
	dec := xml.NewDecoder(bytes.NewReader(Curves(results)))
	for {
		if _, err := dec.Token(); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
	}
}

// Every channel bound of quest's holds for every key of its block.
func TestQuestBound(t *testing.T) {
	d, err := ReadDump(madeUp(t), 0)
	if err != nil {
		t.Fatal(err)
	}
	h := &headContext{layerContext: &layerContext{d: d, end: 1000}, k: d.head(d.K, 0)}
	b, q := h.blockSummaries(), d.query(0, 3)[:testDim]
	for i := range h.numBlocks() {
		var bound float64
		for j, x := range q {
			bound += float64(max(x*b.least[i*testDim+j], x*b.most[i*testDim+j]))
		}
		lo, hi := h.block(i)
		for pos := lo; pos < hi; pos++ {
			var s float64
			for j, x := range q {
				s += float64(x * h.k[pos*testDim+j])
			}
			if s > bound+1e-4 {
				t.Fatalf("token %d scores %v, its block's bound is %v", pos, s, bound)
			}
		}
	}
}

func TestBadDumps(t *testing.T) {
	ok := npy("<f4", "2, 1, 16", floats(make([]float32, 32), compress.F32))
	for name, arrays := range map[string]map[string][]byte{
		"array v":               {"q": ok, "k": ok},
		"k is [2 1 16] and v":   {"q": ok, "k": ok, "v": npy("<f4", "1, 1, 16", make([]byte, 64))},
		"head dimensions":       {"q": npy("<f4", "2, 1, 8", make([]byte, 64)), "k": ok, "v": ok},
		"unexpected EOF":        {"q": ok, "k": npy("<f4", "2, 1, 16", make([]byte, 64)), "v": ok},
		"too large":             {"q": ok, "k": npy("<f4", "4000000000, 4000000000, 16", nil), "v": ok},
		"element type":          {"q": ok, "k": npy("<f8", "2, 1, 16", make([]byte, 256)), "v": ok},
		"NaN":                   {"q": npy("<f4", "1, 1, 16", floats(append(make([]float32, 15), float32(math.NaN())), compress.F32)), "k": ok, "v": ok},
		"array q_sample_pos":    {"q": ok, "k": ok, "v": ok, "q_sample": ok},
		"q_sample_pos has to":   {"q": ok, "k": ok, "v": ok, "q_sample": ok, "q_sample_pos": npy("<i4", "2,", make([]byte, 8))},
		"have to be [n][heads]": {"q": ok, "k": npy("<f4", "32,", make([]byte, 128)), "v": ok},
		"Fortran":               {"q": bytes.Replace(bytes.Replace(ok, []byte("False"), []byte("True"), 1), []byte("\n"), []byte(" \n"), 1), "k": ok, "v": ok},
	} {
		_, err := ReadDump(archive(t, arrays), 0)
		if err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func FuzzParseArray(f *testing.F) {
	f.Add(npy("<f4", "2, 1, 16", make([]byte, 128)))
	f.Add(npy("<i8", "3,", make([]byte, 24)))
	f.Add(npy("<f2", "", make([]byte, 2)))
	f.Fuzz(func(t *testing.T, b []byte) {
		a, err := parseArray(bytes.NewReader(b))
		if err != nil {
			return
		}
		n := 1
		for _, s := range a.shape {
			n *= s
		}
		if len(a.f32)+len(a.i64) != n {
			t.Fatalf("%d elements for shape %v", len(a.f32)+len(a.i64), a.shape)
		}
	})
}

// Bits add up: more of them for more precision, and a lossless row costs more
// than its entropy and less than its 32 bits.
func TestStorage(t *testing.T) {
	got, err := Storage(context.Background(), []string{madeUp(t)})
	if err != nil {
		t.Fatal(err)
	}
	exact, neutral, balanced := got[0], got[1], got[2]
	if exact.Profile != "exact" || balanced.Profile != "balanced" || neutral.Lossless != 0 {
		t.Fatalf("%+v", got)
	}
	if !(balanced.Bits > 4.5 && balanced.Bits < neutral.Bits && neutral.Bits < 9.25 && exact.Lossless > 8 && exact.Lossless < 16 && exact.Bits > exact.Lossless+balanced.Bits-.5) {
		t.Errorf("%+v", got)
	}
}
