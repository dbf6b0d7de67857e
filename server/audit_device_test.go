package server

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"

	"kvtier/attention"
	kvtierv1 "kvtier/proto/kvtier/v1"
	"kvtier/tiers"
	"kvtier/tiers/gpu"
	"kvtier/tiers/gpu/cuda/cudatest"
	"kvtier/tiers/seal"
)

// logged is what a server logs.
type logged struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *logged) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(b)
}

func (l *logged) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

// auditedFolder opens a folder with a GPU all of whose answers are compared, and brings the sealed part of its sequence up.
func auditedFolder(t *testing.T, m *model, dir, id string, o Options) (*Server, *sequence, *logged) {
	t.Helper()
	cudatest.Open(t)
	log := &logged{}
	o.Logger = slog.New(slog.NewTextHandler(log, nil))
	o.GPUBytes, o.GPUAuditShare, o.ReadAllTokens, o.SealOnHost = 64<<20, 1, -1, true
	srv := openServer(t, dir, o)
	srv.auditor.pace.rest = 0
	s := find(t, srv, id)
	for l := range int(m.spec.Layers) {
		m.ask(t, s, l, m.n-1, exactBudget)
	}
	settle(t, srv)
	return srv, s, log
}

// audit asks, waits for the call's audit, and returns what came of all of them.
func audit(t *testing.T, m *model, srv *Server, s *sequence, layer, pos int, b budget) (*answer, *kvtierv1.GPUAudits) {
	t.Helper()
	before := srv.auditor.deviceStats().Compared
	a := m.ask(t, s, layer, pos, b)
	if a.account.BytesGpu == 0 {
		t.Fatalf("layer %d, position %d: the GPU took no part: %v", layer, pos, a.account)
	}
	eventually(t, "an audit of the GPU", func() bool {
		return srv.auditor.deviceStats().Compared > before && srv.auditor.pace.next.Load() <= srv.auditor.pace.now()
	})
	return a, srv.auditor.deviceStats()
}

// Right answers pass: every head dimension, groups that fill no warp and more than one, profiles, softcaps, scores that spread and that gather.
func TestDeviceAuditsPass(t *testing.T) {
	cudatest.Open(t)
	for i, c := range []struct {
		d, heads, group int
		softcap, scale  float32
		profile         kvtierv1.Profile
	}{
		{64, 2, 3, 0, 0, kvtierv1.Profile_PROFILE_BALANCED},
		{64, 1, 11, 30, 0, kvtierv1.Profile_PROFILE_NEUTRAL},
		{64, 2, 1, 0, .002, kvtierv1.Profile_PROFILE_NEUTRAL},
		{128, 1, 8, 0, 0, kvtierv1.Profile_PROFILE_BALANCED},
		{128, 2, 4, 5, .3, kvtierv1.Profile_PROFILE_BALANCED},
		{256, 1, 4, 0, 0, kvtierv1.Profile_PROFILE_BALANCED},
		{256, 1, 1, 50, .01, kvtierv1.Profile_PROFILE_NEUTRAL},
	} {
		t.Run(fmt.Sprintf("%d of %d x %d", c.d, c.heads, c.group), func(t *testing.T) {
			spec := &kvtierv1.ModelSpec{Layers: 1, QueryHeads: uint32(c.heads * c.group), KvHeads: uint32(c.heads), HeadDim: uint32(c.d),
				Softcap: c.softcap, Scale: c.scale, Fingerprint: []byte("test"), KvDtype: kvtierv1.ElementType_ELEMENT_TYPE_BF16}
			m := newModel(uint64(i), spec, 2*segment+400)
			dir, id := sealedFolder(t, m, c.profile)
			srv, s, log := auditedFolder(t, m, dir, id, Options{})
			var got *kvtierv1.GPUAudits
			for _, b := range []budget{exactBudget, shareBudget(.3)} {
				audit(t, m, srv, s, 0, m.n-1, b)
				_, got = audit(t, m, srv, s, 0, 2*segment+10, b)
			}
			if got.Compared < 4 || got.GivenUp != "" || !(got.LargestError > 0 && got.LargestError < outputLimit && got.LargestLseError < lseLimit) {
				t.Errorf("%v\n%s", got, log)
			}
			status := &inspectionService{srv: srv}
			if x, err := status.GetStatus(t.Context(), nil); err != nil || x.GpuAudits.GetCompared() != got.Compared {
				t.Errorf("status: %v, %v", x.GetGpuAudits(), err)
			}
		})
	}
}

