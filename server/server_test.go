package server

import (
	"context"
	"math"
	"math/rand/v2"
	"testing"
	"time"

	"kvtier/attention"
	"kvtier/compress"
	kvtierv1 "kvtier/proto/kvtier/v1"
)

// model makes the rows and queries of a made-up model: clustered keys, one
// topic a run of tokens, so that grouping has something to find.
type model struct {
	spec *kvtierv1.ModelSpec
	n    int
	k, v [][]float32 // [layer][n][kvHeads][headDim], representable in bf16
	q    [][]float32 // [layer][n][queryHeads][headDim]
	ids  []uint64
}

func newModel(seed uint64, spec *kvtierv1.ModelSpec, n int) *model {
	rng := rand.New(rand.NewPCG(seed, 1))
	m := &model{spec: spec, n: n}
	d := int(spec.HeadDim)
	for range spec.Layers {
		topics := normal(rng, 32*d)
		fill := func(heads int, noise float32) []float32 {
			x := make([]float32, n*heads*d)
			for t := range n {
				topic := (t / 40 * 7) % 32
				for i := range heads * d {
					x[t*heads*d+i] = round(1.5*topics[topic*d+i%d] + noise*float32(rng.NormFloat64()))
				}
			}
			return x
		}
		m.k, m.v = append(m.k, fill(int(spec.KvHeads), .5)), append(m.v, fill(int(spec.KvHeads), .5))
		m.q = append(m.q, fill(int(spec.QueryHeads), .5))
	}
	for range n {
		m.ids = append(m.ids, rng.Uint64N(50000))
	}
	return m
}

func normal(rng *rand.Rand, n int) []float32 {
	x := make([]float32, n)
	for i := range x {
		x[i] = float32(rng.NormFloat64())
	}
	return x
}

// round makes a float representable as bf16.
func round(x float32) float32 {
	return math.Float32frombits((math.Float32bits(x) + 0x8000) &^ 0xffff)
}

func testSpec() *kvtierv1.ModelSpec {
	return &kvtierv1.ModelSpec{Layers: 2, QueryHeads: 4, KvHeads: 2, HeadDim: 32, Fingerprint: []byte("test"),
		KvDtype: kvtierv1.ElementType_ELEMENT_TYPE_BF16}
}

func slidingSpec() *kvtierv1.ModelSpec {
	s := testSpec()
	s.Layers = 3
	s.LayerKinds = []*kvtierv1.LayerKind{{SlidingWindow: 100}, {}, {SlidingWindow: 300}}
	return s
}

func bf16Bytes(x []float32) []byte {
	b := make([]byte, 2*len(x))
	compress.FromFloat32(b, x, compress.BF16)
	return b
}

func openServer(t testing.TB, dir string, o Options) *Server {
	t.Helper()
	o.DataDir = dir
	if o.AuditShare == 0 {
		o.AuditShare = -1
	}
	if o.GPUAuditShare == 0 {
		o.GPUAuditShare = -1
	}
	srv, err := Open(context.Background(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closeServer(t, srv) })
	return srv
}

func closeServer(t testing.TB, srv *Server) {
	t.Helper()
	if err := srv.Close(context.Background()); err != nil {
		t.Fatal(err)
	}
}

func openSequence(t testing.TB, srv *Server, r *kvtierv1.OpenSequenceRequest) *sequence {
	t.Helper()
	s, release, err := srv.open(context.Background(), r)
	if err != nil {
		t.Fatal(err)
	}
	release()
	return s
}

// stored makes a sequence of all the model's tokens, of which the full segments are sealed.
func (m *model) stored(t testing.TB, srv *Server, p kvtierv1.Profile) *sequence {
	t.Helper()
	s := openSequence(t, srv, &kvtierv1.OpenSequenceRequest{Spec: m.spec, Profile: p})
	m.feed(t, s, 0, m.n)
	waitSealed(t, s, uint64((m.n-recentTokens)/segment*segment))
	return s
}

// hold is sequence.hold of one that is there.
func hold(t testing.TB, s *sequence) (release func()) {
	t.Helper()
	release, err := s.hold()
	if err != nil {
		t.Fatal(err)
	}
	return release
}

// feed appends tokens [lo, hi) of the model, all layers.
func (m *model) feed(t testing.TB, s *sequence, lo, hi int) {
	t.Helper()
	row := int(m.spec.KvHeads * m.spec.HeadDim)
	qrow := int(m.spec.QueryHeads * m.spec.HeadDim)
	for l := range int(m.spec.Layers) {
		r := &appendRequest{layer: l, start: uint64(lo), k: bf16Bytes(m.k[l][lo*row : hi*row]), v: bf16Bytes(m.v[l][lo*row : hi*row]),
			queries: bf16Bytes(m.q[l][lo*qrow : min(hi, lo+8)*qrow])}
		if l == 0 {
			r.ids = m.ids[lo:hi]
		}
		if err := s.append(context.Background(), r); err != nil {
			t.Fatal(err)
		}
	}
}

