package kernels

import (
	"bytes"
	"context"
	"errors"
	"math"
	"math/rand/v2"
	"slices"
	"testing"

	"kvtier/attention"
	"kvtier/compress"
	"kvtier/tiers"
	"kvtier/tiers/gpu/cuda"
	"kvtier/tiers/seal"
)

var ctx = context.Background()

// do runs f on the device.
func do(t *testing.T, d *cuda.Device, f func(*cuda.Context) error) {
	t.Helper()
	if err := d.Do(ctx, f); err != nil {
		t.Fatal(err)
	}
}

// free is how many bytes of device memory are free.
func free(t *testing.T, d *cuda.Device) (n int64) {
	t.Helper()
	do(t, d, func(c *cuda.Context) (err error) { n, _, err = c.MemInfo(); return err })
	return n
}

// newAttention makes one that is closed at the test's end.
func newAttention(t *testing.T, d *cuda.Device) *Attention {
	t.Helper()
	a, err := New(ctx, d)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := a.Close(ctx); err != nil {
			t.Error(err)
		}
	})
	return a
}

// shape is what a layer of segments is made of.
type shape struct {
	d, heads int
	tokens   []int // of each segment
	profile  tiers.Profile
	low      bool    // keep bits 5 to 8 of a balanced segment
	hide     bool    // do not use them
	sinks    int     // of the first segment
	keys     float64 // a factor; queries have its reciprocal
	values   float64
	constant bool // all values are the same
	flat     bool // some values' steps are 0
	copies   int  // of each segment, beside it
	dealt    bool // lines of keys are of other groups than a sealer would have
}

// sealed is a segment in host memory.
type sealed struct {
	header *tiers.Header
	low    bool
	planes [][tiers.NumPlanes][]byte // by head
}

// of returns a head's planes, as far as they are used.
func (s *sealed) of(head int) func(tiers.Plane) []byte {
	of := func(p tiers.Plane) []byte { return s.planes[head][p] }
	if !s.low {
		return seal.WithoutLow(of)
	}
	return of
}

func (s *sealed) view(head int) seal.View {
	return seal.View{D: s.header.HeadDim, Info: s.header.Heads[head]}
}

// make seals random segments: keys' channels are of different size, and some of the tokens lie far from the others.
func (m shape) make(rng *rand.Rand) (out []*sealed) {
	metrics := make([]*attention.Metric, m.heads)
	for h := range metrics {
		sum := attention.NewQuerySum(m.d)
		sum.Add(normal(rng, m.d*m.d, 1))
		metrics[h] = sum.Metric()
	}
	if m.keys == 0 {
		m.keys = 1
	}
	if m.values == 0 {
		m.values = 1
	}
	for i, n := range m.tokens {
		k, v := normal(rng, n*m.heads*m.d, m.keys), normal(rng, n*m.heads*m.d, m.values)
		far := float32(1)
		for at := range k {
			j := at % m.d
			if j == 0 {
				far = 1
				if rng.IntN(9) == 0 {
					far = float32(1 + rng.IntN(4))
				}
			}
			k[at] = k[at]*far*float32(.3+float64(j%7)/5) + float32(m.keys*float64(j%5)/3)
			if v[at] *= far; m.constant {
				v[at] = float32(m.values * float64(1+j%3))
			}
		}
		o := seal.Options{Profile: m.profile, Metrics: metrics, Low: m.low}
		if i == 0 && m.sinks < n {
			o.Sinks = m.sinks
		}
		rows := &seal.Rows{Start: uint64(i) * tiers.SegmentTokens, Heads: m.heads, HeadDim: m.d, Type: compress.BF16, K: bf16(k), V: bf16(v)}
		h, parts := seal.Segment(rows, o)
		s := &sealed{h, h.Blocks(tiers.PartLow) > 0 && !m.hide, make([][tiers.NumPlanes][]byte, m.heads)}
		for _, p := range h.Pieces(parts) {
			s.planes[p.Head][p.Plane] = bytes.Clone(p.Bytes)
		}
		if m.flat {
			s.flatten(rng)
		}
		out = append(out, s)
	}
	return slices.Repeat(out, 1+m.copies)
}

// flatten makes some values' steps 0: all codes mean 0 then. Nobody seals such values, but a disk may hold them.
func (s *sealed) flatten(rng *rand.Rand) {
	for head := range s.planes {
		v, all := s.view(head), rng.IntN(3) == 0
		for t := range v.Stored() {
			if scale, _ := v.ValueRanges(t); all || rng.IntN(2) == 0 {
				clear(s.planes[head][tiers.PlaneV4][scale.Off:][:2])
			}
		}
	}
}

func normal(rng *rand.Rand, n int, sd float64) []float32 {
	x := make([]float32, n)
	for i := range x {
		x[i] = float32(sd * rng.NormFloat64())
	}
	return x
}

func bf16(x []float32) []byte {
	b := make([]byte, 2*len(x))
	compress.FromFloat32(b, x, compress.BF16)
	return b
}

// resident copies segments to the device until the test's end, each plane to an
// allocation of just its size: so an emulated device finds whoever reads beyond.
func resident(t *testing.T, d *cuda.Device, all []*sealed) (out []Segment) {
	t.Helper()
	for _, s := range all {
		at := make([][tiers.NumPlanes]Address, len(s.planes))
		do(t, d, func(c *cuda.Context) error {
			for head := range s.planes {
				for p, b := range s.planes[head] {
					if Planes(s.low).Has(tiers.Plane(p)) && len(b) > 0 {
						ptr, err := upload(c, b)
						if err != nil {
							return err
						}
						at[head][p] = uint64(ptr)
						t.Cleanup(func() { _ = d.Do(ctx, func(c *cuda.Context) error { return c.Free(ptr) }) })
					}
				}
			}
			return nil
		})
		out = append(out, Segment{s.header, s.low, func(head int, p tiers.Plane) Address { return at[head][p] }})
	}
	return out
}