// Values that cancel each other leave little but what was rounded: that is far from the host's answer, and no failure.
func TestDeviceAuditsCancel(t *testing.T) {
	cudatest.Open(t)
	spec := deviceSpec()
	m := newModel(3, spec, segment+400)
	row := int(spec.KvHeads * spec.HeadDim)
	for l := range m.v {
		// Three tokens of one key, whose values are v, 2v and -3v; in all of the segment but its first tokens, which are attended exactly.
		const third = (segment - tiers.SinkTokens) / 3
		keys, values := m.k[l][tiers.SinkTokens*row:], m.v[l][tiers.SinkTokens*row:]
		for i := range third * row {
			values[i] = float32(int(values[i]*8)) / 8 // three times which is a bfloat16, too
			for n, factor := range []float32{1, 2, -3} {
				keys[n*third*row+i], values[n*third*row+i] = keys[i], factor*values[i]
			}
		}
		clear(values[3*third*row : (segment-tiers.SinkTokens)*row])
	}
	srv, s, log := auditedContext(t, m)
	if _, got := audit(t, m, srv, s, 0, m.n-1, exactBudget); got.GivenUp != "" || !(got.LargestError > outputLimit) {
		t.Errorf("%v\n%s", got, log)
	}
	if a := m.ask(t, s, 0, m.n-1, exactBudget); a.account.BytesGpu == 0 {
		t.Error("the GPU is not trusted any more")
	}
}

// A bit of device memory that flipped is found, and named; from then on the host answers.
func TestDeviceAuditsMemory(t *testing.T) {
	cudatest.Open(t)
	m := newModel(9, deviceSpec(), 2*segment+400)
	m.spec.Scale = .01 // every token counts
	dir, id := sealedFolder(t, m, kvtierv1.Profile_PROFILE_BALANCED)
	host := openServer(t, dir, Options{ReadAllTokens: -1})
	var want []*answer
	for l := range int(m.spec.Layers) {
		want = append(want, m.ask(t, find(t, host, id), l, m.n-1, exactBudget))
	}
	closeServer(t, host)
	for _, plane := range []tiers.Plane{tiers.PlaneV4, tiers.PlaneSteps, tiers.PlaneK1, tiers.PlanePages} {
		quiet := plane == tiers.PlaneK1 || plane == tiers.PlanePages // one bit of these shows when its segment's bytes are compared
		t.Run(plane.String(), func(t *testing.T) {
			srv, s, log := auditedFolder(t, m, dir, id, Options{})
			if _, got := audit(t, m, srv, s, 1, m.n-1, exactBudget); got.GivenUp != "" {
				t.Fatal(got)
			}
			h := s.snapshot().spans[1].segments[1]
			flip(t, srv, h, 1, plane)
			var got *kvtierv1.GPUAudits
			for range 50 {
				if _, got = audit(t, m, srv, s, 1, m.n-1, exactBudget); got.GivenUp != "" || !quiet {
					break
				}
			}
			changed := fmt.Sprintf("bytes in device memory changed: segment %v, head 1, plane %v: byte ", h.ID, plane)
			if !strings.Contains(got.GivenUp, changed) || !strings.Contains(log.String(), changed) || !strings.Contains(log.String(), "sequence="+id+" layer=1") ||
				strings.Contains(log.String(), "query_heads=[]") != quiet {
				t.Errorf("%v\n%s", got, log)
			}
			for l := range want {
				a := m.ask(t, s, l, m.n-1, exactBudget)
				if a.account.BytesGpu > 0 || !slices.Equal(a.out, want[l].out) || !slices.Equal(a.lse, want[l].lse) {
					t.Errorf("layer %d: another answer than without a GPU: %v", l, a.account)
				}
			}
			if u, _ := srv.store.GPUUsage(); u.BytesUsed != 0 || u.Pieces != 0 {
				t.Errorf("the GPU still holds %+v", u)
			}
			if n := strings.Count(log.String(), "level=ERROR"); n != 1 {
				t.Errorf("%d errors were logged:\n%s", n, log)
			}
		})
	}
}

