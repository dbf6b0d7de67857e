//go:build linux

package server

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"kvtier/attention"
	"kvtier/compress"
	kvtierv1 "kvtier/proto/kvtier/v1"
	"kvtier/server/sparse"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// path is one way to the server for Append and Attend. The suite runs over
// every path; what it expects is the same.
type path interface {
	open(ctx context.Context, id string) (*kvtierv1.Ack, error)
	append(ctx context.Context, spec *kvtierv1.ModelSpec, r *kvtierv1.AppendRequest) (*kvtierv1.Ack, error)
	attend(ctx context.Context, spec *kvtierv1.ModelSpec, r *kvtierv1.AttendRequest) (*kvtierv1.AttendResponse, error)
	close() // the worker dies
}

var paths = []string{"grpc", "stream", "inline", "regions"}

// rig is a server with all its front ends.
type rig struct {
	srv     *Server
	socket  string // of the fast path
	control kvtierv1.SequenceServiceClient
}

func newRig(t testing.TB, o Options) *rig {
	t.Helper()
	return newRigAt(t, filepath.Join(t.TempDir(), "data"), o)
}

// newRigAt is newRig over a data folder.
func newRigAt(t testing.TB, data string, o Options) *rig {
	t.Helper()
	dir := t.TempDir()
	r := &rig{srv: openServer(t, data, o), socket: filepath.Join(dir, "f")}
	listen := func(name string) *net.UnixListener {
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: name, Net: "unix"})
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	done := make(chan error, 2)
	g := grpc.NewServer(GRPCOptions()...)
	r.srv.Register(g)
	gl, fl := listen(filepath.Join(dir, "g")), listen(r.socket)
	go func() { done <- g.Serve(gl) }()
	go func() { done <- r.srv.ServeFast(fl) }()
	conn, err := grpc.NewClient("unix:"+gl.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(256<<20), grpc.MaxCallSendMsgSize(256<<20)))
	if err != nil {
		t.Fatal(err)
	}
	r.control = kvtierv1.NewSequenceServiceClient(conn)
	t.Cleanup(func() {
		_ = conn.Close()
		g.Stop()
		closeServer(t, r.srv)
		for range 2 {
			if err := <-done; err != nil {
				t.Errorf("serving: %v", err)
			}
		}
	})
	return r
}

// path connects a worker.
func (r *rig) path(t testing.TB, kind string) path {
	t.Helper()
	switch kind {
	case "inline":
		return dialFast(t, r.socket)
	case "regions":
		return dialFast(t, r.socket).withRegions(16 << 20)
	}
	l, err := r.control.CreateLease(t.Context(), &kvtierv1.CreateLeaseRequest{TtlSeconds: 600})
	if err != nil {
		t.Fatal(err)
	}
	return &grpcPath{t: t, client: r.control, lease: l.LeaseId, stream: kind == "stream"}
}

type grpcPath struct {
	t      testing.TB
	client kvtierv1.SequenceServiceClient
	lease  uint64
	stream bool
}

func (p *grpcPath) open(ctx context.Context, id string) (*kvtierv1.Ack, error) {
	r, err := p.client.OpenSequence(ctx, &kvtierv1.OpenSequenceRequest{SequenceId: id, LeaseId: p.lease})
	return r.GetAck(), fromStatus(err)
}

func (p *grpcPath) append(ctx context.Context, _ *kvtierv1.ModelSpec, r *kvtierv1.AppendRequest) (*kvtierv1.Ack, error) {
	a, err := p.client.Append(ctx, r)
	return a.GetAck(), fromStatus(err)
}

func (p *grpcPath) attend(ctx context.Context, _ *kvtierv1.ModelSpec, r *kvtierv1.AttendRequest) (*kvtierv1.AttendResponse, error) {
	if !p.stream {
		a, err := p.client.Attend(ctx, r)
		return a, fromStatus(err)
	}
	st, err := p.client.AttendStream(ctx)
	if err == nil {
		err = st.Send(&kvtierv1.AttendStreamRequest{Request: r})
	}
	if err != nil && !errors.Is(err, io.EOF) { // EOF: the stream has ended, Recv says why
		return nil, fromStatus(err)
	}
	defer func() { _ = st.CloseSend() }()
	a, err := st.Recv()
	if err != nil {
		return nil, fromStatus(err)
	}
	_ = st.CloseSend()
	_, _ = st.Recv()
	if a.ErrorCode != 0 {
		return nil, textError(a.ErrorCode, a.ErrorMessage)
	}
	return a.Response, nil
}

func (p *grpcPath) close() {
	_, _ = p.client.RevokeLease(context.Background(), &kvtierv1.RevokeLeaseRequest{LeaseId: p.lease})
}

// fromStatus returns a call's error with its reason.
func fromStatus(err error) error {
	if err == nil {
		return nil
	}
	st := status.Convert(err)
	e := &Error{Code: st.Code(), Message: st.Message()}
	for _, d := range st.Details() {
		if info, ok := d.(*errdetails.ErrorInfo); ok {
			e.Reason = info.Reason
		}
	}
	return e
}

func wantError(t testing.TB, err error, code codes.Code, reason string) {
	t.Helper()
	e := &Error{}
	if !errors.As(err, &e) || e.Code != code || reason != "" && e.Reason != reason {
		t.Fatalf("error %v (%v %s), want %v %s", err, e.Code, e.Reason, code, reason)
	}
	if e.Message == "" {
		t.Fatal("an error without a message")
	}
}

func overPaths(t *testing.T, o Options, f func(t *testing.T, r *rig, p path)) {
	for _, kind := range paths {
		t.Run(kind, func(t *testing.T) {
			r := newRig(t, o)
			f(t, r, r.path(t, kind))
		})
	}
}

