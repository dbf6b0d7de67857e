package kernels

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"strings"
	"sync"
	"testing"

	"kvtier/attention"
	"kvtier/compress"
	"kvtier/tiers"
	"kvtier/tiers/gpu/cuda"
	"kvtier/tiers/gpu/cuda/cudatest"
	"kvtier/tiers/seal"
)

// newSealing makes one that is closed at the test's end.
func newSealing(t *testing.T, d *cuda.Device) *Sealing {
	t.Helper()
	s, err := NewSealing(ctx, d)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(ctx); err != nil {
			t.Error(err)
		}
	})
	return s
}

// toSeal is what layers are made of.
type toSeal struct {
	d, layers, heads, tokens, sinks int
	typ                             compress.ElementType
	profile                         tiers.Profile
	low                             bool
	plain                           bool // no queries are known: no metric
	queries                         int
	kind                            string // of rows
}

// rows are of groups of tokens about centres, channels of different size, and some tokens far out; or of the kind.
func (m toSeal) rows(rng *rand.Rand) (rows []*seal.Rows, options []seal.Options) {
	for l := range m.layers {
		k, v := normal(rng, m.tokens*m.heads*m.d, 1), normal(rng, m.tokens*m.heads*m.d, 1)
		centres := normal(rng, 7*m.d, 1.5)
		for t := range m.tokens * m.heads {
			c, far := rng.IntN(7), float32(1)
			if rng.IntN(11) == 0 {
				far = float32(1 + rng.IntN(5))
			}
			for j := range m.d {
				at := t*m.d + j
				k[at] = far*k[at]*(.2+float32(j%7)/5) + centres[c*m.d+j]
				v[at] *= far / 2
				switch m.kind {
				case "zero":
					k[at], v[at] = 0, 0
				case "signed zeros":
					k[at], v[at] = float32(math.Copysign(0, float64(k[at]))), float32(math.Copysign(0, float64(v[at])))
					if j%3 == 0 {
						k[at] = 1
					}
				case "constant":
					k[at], v[at] = float32(j%5)-2, float32(j%3)
				case "huge": // sums, squares and differences overflow
					k[at] = max(-math.MaxFloat32, min(k[at]*0x1p125, math.MaxFloat32))
					v[at] = max(-math.MaxFloat32, min(v[at]*0x1p125, math.MaxFloat32))
				case "large":
					k[at] *= 0x1p60
					v[at] *= 0x1p100
				case "tiny":
					k[at] *= 0x1p-130
					v[at] *= 0x1p-135
				}
			}
		}
		r := &seal.Rows{Layer: l, Start: uint64(5 * 2048), Heads: m.heads, HeadDim: m.d, Type: m.typ}
		for _, x := range []struct {
			to   *[]byte
			from []float32
		}{{&r.K, k}, {&r.V, v}} {
			*x.to = make([]byte, len(x.from)*m.typ.Size())
			compress.FromFloat32(*x.to, x.from, m.typ)
		}
		o := seal.Options{Profile: m.profile, Sinks: m.sinks, Low: m.low}
		for range m.heads {
			sum := attention.NewQuerySum(m.d)
			if !m.plain {
				sum.Add(normal(rng, m.d*m.d, .1))
			}
			o.Metrics = append(o.Metrics, sum.Metric())
			if m.queries > 0 {
				o.Queries = append(o.Queries, normal(rng, m.queries*m.d, 3/math.Sqrt(float64(m.d))))
			}
		}
		rows, options = append(rows, r), append(options, o)
	}
	return rows, options
}