// flip flips a bit of a resident plane: of a step, which counts, or of a key.
func flip(t *testing.T, srv *Server, h *tiers.Header, head int, plane tiers.Plane) {
	t.Helper()
	pins, _, err := srv.store.Disk().Pin(t.Context(), []tiers.Request{{Header: h, Head: head, Plane: plane}})
	if err != nil {
		t.Fatal(err)
	}
	defer pins[0].Release(0)
	b, bit := pins[0].Ranges[0], 1234
	switch v := (seal.View{D: h.HeadDim, Info: h.Heads[head]}); plane {
	case tiers.PlaneV4:
		scale, _ := v.ValueRanges(3)
		bit = 8*scale.Off + 12 // of the exponent of the fourth token's step
	case tiers.PlaneSteps:
		bit = 8*len(b) - 5 // of the last width
	}
	cudatest.Flip(t, b, bit)
}

// An answer that differs though all bytes are right is the kernels' fault.
func TestDeviceAuditsKernel(t *testing.T) {
	cudatest.Open(t)
	m := newModel(9, deviceSpec(), segment+400)
	for name, spoil := range map[string]func(p *attention.Partial){
		"output": func(p *attention.Partial) { p.Out[5] *= 1.2 },
		"lse":    func(p *attention.Partial) { p.Max += 1e-3 },
	} {
		t.Run(name, func(t *testing.T) {
			srv, s, log := auditedContext(t, m)
			c, st := deviceCall(t, m, s, 0, m.n-1), srv.store
			j := newDeviceAudit(c, 0)
			j.audit(t.Context(), srv.auditor)
			if got := srv.auditor.deviceStats(); got.GivenUp != "" {
				t.Fatal(got)
			}
			spoil(&j.got[4])
			j.audit(t.Context(), srv.auditor)
			got := srv.auditor.deviceStats()
			if !strings.Contains(got.GivenUp, "a kernel computes wrongly") || !strings.Contains(log.String(), "query_heads=[4]") {
				t.Errorf("%v\n%s", got, log)
			}
			if a := st.Attend(t.Context(), nil, nil, 0, gpu.Choice{}); a != nil {
				t.Error("it answers")
			}
		})
	}
}

// An audit of a chunk compares the rows of one of its positions.
func TestDeviceAuditsChunk(t *testing.T) {
	cudatest.Open(t)
	m := newModel(9, deviceSpec(), segment+400)
	srv, s, _ := auditedContext(t, m)
	sp, n := s.spec, 5
	c := &call{seq: s, st: new(state), layer: 1, start: uint64(m.n - n), n: n, budget: exactBudget}
	*c.st = s.snapshot()
	row := sp.queryHeads * sp.headDim
	for _, x := range m.q[1][(m.n-n)*row:] {
		c.q = append(c.q, x*sp.scale)
	}
	if _, err := c.answer(t.Context()); err != nil || c.device == nil {
		t.Fatal(err, c.device)
	}
	for i := range n {
		j := newDeviceAudit(c, i)
		want, err := j.onHost(t.Context(), srv.store)
		if err != nil {
			t.Fatal(err)
		}
		if d := j.compare(want); len(d.beyond) > 0 || j.position != uint64(m.n-n+i) {
			t.Errorf("position %d: %+v", j.position, d)
		}
	}
}