// worker feeds a model's rows through a path.
type worker struct {
	*model
	t     testing.TB
	r     *rig
	p     path
	id    string
	dtype compress.ElementType
}

// newWorker makes a sequence that only p holds.
func newWorker(t testing.TB, r *rig, p path, m *model, profile kvtierv1.Profile) *worker {
	t.Helper()
	ctx := t.Context()
	l, err := r.control.CreateLease(ctx, &kvtierv1.CreateLeaseRequest{})
	if err != nil {
		t.Fatal(err)
	}
	s, err := r.control.OpenSequence(ctx, &kvtierv1.OpenSequenceRequest{Spec: m.spec, Profile: profile, LeaseId: l.LeaseId})
	if err != nil {
		t.Fatal(err)
	}
	w := &worker{model: m, t: t, r: r, p: p, id: s.SequenceId, dtype: compress.BF16}
	if _, err := p.open(ctx, w.id); err != nil {
		t.Fatal(err)
	}
	if _, err := r.control.RevokeLease(ctx, &kvtierv1.RevokeLeaseRequest{LeaseId: l.LeaseId}); err != nil {
		t.Fatal(err)
	}
	return w
}

func encode(x []float32, typ compress.ElementType) []byte {
	b := make([]byte, len(x)*typ.Size())
	compress.FromFloat32(b, x, typ)
	return b
}

func decode(b []byte) []float32 {
	x := make([]float32, len(b)/4)
	compress.ToFloat32(x, b, compress.F32)
	return x
}

// rows makes an append of one layer's positions [lo, hi).
func (w *worker) rows(layer, lo, hi int) *kvtierv1.AppendRequest {
	row := int(w.spec.KvHeads * w.spec.HeadDim)
	qrow := int(w.spec.QueryHeads * w.spec.HeadDim)
	return &kvtierv1.AppendRequest{SequenceId: w.id, Layer: uint32(layer), Start: uint64(lo), Dtype: kvtierv1.ElementType(w.dtype),
		K: encode(w.k[layer][lo*row:hi*row], w.dtype), V: encode(w.v[layer][lo*row:hi*row], w.dtype), TokenIds: w.ids[lo:hi],
		Queries: encode(w.q[layer][lo*qrow:min(hi, lo+4)*qrow], w.dtype)}
}

func (w *worker) append(r *kvtierv1.AppendRequest) *kvtierv1.Ack {
	w.t.Helper()
	a, err := w.p.append(w.t.Context(), w.spec, r)
	if err != nil {
		w.t.Fatal(err)
	}
	return a
}

// feedAll appends positions [lo, hi) in every layer.
func (w *worker) feedAll(lo, hi int) (a *kvtierv1.Ack) {
	w.t.Helper()
	for l := range int(w.spec.Layers) {
		a = w.append(w.rows(l, lo, hi))
	}
	return a
}

// queries asks at positions [lo, hi) in f32.
func (w *worker) queries(lo, hi, layer int) *kvtierv1.AttendItem {
	qrow := int(w.spec.QueryHeads * w.spec.HeadDim)
	return &kvtierv1.AttendItem{SequenceId: w.id, Start: uint64(lo), Q: encode(w.q[layer][lo*qrow:hi*qrow], compress.F32)}
}

func request(layer int, b *kvtierv1.Budget, items ...*kvtierv1.AttendItem) *kvtierv1.AttendRequest {
	return &kvtierv1.AttendRequest{Layer: uint32(layer), Dtype: kvtierv1.ElementType_ELEMENT_TYPE_F32, Budget: b, Items: items}
}

func (w *worker) attend(r *kvtierv1.AttendRequest) []*kvtierv1.AttendResult {
	w.t.Helper()
	a, err := w.p.attend(w.t.Context(), w.spec, r)
	if err != nil {
		w.t.Fatal(err)
	}
	if len(a.Results) != len(r.Items) {
		w.t.Fatalf("%d results for %d items", len(a.Results), len(r.Items))
	}
	return a.Results
}

var (
	exactly   = &kvtierv1.Budget{Mode: kvtierv1.AttendMode_ATTEND_MODE_EXACT}
	tolerance = float32(2e-5)
)

// foreign are tokens that the worker attends itself: [n][kvHeads][headDim].
type foreign struct{ k, v []float32 }

// truth is the answer at a position in float64, and its log-sum-exp.
func (m *model) truth(layer, pos int, more *foreign, sinks bool) (out, lse []float32) {
	sp := m.spec
	d, kv, qh := int(sp.HeadDim), int(sp.KvHeads), int(sp.QueryHeads)
	scale := float64(sp.Scale)
	if scale == 0 {
		scale = 1 / math.Sqrt(float64(d))
	}
	lo := 0
	if len(sp.LayerKinds) > 0 {
		if w := int(sp.LayerKinds[layer].SlidingWindow); w > 0 {
			lo = max(0, pos+1-w)
		}
	}
	for h := range qh {
		g := h / (qh / kv)
		q := m.q[layer][(pos*qh+h)*d:][:d]
		var scores []float64
		var values [][]float32
		see := func(k, v []float32, lo, hi int) {
			for t := lo; t < hi; t++ {
				s := 0.0
				for i, x := range k[(t*kv+g)*d:][:d] {
					s += float64(q[i]) * float64(x)
				}
				s *= scale
				if c := float64(sp.Softcap); c > 0 {
					s = c * math.Tanh(s/c)
				}
				scores, values = append(scores, s), append(values, v[(t*kv+g)*d:][:d])
			}
		}
		if pos >= 0 && m.k != nil {
			see(m.k[layer], m.v[layer], lo, pos+1)
		}
		if more != nil {
			see(more.k, more.v, 0, len(more.k)/(kv*d))
		}
		if sinks && len(sp.SinkLogits) > 0 {
			scores, values = append(scores, float64(sp.SinkLogits[layer*qh+h])), append(values, make([]float32, d))
		}
		top, sum, acc := slices.Max(scores), 0.0, make([]float64, d)
		for i, s := range scores {
			w := math.Exp(s - top)
			sum += w
			for j, x := range values[i] {
				acc[j] += w * float64(x)
			}
		}
		for _, x := range acc {
			out = append(out, float32(x/sum))
		}
		lse = append(lse, float32(top+math.Log(sum)))
	}
	return out, lse
}