// same compares what the device makes with what the host does.
func (m toSeal) same(t *testing.T, s *Sealing, seed uint64) {
	t.Helper()
	rows, options := m.rows(rand.New(rand.NewPCG(seed, 8)))
	got, err := s.Seal(ctx, rows, options, nil)
	if err != nil {
		t.Fatalf("%+v: %v", m, err)
	}
	for l := range rows {
		h, parts := seal.Segment(rows[l], options[l])
		x := got[l].Header
		if x.ID == h.ID && bytes.Equal(x.Marshal(), h.Marshal()) {
			continue
		}
		t.Errorf("%+v, layer %d: another segment", m, l)
		for head := range h.Heads {
			if x.Heads[head] != h.Heads[head] {
				t.Errorf("head %d: %+v, not %+v", head, x.Heads[head], h.Heads[head])
			}
			for p := range tiers.NumPlanes {
				off, n, _ := h.Piece(head, p)
				at, size, _ := x.Piece(head, p)
				a, b := got[l].Parts[p.Part()][at:at+size], parts[p.Part()][off:off+n]
				if i := differ(a, b); i >= 0 {
					t.Errorf("head %d: %v has %d bytes, not %d, and differs from byte %d on", head, p, size, n, i)
				}
			}
		}
	}
}

// differ returns the first byte in which a and b differ; -1 if none.
func differ(a, b []byte) int {
	for i := range max(len(a), len(b)) {
		if i >= len(a) || i >= len(b) || a[i] != b[i] {
			return i
		}
	}
	return -1
}

// TestSealSame: the device makes the segments that the host makes, byte for byte, of all shapes, types, profiles and sizes of numbers.
func TestSealSame(t *testing.T) {
	s := newSealing(t, cudatest.Open(t))
	types := []compress.ElementType{compress.BF16, compress.F16, compress.F32}
	profiles := []tiers.Profile{tiers.ProfileBalanced, tiers.ProfileNeutral, tiers.ProfileExact}
	for _, d := range HeadDims {
		t.Run(fmt.Sprint(d), func(t *testing.T) {
			for i, n := range []int{1, 16, 17, 63, 130, 255, 256, 264, 300, 333, 530} {
				if d > 64 && i%(d/64) != 1 || testing.Short() && i%3 != d/128 {
					continue // larger ones take an emulated device longer
				}
				m := toSeal{d: d, layers: 1, heads: 1, tokens: n, typ: types[i%3], profile: profiles[i/2%3], low: i%4 == 1, plain: i%5 == 2, queries: i % 3 * 2}
				if i%3 == 0 && n > tiers.SinkTokens {
					m.sinks = tiers.SinkTokens
				}
				if i == 4 {
					m.layers, m.heads = 2, 2
				}
				m.same(t, s, uint64(i))
			}
		})
	}
}

// TestSealExtremes: also where numbers are all alike, or overflow.
func TestSealExtremes(t *testing.T) {
	s := newSealing(t, cudatest.Open(t))
	for i, d := range HeadDims {
		if testing.Short() && i > 0 {
			break
		}
		for j, kind := range []string{"zero", "signed zeros", "constant", "huge", "large", "tiny"} {
			if i == 2 && j%2 == 0 {
				continue
			}
			toSeal{d: d, layers: 1, heads: 1, tokens: 290 - 100*i, typ: compress.F32, profile: tiers.ProfileNeutral, kind: kind, queries: 1}.same(t, s, 3)
		}
	}
}

// TestSealFull makes a full segment.
func TestSealFull(t *testing.T) {
	s := newSealing(t, cudatest.Open(t))
	toSeal{d: 128, layers: 1, heads: 1, tokens: tiers.SegmentTokens, sinks: tiers.SinkTokens, typ: compress.BF16, profile: tiers.ProfileBalanced, queries: 1}.same(t, s, 1)
}