// upload copies bytes to an allocation.
func upload(c *cuda.Context, b []byte) (cuda.Ptr, error) {
	pinned, err := c.HostAlloc(len(b))
	if err != nil {
		return 0, err
	}
	copy(pinned, b)
	s, err := c.NewStream()
	if err != nil {
		return 0, errors.Join(err, c.HostFree(pinned))
	}
	ptr, err := c.Alloc(len(b))
	if err == nil {
		err = errors.Join(c.CopyToDevice(ptr, pinned, s), s.Synchronize())
	}
	return ptr, errors.Join(err, s.Destroy(), c.HostFree(pinned))
}

// download copies an allocation of n bytes to the host.
func download(c *cuda.Context, ptr cuda.Ptr, n int) ([]byte, error) {
	pinned, err := c.HostAlloc(n)
	if err != nil {
		return nil, err
	}
	s, err := c.NewStream()
	if err != nil {
		return nil, errors.Join(err, c.HostFree(pinned))
	}
	err = errors.Join(c.CopyToHost(pinned, ptr, s), s.Synchronize())
	b := bytes.Clone(pinned)
	return b, errors.Join(err, s.Destroy(), c.HostFree(pinned))
}

// answer attends once.
func answer(a *Attention, segments []Segment, warps Warps, q []float32, softcap float32) ([]attention.Partial, error) {
	return answerShare(a, segments, warps, q, softcap, Everything)
}

// answerAll attends once with the kernels that choose, which choose all.
func answerAll(a *Attention, segments []Segment, warps Warps, q []float32, softcap float32) ([]attention.Partial, error) {
	return answerShare(a, segments, warps, q, softcap, Everything-1)
}

func answerShare(a *Attention, segments []Segment, warps Warps, q []float32, softcap float32, share uint32) ([]attention.Partial, error) {
	t, err := a.Upload(ctx, NewPlan(segments, warps))
	if err != nil {
		return nil, err
	}
	var ps []attention.Partial
	n, err := a.StartChoosing(ctx, t, q, softcap, share)
	if err == nil {
		ps, err = n.Wait(ctx)
	}
	return ps, errors.Join(err, a.FreeTables(ctx, t))
}

// dense attends to what is stored, in float64: for each row [heads][rows] its output and log-sum-exp.
func dense(t *testing.T, segments []*sealed, q []float32, softcap float64) (outs [][]float64, lses []float64) {
	t.Helper()
	h := segments[0].header
	d, heads := h.HeadDim, len(h.Heads)
	rows := len(q) / d / heads
	for head := range heads {
		var k, v []float32
		for _, s := range segments {
			n := s.view(head).Stored()
			keys, values := make([]float32, n*d), make([]float32, n*d)
			if err := s.view(head).Keys(keys, s.of(head)); err != nil {
				t.Fatal(err)
			}
			s.view(head).Values(values, s.of(head))
			for i := range n {
				compress.Unrotate(values[i*d:(i+1)*d], d)
			}
			k, v = append(k, keys...), append(v, values...)
		}
		for r := range rows {
			out, lse := row(q[(head*rows+r)*d:][:d], k, v, softcap)
			outs, lses = append(outs, out), append(lses, lse)
		}
	}
	return outs, lses
}

func row(q, k, v []float32, softcap float64) (out []float64, lse float64) {
	d := len(q)
	scores, most := make([]float64, len(k)/d), math.Inf(-1)
	for i := range scores {
		for j, x := range q {
			scores[i] += float64(x) * float64(k[i*d+j])
		}
		if softcap != 0 {
			scores[i] = softcap * math.Tanh(scores[i]/softcap)
		}
		most = max(most, scores[i])
	}
	out = make([]float64, d)
	sum := 0.
	for i, s := range scores {
		w := math.Exp(s - most)
		sum += w
		for j := range out {
			out[j] += w * float64(v[i*d+j])
		}
	}
	for j := range out {
		out[j] /= sum
	}
	return out, most + math.Log(sum)
}

// query makes rows [heads][rows][d] whose products with a shape's keys spread about as far as strength says.
func (m shape) query(rng *rand.Rand, rows int, strength float64) []float32 {
	scale := strength / math.Sqrt(float64(m.d))
	if m.keys != 0 {
		scale /= m.keys
	}
	return normal(rng, m.heads*rows*m.d, scale)
}

// differs compares an answer with that of dense: the largest relative error of an output and error of a log-sum-exp.
func differs(got []attention.Partial, outs [][]float64, lses []float64) (output, lse float64) {
	for i, want := range outs {
		x := make([]float32, len(want))
		got[i].Output(x)
		var diff, norm float64
		for j, w := range want {
			diff, norm = diff+(float64(x[j])-w)*(float64(x[j])-w), norm+w*w
		}
		if norm > 0 {
			diff /= norm
		}
		e := math.Abs(float64(got[i].LSE()) - lses[i])
		if !(diff <= math.MaxFloat64) || !(e <= math.MaxFloat64) { // no numbers
			return math.Inf(1), math.Inf(1)
		}
		output, lse = max(output, math.Sqrt(diff)), max(lse, e)
	}
	return output, lse
}