// verify compares a result for positions lo... with the truth.
func (w *worker) verify(res *kvtierv1.AttendResult, layer, lo, n int, more *foreign, within float32) {
	w.t.Helper()
	out, lse := decode(res.Output), decode(res.Lse)
	qh, d := int(w.spec.QueryHeads), int(w.spec.HeadDim)
	if len(out) != n*qh*d || len(lse) != n*qh {
		w.t.Fatalf("%d outputs and %d lse for %d positions", len(out), len(lse), n)
	}
	for i := range n {
		o, l := w.truth(layer, lo+i, more, true)
		for h := range qh {
			if e := attention.RelativeError(out[(i*qh+h)*d:][:d], o[h*d:][:d]); !(e <= within) {
				w.t.Fatalf("layer %d, position %d, head %d: error %v > %v", layer, lo+i, h, e, within)
			}
			if e := math.Abs(float64(lse[i*qh+h] - l[h])); !(e <= 4*float64(within)+1e-5*math.Abs(float64(l[h]))) {
				w.t.Fatalf("layer %d, position %d, head %d: lse %v, want %v", layer, lo+i, h, lse[i*qh+h], l[h])
			}
		}
	}
}

func TestPathAppend(t *testing.T) {
	overPaths(t, Options{}, func(t *testing.T, r *rig, p path) {
		w := newWorker(t, r, p, newModel(1, slidingSpec(), 80), 0)
		a := w.append(w.rows(0, 0, 60))
		if a.Accepted != 0 {
			t.Fatalf("accepted %d with one layer", a.Accepted)
		}
		w.append(w.rows(1, 0, 60))
		if a = w.append(w.rows(2, 0, 60)); a.Accepted != 60 || a.CrashSafe != 60 || a.Sealed != 0 {
			t.Fatalf("after a bulk append: %v", a)
		}
		for i := 60; i < 70; i++ { // single steps
			if a = w.feedAll(i, i+1); a.Accepted != uint64(i+1) {
				t.Fatalf("step %d: %v", i, a)
			}
		}
		// The same again, whole and overlapping new rows.
		if a = w.append(w.rows(1, 0, 70)); a.Accepted != 70 {
			t.Fatalf("repeated: %v", a)
		}
		if a = w.feedAll(65, 75); a.Accepted != 75 {
			t.Fatalf("overlapping: %v", a)
		}
		other := w.rows(1, 70, 80)
		other.K[0] ^= 1
		_, err := p.append(t.Context(), w.spec, other)
		wantError(t, err, codes.AlreadyExists, ReasonExists)
		other = w.rows(1, 70, 80)
		other.V[5] ^= 1
		_, err = p.append(t.Context(), w.spec, other)
		wantError(t, err, codes.AlreadyExists, ReasonExists)
		_, err = p.append(t.Context(), w.spec, w.rows(0, 76, 80))
		wantError(t, err, codes.OutOfRange, ReasonGap)
		if a, err = p.open(t.Context(), w.id); err != nil || a.Accepted != 75 {
			t.Fatalf("what was refused changed something: %v, %v", a, err)
		}
		f, err := r.control.Flush(t.Context(), &kvtierv1.FlushRequest{SequenceId: w.id})
		if err != nil || f.Ack.PowerSafe != 75 {
			t.Fatalf("flush: %v, %v", f, err)
		}
		// Queries alone, no rows.
		q := w.rows(1, 0, 4)
		q.K, q.V, q.TokenIds = nil, nil, nil
		w.append(q)
		s, _ := r.srv.sequence(w.id)
		if st := s.snapshot(); !slices.Equal(st.ids, w.ids[:75]) {
			t.Fatalf("token ids: %v, want %v", st.ids, w.ids[:75])
		}
	})
}

func TestPathElementTypes(t *testing.T) {
	types := []compress.ElementType{compress.F32, compress.BF16, compress.F16}
	overPaths(t, Options{}, func(t *testing.T, r *rig, p path) {
		for _, stored := range types {
			for _, sent := range types {
				for _, exact := range []bool{true, false} {
					spec := testSpec()
					spec.KvDtype = kvtierv1.ElementType(stored)
					m := newModel(3, spec, 10)
					for l := range m.k {
						for _, x := range [][]float32{m.k[l], m.v[l]} {
							for i := range x {
								if x[i] = float32(int(x[i]*16)) / 16; !exact {
									x[i] += float32(i%3) * 1.0 / 4096 // has no place in either 16-bit type
								}
							}
						}
					}
					w := newWorker(t, r, p, m, 0)
					w.dtype = sent
					// What the worker holds, after its own rounding.
					in := w.rows(0, 0, 10)
					held := make([]float32, len(in.K)/sent.Size())
					compress.ToFloat32(held, in.K, sent)
					fits := compress.Lossless(held, stored)
					for i := 0; i < len(in.V); i += sent.Size() {
						var x [1]float32
						compress.ToFloat32(x[:], in.V[i:], sent)
						fits = fits && compress.Lossless(x[:], stored)
					}
					_, err := p.append(t.Context(), spec, in)
					if sent != stored && !fits {
						wantError(t, err, codes.InvalidArgument, ReasonLossy)
						in.Convert = true
						_, err = p.append(t.Context(), spec, in)
					}
					if err != nil {
						t.Fatalf("%v into %v: %v", sent, stored, err)
					}
					got, err := r.control.ReadKV(t.Context(), &kvtierv1.ReadKVRequest{SequenceId: w.id, Count: 10})
					if err != nil || !bytes.Equal(got.K, encode(held, stored)) {
						t.Fatalf("%v into %v: rows differ, %v", sent, stored, err)
					}
				}
			}
		}
	})
}

