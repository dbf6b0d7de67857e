package server

import (
	"context"
	"log/slog"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"kvtier/attention"
	"kvtier/compress"
	kvtierv1 "kvtier/proto/kvtier/v1"
	"kvtier/tiers/gpu/cuda/cudatest"
)

// choosing opens a folder with a GPU that reads a part of what it holds, in mode budget, however little that is, and brings the sealed part of its sequence up.
func choosing(t *testing.T, m *model, dir, id string, o Options) (*Server, *sequence, *logged) {
	t.Helper()
	log := &logged{}
	o.Logger = slog.New(slog.NewTextHandler(log, nil))
	o.GPUChooseAbove, o.ReadAllTokens, o.SealOnHost = 1, -1, true
	srv := openServer(t, dir, o)
	srv.auditor.pace.rest = 0 // before there is anything to audit
	s := find(t, srv, id)
	for l := range int(m.spec.Layers) {
		m.ask(t, s, l, m.n-1, exactBudget)
	}
	settle(t, srv)
	return srv, s, log
}

// askMany asks positions [pos, pos+n) in one call.
func (m *model) askMany(t *testing.T, s *sequence, layer, pos, n int, b budget) *answer {
	t.Helper()
	row := int(m.spec.QueryHeads * m.spec.HeadDim)
	q := make([]byte, 4*n*row)
	compress.FromFloat32(q, m.q[layer][pos*row:(pos+n)*row], compress.F32)
	a, err := s.attend(context.Background(), &query{layer: layer, start: uint64(pos), q: q, budget: b})
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// TestDeviceChoice: with a budget the GPU reads a part, says so, errs about as the host does with that budget, and its audits neither give it up nor
// find stated errors that are far off. What is to be exact is.
func TestDeviceChoice(t *testing.T) {
	cudatest.Open(t)
	for _, p := range []kvtierv1.Profile{kvtierv1.Profile_PROFILE_BALANCED, kvtierv1.Profile_PROFILE_NEUTRAL} {
		t.Run(p.String(), func(t *testing.T) {
			m := newModel(9, deviceSpec(), 2*segment+400)
			m.spec.Scale = .03 // many tokens count
			dir, id := sealedFolder(t, m, p)
			host := openServer(t, dir, Options{ReadAllTokens: -1})
			newest, onHost := m.n-1, find(t, host, id)
			var want, sparse []*answer
			for l := range int(m.spec.Layers) {
				want, sparse = append(want, m.ask(t, onHost, l, newest, exactBudget)), append(sparse, m.ask(t, onHost, l, newest, shareBudget(.2)))
			}
			closeServer(t, host)
			srv, s, log := choosing(t, m, dir, id, Options{GPUBytes: 64 << 20, GPUAuditShare: 1, AuditShare: 1})
			for l := range int(m.spec.Layers) {
				for _, b := range []budget{exactBudget, {mode: kvtierv1.AttendMode_ATTEND_MODE_TARGET, target: .2}, shareBudget(1)} {
					a := m.ask(t, s, l, newest, b)
					if e := attention.RelativeError(a.out, want[l].out); !(e <= 2e-3) || a.account.Mode != kvtierv1.AttendMode_ATTEND_MODE_EXACT || a.account.TokensEstimated > 0 {
						t.Errorf("layer %d, %v: error %v, %v", l, b, e, a.account)
					}
				}
				whole := m.ask(t, s, l, newest, exactBudget).account
				for i, b := range []budget{shareBudget(.2), {mode: kvtierv1.AttendMode_ATTEND_MODE_BUDGET, tokens: 2 * segment / 5}} {
					a := m.ask(t, s, l, newest, b)
					x, e, least := a.account, attention.RelativeError(a.out, want[l].out), attention.RelativeError(sparse[l].out, want[l].out)
					t.Logf("layer %d: error %v, the host's %v, stated %v, 95 %% %v", l, e, least, x.EstimatedError, x.ErrorP95)
					if !(e > 0 && e < 2*least+.01) || !(x.EstimatedError > e/5 && x.EstimatedError < 5*e && x.ErrorP95 > x.EstimatedError) {
						t.Errorf("layer %d, budget %d: error %v, the host's %v, %v", l, i, e, least, x)
					}
					if x.Mode != b.mode || x.BytesRam+x.BytesNvme > 0 || x.BytesGpu >= whole.BytesGpu/2 || x.TokensScanned != whole.TokensScanned ||
						x.TokensRead+x.TokensEstimated != whole.TokensRead || x.TokensEstimated < x.TokensRead {
						t.Errorf("layer %d, budget %d: %v, everything: %v", l, i, x, whole)
					}
				}
			}
			audited := func() uint64 { return srv.auditor.stats().n }
			eventually(t, "audits", func() bool { return srv.auditor.deviceStats().Compared >= 3 && audited() >= 3 })
			if got := srv.auditor.deviceStats(); got.GivenUp != "" || got.LargestError > outputLimit || got.LargestLseError > lseLimit {
				t.Errorf("%v\n%s", got, log)
			}
			for _, x := range srv.calibration.layers() {
				if !strings.HasPrefix(x.Budget, "share on a GPU ") {
					t.Errorf("an audit of kind %s", x.Budget)
				}
			}
			closeServer(t, srv)
		})
	}
}

// TestDeviceChoiceParts: where the GPU holds a part, it chooses of that, and the host of the rest; and of little everything is read.
func TestDeviceChoiceParts(t *testing.T) {
	cudatest.Open(t)
	m := newModel(9, deviceSpec(), 2*segment+400)
	dir, id := sealedFolder(t, m, kvtierv1.Profile_PROFILE_BALANCED)
	srv, s, _ := choosing(t, m, dir, id, Options{GPUBytes: 500 << 10})
	var both, gpuEstimates int
	for l := range int(m.spec.Layers) {
		want := m.ask(t, s, l, m.n-1, exactBudget)
		a := m.ask(t, s, l, m.n-1, shareBudget(.3))
		if e := attention.RelativeError(a.out, want.out); !(e < .5) || a.account.Mode == kvtierv1.AttendMode_ATTEND_MODE_EXACT || !(a.account.EstimatedError > 0) {
			t.Errorf("layer %d: error %v, %v", l, e, a.account)
		}
		if a.account.BytesGpu > 0 {
			gpuEstimates++
			if a.account.BytesRam+a.account.BytesNvme > 0 {
				both++
			}
		}
	}
	if both == 0 {
		t.Errorf("of %d layers, %d are answered by the GPU, and none by both", m.spec.Layers, gpuEstimates)
	}
	closeServer(t, srv)
	for above, chooses := range map[int]bool{2*segment - 100: true, 2*segment + 100: false, 0: false} {
		o := Options{GPUBytes: 64 << 20, GPUChooseAbove: above, ReadAllTokens: -1, SealOnHost: true}
		srv := openServer(t, dir, o)
		s := find(t, srv, id)
		m.ask(t, s, 0, m.n-1, exactBudget)
		settle(t, srv)
		if a := m.ask(t, s, 0, m.n-1, shareBudget(.2)).account; (a.TokensEstimated > 0) != chooses || a.BytesGpu == 0 {
			t.Errorf("of %d tokens, choosing above %d: %v", 2*segment, above, a)
		} else if chooses {
			chunks(t, m, s, a)
		}
		closeServer(t, srv)
	}
}

// chunks asks several positions at once: what they may read together is more than what the last one alone has read; of many it is everything.
func chunks(t *testing.T, m *model, s *sequence, one *kvtierv1.Account) {
	t.Helper()
	if a := m.askMany(t, s, 0, m.n-5, 5, shareBudget(.2)).account; a.TokensEstimated > 0 || a.BytesGpu == 0 {
		t.Errorf("five positions: %v", a)
	}
	if a := m.askMany(t, s, 0, m.n-2, 2, shareBudget(.2)).account; a.TokensEstimated == 0 || a.TokensEstimated >= one.TokensEstimated {
		t.Errorf("two positions: %v, one: %v", a, one)
	}
	const n = 12 // 36 rows of a KV head, of which 32 choose together, and the others apart
	want, a := m.ask(t, s, 0, m.n-1, exactBudget), m.askMany(t, s, 0, m.n-n, n, shareBudget(.03))
	e := attention.RelativeError(a.out[(n-1)*len(want.out):], want.out)
	if x := a.account; !(e > 0 && e < .3) || x.TokensEstimated == 0 || x.TokensRead+x.TokensEstimated != 2*(one.TokensRead+one.TokensEstimated) {
		t.Errorf("blocks of rows: error %v, %v", e, x)
	}
}

// TestDeviceChoiceFails: each launch of a choice that fails leaves the call to the host.
func TestDeviceChoiceFails(t *testing.T) {
	const fail = "MOCKCUDA_FAIL"
	if !strings.HasPrefix(cudatest.Open(t).Info().Name, "Mock") {
		t.Skip("a real device does not fail on purpose")
	}
	if os.Getenv(fail) == "" {
		for _, where := range []string{"cuLaunchKernel:3:1", "cuLaunchKernel:4:2", "cuLaunchKernel:5:719", "cuLaunchKernel:8:1", "cuMemcpyDtoHAsync:2:719"} {
			cmd := exec.Command(os.Args[0], "-test.run=^TestDeviceChoiceFails$", "-test.v")
			cmd.Env = append(os.Environ(), fail+"="+where)
			if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "--- PASS: TestDeviceChoiceFails") {
				t.Errorf("%s: %v\n%s", where, err, out)
			}
		}
		return
	}
	m := newModel(9, deviceSpec(), segment+400)
	dir := t.TempDir()
	srv := openServer(t, dir, Options{ReadAllTokens: -1})
	s := openSequence(t, srv, &kvtierv1.OpenSequenceRequest{Spec: m.spec, Profile: kvtierv1.Profile_PROFILE_BALANCED})
	m.feed(t, s, 0, m.n)
	waitSealed(t, s, segment)
	want := m.ask(t, s, 0, m.n-1, exactBudget)
	closeServer(t, srv)
	srv, s, _ = choosing(t, m, dir, s.id, Options{GPUBytes: 64 << 20, GPUPatience: 5 * time.Second})
	for i := range 4 {
		a := m.ask(t, s, 0, m.n-1, shareBudget(.2))
		if e := attention.RelativeError(a.out, want.out); !(e < .5) {
			t.Errorf("answer %d: error %v, %v", i, e, a.account)
		}
	}
	closeServer(t, srv)
}
