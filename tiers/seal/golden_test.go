package seal

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"flag"
	"fmt"
	"os"
	"runtime"
	"strings"
	"testing"

	"kvtier/attention/kernels"
	"kvtier/compress"
	"kvtier/tiers"
)

var update = flag.Bool("update", false, "rewrite testdata")

// golden is the segment that lies in testdata whole: a header's length, the
// header, both parts.
func golden() (*Rows, Options) {
	return madeUp(300, 1, 16, compress.BF16), Options{Profile: tiers.ProfileBalanced, Sinks: 16, Low: true, Metrics: metrics(1, 16)}
}

func file(h *tiers.Header, parts [tiers.NumParts][]byte) []byte {
	m := h.Marshal()
	b := binary.LittleEndian.AppendUint32(nil, uint32(len(m)))
	b = append(b, m...)
	for _, p := range parts {
		b = append(b, p...)
	}
	return b
}

// Reading what was written is a promise, on every platform: a change needs a
// new version of the format.
func TestGoldenRead(t *testing.T) {
	const name = "testdata/segment.bin"
	r, o := golden()
	if *update {
		h, parts := Segment(r, o)
		if err := os.WriteFile(name, file(h, parts), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	n := int(binary.LittleEndian.Uint32(b))
	h, err := tiers.UnmarshalHeader(b[4 : 4+n])
	if err != nil {
		t.Fatal(err)
	}
	if err := Check(h); err != nil {
		t.Fatal(err)
	}
	var parts [tiers.NumParts][]byte
	at := 4 + n
	for p := range parts {
		size := int(h.Bytes(tiers.Part(p)))
		parts[p] = b[at : at+size]
		at += size
		if err := h.CheckBlocks(tiers.Part(p), 0, parts[p]); err != nil {
			t.Fatal(err)
		}
	}
	of := func(p tiers.Plane) []byte { return piece(h, parts, 0, p) }
	v := View{D: 16, Info: h.Heads[0]}
	if want := (tiers.HeadInfo{Body: 256, Outliers: 28, Sinks: 16}); v.Info.Body != want.Body || v.Info.Outliers != want.Outliers || v.Info.Sinks != want.Sinks {
		t.Fatalf("head %+v", v.Info)
	}
	k, val := r.head(r.K, 0, 0, 300), r.head(r.V, 0, 0, 300)
	order := v.Positions(of(tiers.PlaneOrder))
	gk, gv := make([]float32, v.Stored()*v.D), make([]float32, v.Stored()*v.D)
	if err := v.Keys(gk, of); err != nil {
		t.Fatal(err)
	}
	v.Values(gv, of)
	compress.Unrotate(gv, v.D)
	within(t, gk, k, order, order, v.D, 8)
	valuesWithin(t, gv, val, order, v.D, 8)
	summaries(t, v, k, order, of)
	if !bytes.Equal(of(tiers.PlaneSinks), append(headBytes(r, r.K, 0, 0, 16), headBytes(r, r.V, 0, 0, 16)...)) {
		t.Fatal("sinks differ")
	}
}

// Writing is repeatable. Where a platform fuses multiplication and addition,
// grouping may differ: such segments are as good, under another id.
func TestGoldenWrite(t *testing.T) {
	if runtime.GOARCH != "amd64" {
		t.Skip("hashes are those of amd64")
	}
	var out strings.Builder
	line := func(name string, h *tiers.Header, parts [tiers.NumParts][]byte) {
		fmt.Fprintf(&out, "%s: id %v, %d + %d blocks, sha256 %.12x\n", name, h.ID,
			h.Blocks(tiers.PartMain), h.Blocks(tiers.PartLow), sha256.Sum256(file(h, parts)))
	}
	for _, profile := range []tiers.Profile{tiers.ProfileExact, tiers.ProfileNeutral, tiers.ProfileBalanced} {
		for _, d := range []int{16, 64, 80, 128, 256} {
			r := madeUp(333, 2, d, compress.BF16)
			h, parts := Segment(r, Options{Profile: profile, Sinks: 16, Metrics: metrics(2, d)})
			line(fmt.Sprintf("profile %d, d %d", profile, d), h, parts)
		}
	}
	h, parts := Window(madeUp(100, 2, 64, compress.F16), tiers.ProfileBalanced, 2048, 2048)
	line("window", h, parts)
	h, parts = Segment(golden())
	line("segment.bin", h, parts)
	const name = "testdata/golden.txt"
	if *update {
		if err := os.WriteFile(name, []byte(out.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	if out.String() != string(want) {
		t.Fatalf("segments differ from %s:\n%s", name, out.String())
	}
}

// What is written does not depend on the kernels, nor does the error that is stated.
func TestWriteByAnyKernels(t *testing.T) {
	for _, profile := range []tiers.Profile{tiers.ProfileNeutral, tiers.ProfileBalanced} {
		for _, d := range []int{16, 80, 128} {
			r := madeUp(600, 2, d, compress.BF16)
			o := Options{Profile: profile, Sinks: 16, Metrics: metrics(2, d), Queries: [][]float32{ramp(5 * d), ramp(3 * d)}}
			var first []byte
			for _, v := range kernels.Variants() {
				undo := kernels.Use(v)
				b := file(Segment(r, o))
				undo()
				if first == nil {
					first = b
				}
				if !bytes.Equal(first, b) {
					t.Errorf("%v, d %d: the kernels %v write other bytes", profile, d, v)
				}
			}
		}
	}
}

// ramp returns n numbers between -1 and 1.
func ramp(n int) []float32 {
	out := make([]float32, n)
	for i := range out {
		out[i] = float32(i*37%101)/50 - 1
	}
	return out
}