func TestPathExactAnswers(t *testing.T) {
	sinks := func(s *kvtierv1.ModelSpec) {
		rng := rand.New(rand.NewPCG(5, 5))
		s.SinkLogits = normal(rng, int(s.Layers*s.QueryHeads))
	}
	cases := map[string]func(*kvtierv1.ModelSpec){
		"grouped": func(*kvtierv1.ModelSpec) {},
		"one":     func(s *kvtierv1.ModelSpec) { s.QueryHeads = 2 },
		"wide":    func(s *kvtierv1.ModelSpec) { s.HeadDim, s.QueryHeads = 64, 6 },
		"narrow":  func(s *kvtierv1.ModelSpec) { s.HeadDim = 16 },
		"window":  func(s *kvtierv1.ModelSpec) { s.LayerKinds = []*kvtierv1.LayerKind{{SlidingWindow: 17}, {}} },
		"softcap": func(s *kvtierv1.ModelSpec) { s.Softcap = 3 },
		"sinks":   sinks,
		"scale":   func(s *kvtierv1.ModelSpec) { s.Scale = .05 },
		"together": func(s *kvtierv1.ModelSpec) {
			sinks(s)
			s.Softcap, s.Scale = 20, .3
			s.LayerKinds = []*kvtierv1.LayerKind{{SlidingWindow: 40}, {}}
		},
	}
	overPaths(t, Options{ReadAllTokens: -1}, func(t *testing.T, r *rig, p path) {
		for name, change := range cases {
			t.Run(name, func(t *testing.T) {
				spec := testSpec()
				change(spec)
				w := newWorker(t, r, p, newModel(2, spec, 60), 0)
				w.feedAll(0, 55)
				for l := range int(spec.Layers) {
					for _, at := range [][2]int{{0, 1}, {54, 55}, {50, 55}} {
						// A window keeps what a later query may see, from its newest position on.
						if len(spec.LayerKinds) > 0 && at[0] == 0 {
							continue
						}
						res := w.attend(request(l, exactly, w.queries(at[0], at[1], l)))[0]
						w.verify(res, l, at[0], at[1]-at[0], nil, tolerance)
						if res.Account.Mode != kvtierv1.AttendMode_ATTEND_MODE_EXACT || res.Ack.Accepted != 55 || res.Account.NsTotal == 0 {
							t.Fatalf("account %v, ack %v", res.Account, res.Ack)
						}
					}
				}
				// Rows and queries in one call, in bf16: queries are rounded to it.
				for l := range int(spec.Layers) {
					it := w.queries(55, 60, l)
					rows := w.rows(l, 55, 60)
					it.K, it.V, it.TokenIds = rows.K, rows.V, rows.TokenIds
					it.Q = encode(decode(it.Q), compress.BF16)
					req := request(l, exactly, it)
					req.Dtype = kvtierv1.ElementType_ELEMENT_TYPE_BF16
					res := w.attend(req)[0]
					w.verify(res, l, 55, 5, nil, tolerance)
					if want := uint64(55 + 5*(l/(int(spec.Layers)-1))); res.Ack.Accepted != want {
						t.Fatalf("layer %d: %v, want %d accepted", l, res.Ack, want)
					}
				}
			})
		}
	})
}

// sealedWorker has 2,048 sealed tokens and some more.
func sealedWorker(t *testing.T, r *rig, p path, spec *kvtierv1.ModelSpec, n int, profile kvtierv1.Profile) *worker {
	t.Helper()
	w := newWorker(t, r, p, newModel(4, spec, n+20), profile)
	for at := 0; at < n; at += 600 {
		w.feedAll(at, min(n, at+600))
	}
	s, err := r.srv.sequence(w.id)
	if err != nil {
		t.Fatal(err)
	}
	waitSealed(t, s, 2048)
	return w
}

func TestPathSealed(t *testing.T) {
	overPaths(t, Options{ReadAllTokens: -1}, func(t *testing.T, r *rig, p path) {
		const n = 2048 + recentTokens + 10
		w := sealedWorker(t, r, p, slidingSpec(), n, kvtierv1.Profile_PROFILE_EXACT)
		for l := range int(w.spec.Layers) {
			w.verify(w.attend(request(l, exactly, w.queries(n-3, n, l)))[0], l, n-3, 3, nil, tolerance)
		}
		// A position inside the sealed part sees less of it.
		w.verify(w.attend(request(1, exactly, w.queries(1000, 1002, 1)))[0], 1, 1000, 2, nil, tolerance)
		// A causal chunk whose rows come with it.
		for l := range int(w.spec.Layers) {
			it, rows := w.queries(n, n+20, l), w.rows(l, n, n+20)
			it.Q = encode(decode(it.Q), compress.BF16)
			it.K, it.V, it.TokenIds = rows.K, rows.V, rows.TokenIds
			req := request(l, exactly, it)
			req.Dtype = kvtierv1.ElementType_ELEMENT_TYPE_BF16
			res := w.attend(req)[0]
			w.verify(res, l, n, 20, nil, tolerance)
			if res.Ack.Sealed != 2048 {
				t.Fatalf("ack %v", res.Ack)
			}
		}
		_, err := p.append(t.Context(), w.spec, w.rows(0, 2000, 2010))
		wantError(t, err, codes.AlreadyExists, ReasonSealed)
	})
}