// TestSealRefuses: layers that cannot be made together, and such that there are no kernels for, are errors; the next ones are made.
func TestSealRefuses(t *testing.T) {
	s := newSealing(t, cudatest.Open(t))
	m := toSeal{d: 64, layers: 2, heads: 1, tokens: 20, typ: compress.BF16, profile: tiers.ProfileBalanced}
	for i, spoil := range []func(r *seal.Rows, o *seal.Options){
		func(r *seal.Rows, _ *seal.Options) { r.K = r.K[:128] },
		func(r *seal.Rows, _ *seal.Options) { r.V = r.V[:128] },
		func(r *seal.Rows, _ *seal.Options) { r.HeadDim, r.Heads = 32, 2 },
		func(r *seal.Rows, _ *seal.Options) { r.Type = compress.F16 },
		func(_ *seal.Rows, o *seal.Options) { o.Sinks = 1 },
		func(_ *seal.Rows, o *seal.Options) { o.Low = true },
		func(_ *seal.Rows, o *seal.Options) { o.Metrics = nil },
		func(_ *seal.Rows, o *seal.Options) { o.Queries = [][]float32{make([]float32, 64)} },
	} {
		rows, options := m.rows(rand.New(rand.NewPCG(1, 8)))
		spoil(rows[1], &options[1])
		if _, err := s.Seal(ctx, rows, options, nil); err == nil {
			t.Errorf("case %d: no error", i)
		}
	}
	rows, options := m.rows(rand.New(rand.NewPCG(1, 8)))
	for i := range rows {
		rows[i].HeadDim, rows[i].Heads = 32, 2
		options[i].Metrics = append(options[i].Metrics, options[i].Metrics[0])
	}
	if _, err := s.Seal(ctx, rows, options, nil); err == nil {
		t.Error("kernels for head dimension 32")
	}
	m.same(t, s, 1)
}

// TestSealBatches makes more layers than a batch holds, from several sides at once; nothing leaks.
func TestSealBatches(t *testing.T) {
	d := cudatest.Open(t)
	before := free(t, d)
	s := newSealing(t, d)
	s.most = 1 << 10 // a layer
	var wg sync.WaitGroup
	for i := range 3 {
		wg.Go(func() {
			toSeal{d: 64, layers: 3, heads: 2, tokens: 20 + 9*i, typ: compress.BF16, profile: tiers.ProfileBalanced, queries: i}.same(t, s, uint64(i))
		})
	}
	wg.Wait()
	timed, with := toSeal{d: 64, layers: 1, heads: 1, tokens: 20, typ: compress.BF16, profile: tiers.ProfileBalanced}.rows(rand.New(rand.NewPCG(1, 8)))
	if _, took, err := s.SealTimed(ctx, timed, with); err != nil || took.Kernels <= 0 {
		t.Errorf("%v, %v", took, err)
	}
	if err := errors.Join(s.Close(ctx), s.Close(ctx)); err != nil {
		t.Fatal(err)
	}
	if after := free(t, d); after != before {
		t.Fatalf("%d bytes free before, %d after", before, after)
	}
	rows, options := toSeal{d: 64, layers: 1, heads: 1, tokens: 20, typ: compress.BF16}.rows(rand.New(rand.NewPCG(1, 8)))
	if _, err := s.Seal(ctx, rows, options, nil); !errors.Is(err, cuda.ErrClosed) {
		t.Fatalf("after Close: %v", err)
	}
}

// TestSealFaults lets each call of the driver fail once: that is an error, or no harm; the next segments are right, or the device is lost; nothing leaks.
func TestSealFaults(t *testing.T) {
	if os.Getenv(faultChild) != "" {
		sealFaulty(t)
		return
	}
	emulated(t)
	if testing.Short() {
		t.Skip("a process for each call")
	}
	for _, call := range []string{"cuMemAlloc", "cuMemHostAlloc", "cuMemcpyHtoDAsync", "cuMemcpyDtoHAsync", "cuMemcpyDtoDAsync", "cuMemsetD8Async", "cuLaunchKernel", "cuEventCreate",
		"cuEventRecord", "cuEventQuery", "cuModuleLoadDataEx", "cuModuleGetFunction", "cuStreamCreate"} {
		for _, code := range []int{1, 719} {
			seen := 0
			for n := 1; seen == n-1 && n <= 4; n++ { // the first calls
				if strings.Contains(child(t, fmt.Sprint(faultChild, "=", code), fmt.Sprintf("MOCKCUDA_FAIL=%s:%d:%d", call, n, code)), felt) {
					seen++
				}
			}
			if seen == 0 {
				t.Errorf("%s: nobody felt that it failed with %d", call, code)
			}
		}
	}
	for call, n := range map[string]int{"cuLaunchKernel": 9, "cuEventRecord": 3, "cuEventQuery": 1} { // in the midst of work
		if !strings.Contains(child(t, faultChild+"="+atOnce, fmt.Sprintf("MOCKCUDA_FAIL=%s:%d:1", call, n)), felt) {
			t.Errorf("%s: nobody felt that it failed", call)
		}
	}
}