// Audits hold nothing up and change nothing: calls go on while none is done, and are answered as ever.
func TestDeviceAuditsWait(t *testing.T) {
	cudatest.Open(t)
	m := newModel(9, deviceSpec(), segment+400)
	srv, s, _ := auditedContext(t, m)
	want, _ := audit(t, m, srv, s, 0, m.n-1, exactBudget)
	block := make(blocked)
	for range 2 * auditQueue { // one of them blocks the auditor, the others fill the queue
		srv.auditor.offer(block)
	}
	compared := srv.auditor.deviceStats().Compared
	for range 2 {
		if a := m.ask(t, s, 0, m.n-1, exactBudget); a.account.BytesGpu == 0 || !slices.Equal(a.out, want.out) || !slices.Equal(a.lse, want.lse) {
			t.Errorf("another answer: %v", a.account)
		}
	}
	if n := srv.auditor.deviceStats().Compared; n != compared {
		t.Errorf("%d audits while the auditor waits", n-compared)
	}
	close(block)
	audit(t, m, srv, s, 0, m.n-1, exactBudget) // one that found the queue full let the next one in
	// At the end nobody waits for audits.
	srv.auditor.offer(make(blocked))
	m.ask(t, s, 0, m.n-1, exactBudget)
	closeServer(t, srv)
}

// blocked is an audit that ends when the channel is closed.
type blocked chan struct{}

func (b blocked) audit(ctx context.Context, _ *auditor) {
	select {
	case <-b:
	case <-ctx.Done():
	}
}

// Audits, answers, appends and a device that is given up in the middle.
func TestDeviceAuditsAtOnce(t *testing.T) {
	cudatest.Open(t)
	m := newModel(9, deviceSpec(), segment+400)
	srv, s, log := auditedContext(t, m)
	want := m.ask(t, s, 1, m.n-1, exactBudget)
	var work sync.WaitGroup
	for range 4 {
		work.Go(func() {
			for range 30 {
				if a := m.ask(t, s, 1, m.n-1, exactBudget); attention.RelativeError(a.out, want.out) > 2e-3 {
					t.Errorf("another answer: %v", a.account)
				}
			}
		})
	}
	j := newDeviceAudit(deviceCall(t, m, s, 1, m.n-1), 0)
	j.got[0].Max++
	srv.auditor.offer(j)
	work.Wait()
	eventually(t, "the GPU to be given up", func() bool { return srv.auditor.deviceStats().GivenUp != "" })
	if a := m.ask(t, s, 1, m.n-1, exactBudget); a.account.BytesGpu > 0 {
		t.Errorf("the GPU answers: %v\n%s", a.account, log)
	}
}

// What is removed by then is not audited.
func TestDeviceAuditsGone(t *testing.T) {
	cudatest.Open(t)
	m := newModel(9, deviceSpec(), segment+400)
	srv, s, _ := auditedContext(t, m)
	j := newDeviceAudit(deviceCall(t, m, s, 0, m.n-1), 0)
	if err := s.delete(t.Context()); err != nil {
		t.Fatal(err)
	}
	before := srv.auditor.deviceStats().Compared
	j.got[0].Max++
	j.audit(t.Context(), srv.auditor)
	if got := srv.auditor.deviceStats(); got.Compared != before || got.GivenUp != "" {
		t.Errorf("of segments that are removed: %v", got)
	}
}

// auditedContext is auditedFolder of a new folder.
func auditedContext(t *testing.T, m *model) (*Server, *sequence, *logged) {
	t.Helper()
	dir := t.TempDir()
	srv := openServer(t, dir, Options{ReadAllTokens: -1})
	s := openSequence(t, srv, &kvtierv1.OpenSequenceRequest{Spec: m.spec, Profile: kvtierv1.Profile_PROFILE_NEUTRAL})
	m.feed(t, s, 0, m.n)
	waitSealed(t, s, segment)
	closeServer(t, srv)
	return auditedFolder(t, m, dir, s.id, Options{})
}

// deviceCall is a call that the GPU took part in, answered.
func deviceCall(t *testing.T, m *model, s *sequence, layer, pos int) *call {
	t.Helper()
	st := s.snapshot()
	c := &call{seq: s, st: &st, layer: layer, start: uint64(pos), n: 1, budget: exactBudget}
	row := s.spec.queryHeads * s.spec.headDim
	for _, x := range m.q[layer][pos*row : (pos+1)*row] {
		c.q = append(c.q, x*s.spec.scale)
	}
	if _, err := c.answer(t.Context()); err != nil || c.device == nil || c.device.partials == nil {
		t.Fatal(err, c.device)
	}
	return c
}