func TestPathBudgets(t *testing.T) {
	overPaths(t, Options{ReadAllTokens: -1}, func(t *testing.T, r *rig, p path) {
		const n = 2048 + recentTokens
		w := sealedWorker(t, r, p, testSpec(), n, 0)
		mode := func(m kvtierv1.AttendMode) *kvtierv1.Budget { return &kvtierv1.Budget{Mode: m} }
		ask := func(b *kvtierv1.Budget) *kvtierv1.Account {
			t.Helper()
			res := w.attend(request(1, b, w.queries(n-1, n, 1)))[0]
			w.verify(res, 1, n-1, 1, nil, .5)
			return res.Account
		}
		for _, b := range []*kvtierv1.Budget{
			{Mode: kvtierv1.AttendMode_ATTEND_MODE_BUDGET, Share: .3},
			{Mode: kvtierv1.AttendMode_ATTEND_MODE_BUDGET, Tokens: 600},
			mode(kvtierv1.AttendMode_ATTEND_MODE_BUDGET), mode(0), nil,
		} {
			a := ask(b)
			if a.Mode != kvtierv1.AttendMode_ATTEND_MODE_BUDGET || a.TokensEstimated == 0 || a.EstimatedError <= 0 || a.ErrorP95 <= a.EstimatedError || a.BytesFull == 0 || a.TargetMissed {
				t.Fatalf("budget %v: %v", b, a)
			}
			if got, share := float32(a.BytesRam+a.BytesNvme)/float32(a.BytesFull), max(.2, b.GetShare()); got > 1.1*max(share, 600./2048+sparse.MeansShare(int(w.spec.HeadDim))) {
				t.Fatalf("budget %v transferred a share of %v", b, got)
			}
		}
		if a := ask(&kvtierv1.Budget{Mode: kvtierv1.AttendMode_ATTEND_MODE_BUDGET, Share: 1}); a.TokensEstimated != 0 || a.Mode != kvtierv1.AttendMode_ATTEND_MODE_EXACT {
			t.Fatalf("the whole share: %v", a)
		}
		a := ask(&kvtierv1.Budget{Mode: kvtierv1.AttendMode_ATTEND_MODE_TARGET, TargetError: .2})
		if a.TokensEstimated > 0 && (a.Mode != kvtierv1.AttendMode_ATTEND_MODE_TARGET || a.ErrorP95 > .2 || a.TargetMissed) {
			t.Fatalf("target .2: %v", a)
		}
		// A target under the codec's own error means reading everything.
		if a = ask(&kvtierv1.Budget{Mode: kvtierv1.AttendMode_ATTEND_MODE_TARGET, TargetError: 1e-6}); a.TokensEstimated != 0 || !a.TargetMissed {
			t.Fatalf("target 1e-6: %v", a)
		}
	})
}

func TestPathWorkersOwnPartial(t *testing.T) {
	overPaths(t, Options{}, func(t *testing.T, r *rig, p path) {
		spec := testSpec()
		w := newWorker(t, r, p, newModel(6, spec, 50), 0)
		w.feedAll(0, 48)
		own := newModel(7, spec, 9)
		f := &foreign{own.k[1], own.v[1]}
		it := w.queries(45, 48, 1)
		var out, lse []float32
		for pos := 45; pos < 48; pos++ {
			o, l := (&model{spec: spec, q: w.q}).truth(1, pos, f, false)
			out, lse = append(out, o...), append(lse, l...)
		}
		it.PartialOutput, it.PartialLse = encode(out, compress.F32), encode(lse, compress.F32)
		w.verify(w.attend(request(1, exactly, it))[0], 1, 45, 3, f, tolerance)
		// A partial over nothing changes nothing.
		clear(out)
		for i := range lse {
			lse[i] = float32(math.Inf(-1))
		}
		it.PartialOutput, it.PartialLse = encode(out, compress.F32), encode(lse, compress.F32)
		w.verify(w.attend(request(1, exactly, it))[0], 1, 45, 3, nil, tolerance)
	})
}

func TestPathSeveralSequences(t *testing.T) {
	overPaths(t, Options{}, func(t *testing.T, r *rig, p path) {
		var ws []*worker
		for i := range 5 {
			m := newModel(uint64(10+i), testSpec(), 40)
			w := newWorker(t, r, p, m, 0)
			w.feedAll(0, 20+i)
			ws = append(ws, w)
		}
		req := request(1, exactly)
		for i, w := range ws {
			req.Items = append(req.Items, w.queries(19, 20+i, 1))
		}
		req.Items[2].Start = 1000 // past the end
		// Another one brings its rows, of which one is no number.
		bad := ws[3].rows(1, 23, 24)
		bad.K[1], bad.K[0] = 0x7f, 0xc0
		it := ws[3].queries(23, 24, 1)
		it.K, it.V = encode(make([]float32, 64), compress.F32), encode(make([]float32, 64), compress.F32)
		it.K[3], it.K[2] = 0x7f, 0xc0
		req.Items[3] = it
		res := ws[0].attend(req)
		for i, w := range ws {
			switch i {
			case 2:
				wantError(t, textError(res[i].ErrorCode, res[i].ErrorMessage), codes.OutOfRange, ReasonPastEnd)
			case 3:
				wantError(t, textError(res[i].ErrorCode, res[i].ErrorMessage), codes.InvalidArgument, ReasonValue)
			default:
				w.verify(res[i], 1, 19, i+1, nil, tolerance)
				if res[i].Ack.Accepted != uint64(20+i) {
					t.Fatalf("item %d: %v", i, res[i].Ack)
				}
			}
			if bad := i == 2 || i == 3; bad && len(res[i].Output) != 0 {
				t.Fatal("a failed item with an output")
			}
		}
		_, err := p.attend(t.Context(), ws[0].spec, request(1, exactly, ws[0].queries(3, 4, 1), ws[0].queries(5, 6, 1)))
		wantError(t, err, codes.InvalidArgument, ReasonArgument)
	})
}