// dense is attention in float64 over the model's own rows, for one position.
func (m *model) dense(layer, pos int) []float32 {
	d, kv, qh := int(m.spec.HeadDim), int(m.spec.KvHeads), int(m.spec.QueryHeads)
	window := 0
	if len(m.spec.LayerKinds) > 0 {
		window = int(m.spec.LayerKinds[layer].SlidingWindow)
	}
	scale := 1 / math.Sqrt(float64(d))
	if m.spec.Scale != 0 {
		scale = float64(m.spec.Scale)
	}
	out := make([]float32, qh*d)
	for h := range qh {
		lo := 0
		if window > 0 {
			lo = max(0, pos+1-window)
		}
		g := h / (qh / kv)
		scores := make([]float64, 0, pos+1)
		top := math.Inf(-1)
		for t := lo; t <= pos; t++ {
			var s float64
			for i := range d {
				s += float64(m.q[layer][(pos*qh+h)*d+i]) * float64(m.k[layer][(t*kv+g)*d+i])
			}
			s *= scale
			if c := float64(m.spec.Softcap); c > 0 {
				s = c * math.Tanh(s/c)
			}
			scores = append(scores, s)
			top = max(top, s)
		}
		sum := 0.0
		if len(m.spec.SinkLogits) > 0 {
			x := float64(m.spec.SinkLogits[layer*qh+h])
			top = max(top, x)
			sum = math.Exp(x - top)
		}
		acc := make([]float64, d)
		for i, s := range scores {
			w := math.Exp(s - top)
			sum += w
			for j := range d {
				acc[j] += w * float64(m.v[layer][((lo+i)*kv+g)*d+j])
			}
		}
		for j := range d {
			out[h*d+j] = float32(acc[j] / sum)
		}
	}
	return out
}

// ask attends at a position that is appended already.
func (m *model) ask(t testing.TB, s *sequence, layer, pos int, b budget) *answer {
	t.Helper()
	row := int(m.spec.QueryHeads * m.spec.HeadDim)
	q := make([]byte, 4*row)
	compress.FromFloat32(q, m.q[layer][pos*row:(pos+1)*row], compress.F32)
	a, err := s.attend(context.Background(), &query{layer: layer, start: uint64(pos), q: q, budget: b})
	if err != nil {
		t.Fatal(err)
	}
	return a
}

var exactBudget = budget{mode: kvtierv1.AttendMode_ATTEND_MODE_EXACT}

func shareBudget(x float32) budget {
	return budget{mode: kvtierv1.AttendMode_ATTEND_MODE_BUDGET, share: x}
}

// waitSealed waits until n tokens are sealed.
func waitSealed(t testing.TB, s *sequence, n uint64) {
	t.Helper()
	for range 2000 {
		if st := s.snapshot(); st.sealed() >= n {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	st := s.snapshot()
	t.Fatalf("%d tokens sealed, want %d", st.sealed(), n)
}

// worst returns the largest relative error of any head.
func (m *model) worst(got []float32, want []float32) (e float32) {
	d := int(m.spec.HeadDim)
	for i := 0; i < len(want); i += d {
		e = max(e, attention.RelativeError(got[i:i+d], want[i:i+d]))
	}
	return e
}

// check compares answers of all layers at a position.
func (m *model) check(t testing.TB, s *sequence, pos int, b budget, tolerance float32) {
	t.Helper()
	for l := range int(m.spec.Layers) {
		a := m.ask(t, s, l, pos, b)
		if e := m.worst(a.out, m.dense(l, pos)); !(e <= tolerance) {
			t.Fatalf("layer %d, position %d: error %v, more than %v; account %v", l, pos, e, tolerance, a.account)
		}
	}
}

// The whole life of a sequence: tail, sealing, restart, in every profile.
func TestLifeOfASequence(t *testing.T) {
	for _, c := range []struct {
		profile kvtierv1.Profile
		spec    *kvtierv1.ModelSpec
		exact   float32 // tolerance of mode exact
	}{
		{kvtierv1.Profile_PROFILE_EXACT, testSpec(), 1e-5},
		{kvtierv1.Profile_PROFILE_NEUTRAL, testSpec(), .01},
		{kvtierv1.Profile_PROFILE_BALANCED, testSpec(), .1},
		{kvtierv1.Profile_PROFILE_EXACT, slidingSpec(), 1e-5},
		{kvtierv1.Profile_PROFILE_BALANCED, slidingSpec(), .1},
	} {
		t.Run(c.profile.String(), func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			m := newModel(1, c.spec, 5000)
			o := Options{RAMBytes: 1 << 20, ReadAllTokens: -1}
			srv := openServer(t, dir, o)
			s := openSequence(t, srv, &kvtierv1.OpenSequenceRequest{Spec: c.spec, Profile: c.profile})
			m.feed(t, s, 0, 300)
			m.check(t, s, 299, shareBudget(.2), 1e-5) // all in the tail
			m.feed(t, s, 300, 5000)
			waitSealed(t, s, 4096)
			m.check(t, s, 4999, exactBudget, c.exact)
			closeServer(t, srv)

			srv = openServer(t, dir, o)
			s, err := srv.sequence(s.id)
			if err != nil {
				t.Fatal(err)
			}
			if a := s.ack(); a.Accepted != 5000 || a.Sealed != 4096 || a.PowerSafe != 5000 {
				t.Fatalf("after the restart: %v", a)
			}
			m.check(t, s, 4999, exactBudget, c.exact)
			m.check(t, s, 4999, shareBudget(.3), .3)
		})
	}
}