// atOnce says that everything is given back when the first call fails.
const atOnce = "at once"

// sealFaulty seals while a call fails.
func sealFaulty(t *testing.T) {
	d := cudatest.Open(t)
	before := free(t, d)
	s, err := NewSealing(ctx, d)
	if err != nil {
		t.Log(felt, err)
		if s, err = NewSealing(ctx, d); err != nil {
			gone(t, d, err)
			return
		}
	}
	m := toSeal{d: 64, layers: 1, heads: 1, tokens: 20, typ: compress.BF16, profile: tiers.ProfileBalanced, queries: 1}
	rows, options := m.rows(rand.New(rand.NewPCG(1, 8)))
	want, _ := seal.Segment(rows[0], options[0])
	var stays cuda.Ptr
	const room = 64 << 10
	take := func(c *cuda.Context) (err error) { stays, err = c.Alloc(room); return err }
	if err := d.Do(ctx, take); err != nil {
		t.Log(felt, err)
		if err := d.Do(ctx, take); err != nil {
			gone(t, d, err)
			return
		}
	}
	keep := func(h *tiers.Header) [][tiers.NumPlanes]cuda.Ptr {
		return [][tiers.NumPlanes]cuda.Ptr{{tiers.PlaneV4: stays, tiers.PlaneK1: stays + room/2}}
	}
	failed := 0
	for range 4 { // each room twice
		got, err := s.Seal(ctx, rows, options, keep)
		if err == nil {
			if got[0].Header.ID != want.ID {
				t.Fatal("another segment")
			}
			kept(t, d, got[0], tiers.PlaneV4, stays)
			kept(t, d, got[0], tiers.PlaneK1, stays+room/2)
			continue
		}
		t.Log(felt, err)
		if errors.Is(err, cuda.ErrLost) {
			gone(t, d, err)
			if err := s.Close(ctx); err != nil {
				t.Fatalf("Close: %v", err)
			}
			return
		}
		if failed++; failed > 1 {
			t.Fatalf("one fault, and another error: %v", err)
		}
		if os.Getenv(faultChild) == atOnce {
			break
		}
	}
	if err := errors.Join(s.Close(ctx), d.Do(ctx, func(c *cuda.Context) error { return c.Free(stays) })); err != nil {
		if os.Getenv(faultChild) == atOnce {
			t.Fatal(err) // the one call that was to fail has
		}
		t.Log(felt, err)
		return
	}
	if after := free(t, d); after != before {
		t.Fatalf("%d bytes free before, %d after", before, after)
	}
}

// kept compares a plane that stays on the device with what was made of it.
func kept(t *testing.T, d *cuda.Device, s SealedSegment, p tiers.Plane, at cuda.Ptr) {
	t.Helper()
	for _, x := range s.Header.Pieces(s.Parts) {
		if x.Plane != p {
			continue
		}
		got := make([]byte, len(x.Bytes))
		err := d.Do(ctx, func(c *cuda.Context) error {
			stream, err := c.NewStream()
			if err != nil {
				return err
			}
			return errors.Join(c.CopyToHost(got, at, stream), stream.Synchronize(), stream.Destroy())
		})
		if err != nil {
			t.Log(felt, err)
		} else if !bytes.Equal(got, x.Bytes) {
			t.Fatalf("plane %v on the device is another one", p)
		}
	}
}