func TestPathBadRequests(t *testing.T) {
	overPaths(t, Options{}, func(t *testing.T, r *rig, p path) {
		w := newWorker(t, r, p, newModel(1, testSpec(), 40), 0)
		w.feedAll(0, 20)
		nan, inf := []byte{0xc0, 0x7f}, []byte{0x80, 0x7f}
		appends := []struct {
			name   string
			change func(*kvtierv1.AppendRequest)
			code   codes.Code
			reason string
		}{
			{"NaN in k", func(r *kvtierv1.AppendRequest) { copy(r.K[10:], nan) }, codes.InvalidArgument, ReasonValue},
			{"infinity in v", func(r *kvtierv1.AppendRequest) { copy(r.V[10:], inf) }, codes.InvalidArgument, ReasonValue},
			{"NaN in queries", func(r *kvtierv1.AppendRequest) { copy(r.Queries, nan) }, codes.InvalidArgument, ReasonValue},
			{"a layer too far", func(r *kvtierv1.AppendRequest) { r.Layer = 2 }, codes.InvalidArgument, ReasonShape},
			{"the last layer of all", func(r *kvtierv1.AppendRequest) { r.Layer = math.MaxUint32 }, codes.InvalidArgument, ReasonShape},
			{"a start out of range", func(r *kvtierv1.AppendRequest) { r.Start = math.MaxUint64 }, codes.InvalidArgument, ReasonArgument},
			{"a gap", func(r *kvtierv1.AppendRequest) { r.Start = 30 }, codes.OutOfRange, ReasonGap},
			{"v of another size", func(r *kvtierv1.AppendRequest) { r.V = r.V[:len(r.V)-2] }, codes.InvalidArgument, ReasonShape},
			{"too few ids", func(r *kvtierv1.AppendRequest) { r.TokenIds = r.TokenIds[1:] }, codes.InvalidArgument, ReasonShape},
			{"unknown sequence", func(r *kvtierv1.AppendRequest) { r.SequenceId = "nothing" }, codes.NotFound, ReasonUnknown},
			{"unknown dtype", func(r *kvtierv1.AppendRequest) { r.Dtype = 9 }, codes.InvalidArgument, ""},
		}
		for _, c := range appends {
			t.Run("append "+c.name, func(t *testing.T) {
				if f, fast := p.(*fastClient); fast && (c.name == "unknown dtype" || f.in != nil && c.name == "v of another size") {
					t.Skip("this path cannot say it")
				}
				req := w.rows(1, 20, 25)
				c.change(req)
				_, err := p.append(t.Context(), w.spec, req)
				wantError(t, err, c.code, c.reason)
			})
		}
		attends := []struct {
			name   string
			change func(*kvtierv1.AttendRequest)
			code   codes.Code
			reason string
		}{
			{"past the end", func(r *kvtierv1.AttendRequest) { r.Items[0].Start = 20 }, codes.OutOfRange, ReasonPastEnd},
			{"a start out of range", func(r *kvtierv1.AttendRequest) { r.Items[0].Start = math.MaxUint64 - 1 }, codes.InvalidArgument, ReasonArgument},
			{"NaN in q", func(r *kvtierv1.AttendRequest) { copy(r.Items[0].Q, []byte{0, 0, 0xc0, 0x7f}) }, codes.InvalidArgument, ReasonValue},
			{"no q", func(r *kvtierv1.AttendRequest) { r.Items[0].Q = nil }, codes.InvalidArgument, ReasonShape},
			{"a layer too far", func(r *kvtierv1.AttendRequest) { r.Layer = 2 }, codes.InvalidArgument, ReasonShape},
			{"no items", func(r *kvtierv1.AttendRequest) { r.Items = nil }, codes.InvalidArgument, ReasonShape},
			{"unknown sequence", func(r *kvtierv1.AttendRequest) { r.Items[0].SequenceId = "nothing" }, codes.NotFound, ReasonUnknown},
			{"unknown mode", func(r *kvtierv1.AttendRequest) { r.Budget = &kvtierv1.Budget{Mode: 9} }, codes.InvalidArgument, ReasonArgument},
			{"share above 1", func(r *kvtierv1.AttendRequest) { r.Budget = &kvtierv1.Budget{Mode: 2, Share: 1.5} }, codes.InvalidArgument, ReasonArgument},
			{"share below 0", func(r *kvtierv1.AttendRequest) { r.Budget = &kvtierv1.Budget{Mode: 2, Share: -.5} }, codes.InvalidArgument, ReasonArgument},
			{"share NaN", func(r *kvtierv1.AttendRequest) { r.Budget = &kvtierv1.Budget{Mode: 2, Share: float32(math.NaN())} }, codes.InvalidArgument, ReasonArgument},
			{"no target", func(r *kvtierv1.AttendRequest) { r.Budget = &kvtierv1.Budget{Mode: 3} }, codes.InvalidArgument, ReasonArgument},
			{"target NaN", func(r *kvtierv1.AttendRequest) {
				r.Budget = &kvtierv1.Budget{Mode: 3, TargetError: float32(math.NaN())}
			}, codes.InvalidArgument, ReasonArgument},
			{"target 1", func(r *kvtierv1.AttendRequest) { r.Budget = &kvtierv1.Budget{Mode: 3, TargetError: 1} }, codes.InvalidArgument, ReasonArgument},
			{"k too short", func(r *kvtierv1.AttendRequest) { r.Items[0].K, r.Items[0].V = make([]byte, 12), make([]byte, 12) }, codes.InvalidArgument, ReasonShape},
			{"partial too short", func(r *kvtierv1.AttendRequest) {
				r.Items[0].PartialOutput, r.Items[0].PartialLse = make([]byte, 12), make([]byte, 12)
			}, codes.InvalidArgument, ReasonShape},
			{"partial NaN", func(r *kvtierv1.AttendRequest) {
				r.Items[0].PartialOutput, r.Items[0].PartialLse = make([]byte, 4*2*128), encode([]float32{float32(math.NaN()), 0, 0, 0, 0, 0, 0, 0}, compress.F32)
			}, codes.InvalidArgument, ReasonValue},
		}
		for _, c := range attends {
			t.Run("attend "+c.name, func(t *testing.T) {
				if f, fast := p.(*fastClient); fast && f.in != nil && strings.HasSuffix(c.name, "too short") {
					t.Skip("a region has no end that follows from the data")
				}
				req := request(1, exactly, w.queries(18, 20, 1))
				c.change(req)
				_, err := p.attend(t.Context(), w.spec, req)
				wantError(t, err, c.code, c.reason)
			})
		}
		// Nothing of it changed anything.
		if a, err := p.open(t.Context(), w.id); err != nil || a.Accepted != 20 {
			t.Fatalf("%v, %v", a, err)
		}
		w.verify(w.attend(request(1, exactly, w.queries(18, 20, 1)))[0], 1, 18, 2, nil, tolerance)
		w.feedAll(20, 25)
		other := testSpec()
		other.Softcap = 30
		_, err := r.control.OpenSequence(t.Context(), &kvtierv1.OpenSequenceRequest{SequenceId: w.id, Spec: other})
		wantError(t, fromStatus(err), codes.FailedPrecondition, ReasonSpecDiffers)
		_, err = r.control.DeleteSequence(t.Context(), &kvtierv1.DeleteSequenceRequest{SequenceId: w.id})
		if err != nil {
			t.Fatal(err)
		}
		_, err = p.append(t.Context(), w.spec, w.rows(1, 25, 26))
		wantError(t, err, codes.NotFound, ReasonUnknown)
		_, err = p.open(t.Context(), w.id)
		wantError(t, err, codes.NotFound, ReasonUnknown)
	})
}

// A message of a stream without a request is refused, and the stream goes on. The server, which waits for calls, can be closed then.
func TestEmptyStreamRequest(t *testing.T) {
	r := newRig(t, Options{})
	p := r.path(t, "grpc").(*grpcPath)
	w := newWorker(t, r, p, newModel(1, testSpec(), 20), 0)
	w.feedAll(0, 20)
	st, err := r.control.AttendStream(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, req := range []*kvtierv1.AttendRequest{nil, request(1, exactly, w.queries(18, 20, 1))} {
		if err := st.Send(&kvtierv1.AttendStreamRequest{Request: req}); err != nil {
			t.Fatal(err)
		}
		a, err := st.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if req == nil {
			wantError(t, textError(a.ErrorCode, a.ErrorMessage), codes.InvalidArgument, ReasonArgument)
		} else {
			w.verify(a.Response.Results[0], 1, 18, 2, nil, tolerance)
		}
	}
}

// longRequest takes seconds: every position chooses for itself.
func longRequest(w *worker, n int) *kvtierv1.AttendRequest {
	req := request(1, &kvtierv1.Budget{Mode: kvtierv1.AttendMode_ATTEND_MODE_BUDGET, Share: 1e-4}, w.queries(0, n, 1))
	return req
}

func TestPathDeadlineAndCancellation(t *testing.T) {
	overPaths(t, Options{ReadAllTokens: -1}, func(t *testing.T, r *rig, p path) {
		const n = 2048 + recentTokens
		w := sealedWorker(t, r, p, testSpec(), n, 0)
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Millisecond)
		begin := time.Now()
		_, err := p.attend(ctx, w.spec, longRequest(w, n))
		cancel()
		wantError(t, err, codes.DeadlineExceeded, "")
		t.Logf("a deadline of 30 ms held after %v", time.Since(begin))
		w.verify(w.attend(request(1, exactly, w.queries(n-1, n, 1)))[0], 1, n-1, 1, nil, .2)

		begin = time.Now()
		done := make(chan error, 1)
		ctx, cancel = context.WithCancel(t.Context())
		go func() {
			_, err := p.attend(ctx, w.spec, longRequest(w, n))
			done <- err
		}()
		time.Sleep(50 * time.Millisecond)
		cancel()
		p.close()
		if err := <-done; err == nil {
			t.Fatal("a cancelled call succeeded")
		}
		// The server stops working for who is gone.
		for r.inFlight() {
			time.Sleep(time.Millisecond)
		}
		t.Logf("cancellation after 50 ms held after %v", time.Since(begin))
		if took := time.Since(begin); took > 5*time.Second {
			t.Fatalf("the server worked on for %v", took)
		}
	})
}

// inFlight says whether a connection of the fast path still lives.
func (r *rig) inFlight() bool {
	r.srv.mu.RLock()
	defer r.srv.mu.RUnlock()
	return len(r.srv.mu.conns) > 0
}

// A deadline holds in the open tail, too.
func TestPathDeadlineInTheTail(t *testing.T) {
	overPaths(t, Options{}, func(t *testing.T, r *rig, p path) {
		w := newWorker(t, r, p, newModel(1, testSpec(), 2200), 0)
		w.feedAll(0, 2200)
		queries := w.queries(0, 2200, 1)
		begin := time.Now()
		if _, err := p.attend(t.Context(), w.spec, request(1, exactly, queries)); err != nil {
			t.Fatal(err)
		}
		took := time.Since(begin)
		ctx, cancel := context.WithTimeout(t.Context(), took/10)
		defer cancel()
		_, err := p.attend(ctx, w.spec, request(1, exactly, queries))
		wantError(t, err, codes.DeadlineExceeded, "")
	})
}

func TestPathDeathReleasesIncompleteTokens(t *testing.T) {
	overPaths(t, Options{}, func(t *testing.T, r *rig, p path) {
		w := newWorker(t, r, p, newModel(1, testSpec(), 30), 0)
		w.feedAll(0, 10)
		w.append(w.rows(0, 10, 20)) // not in layer 1
		s, err := r.srv.sequence(w.id)
		if err != nil {
			t.Fatal(err)
		}
		p.close()
		for begin := time.Now(); ; time.Sleep(time.Millisecond) {
			if st := s.snapshot(); st.lens[0] == 10 {
				break
			} else if time.Since(begin) > 5*time.Second {
				t.Fatalf("lengths %v after the worker's death", st.lens)
			}
		}
		// The next one may write other rows there.
		for _, kind := range paths {
			w.p = r.path(t, kind)
			if a, err := w.p.open(t.Context(), w.id); err != nil || a.Accepted != 10 {
				t.Fatalf("%v, %v", a, err)
			}
		}
		w.model = newModel(2, testSpec(), 30)
		w.feedAll(10, 30)
	})
}

func TestPathConcurrentWorkers(t *testing.T) {
	r := newRig(t, Options{ReadAllTokens: -1})
	shared := newWorker(t, r, r.path(t, "inline"), newModel(20, testSpec(), 200), 0)
	shared.feedAll(0, 100)
	steps := 40
	if testing.Short() {
		steps = 10
	}
	var wg sync.WaitGroup
	for i := range 2 * len(paths) {
		kind := paths[i%len(paths)]
		p := r.path(t, kind)
		wg.Go(func() {
			defer p.close()
			w := newWorker(t, r, p, newModel(uint64(30+i), slidingSpec(), 60+steps), 0)
			reader := *shared
			reader.p = p
			w.feedAll(0, 50)
			for at := 50; at < 50+steps; at++ {
				for l := range int(w.spec.Layers) {
					it, rows := w.queries(at, at+1, l), w.rows(l, at, at+1)
					it.K, it.V = encode(floatsOf(rows.K), compress.F32), encode(floatsOf(rows.V), compress.F32)
					w.verify(w.attend(request(l, exactly, it))[0], l, at, 1, nil, tolerance)
				}
				pos := at % 100
				reader.verify(reader.attend(request(1, nil, reader.queries(pos, pos+1, 1)))[0], 1, pos, 1, nil, tolerance)
			}
		})
	}
	wg.Go(func() {
		for at := 100; at < 200; at += 10 {
			shared.feedAll(at, at+10)
		}
	})
	wg.Wait()
}

func floatsOf(b []byte) []float32 {
	x := make([]float32, len(b)/2)
	compress.ToFloat32(x, b, compress.BF16)
	return x
}

// BenchmarkHello is the fast path's round trip alone, with nothing to do.
func BenchmarkHello(b *testing.B) {
	c := dialFast(b, newRig(b, Options{}).socket)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := c.call(1, []byte{1, 0, 0, 0}); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/1e3/float64(b.N), "µs")
}

// BenchmarkRoundTrip attends to one token's worth of SmolLM2-135M's layer over
// a context of 64 tokens: the cost of the way.
func BenchmarkRoundTrip(b *testing.B) {
	for _, kind := range []string{"grpc", "inline", "regions"} {
		for _, withRows := range []bool{false, true} {
			b.Run(fmt.Sprintf("%s/rows=%v", kind, withRows), func(b *testing.B) {
				r := newRig(b, Options{})
				p := r.path(b, kind)
				spec := smolSpec()
				spec.Layers = 1
				w := newWorker(b, r, p, newModel(1, spec, 70), 0)
				w.feedAll(0, 64)
				req := request(0, exactly, w.queries(64, 65, 0))
				if !withRows {
					req = request(0, exactly, w.queries(63, 64, 0))
				} else {
					rows := w.rows(0, 64, 65)
					req.Items[0].K, req.Items[0].V = encode(floatsOf(rows.K), compress.F32), encode(floatsOf(rows.V), compress.F32)
				}
				ctx := b.Context()
				b.ReportAllocs()
				for b.Loop() {
					// Rows that are there already: a repeat appends nothing and compares.
					if _, err := p.attend(ctx, spec, req); err != nil {
						b.Fatal(err)
					}
				}
				b.ReportMetric(float64(b.Elapsed().Nanoseconds())/1e3/float64(b.N), "µs")
			})
		}
	}
}
