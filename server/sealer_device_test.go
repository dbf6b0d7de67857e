package server

import (
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	kvtierv1 "kvtier/proto/kvtier/v1"
	"kvtier/tiers/gpu/cuda/cudatest"
)

// sealedIDs feeds a context to a daemon and returns the ids of the segments that it makes, and what a GPU did.
func sealedIDs(t *testing.T, m *model, o Options) (ids []string, gpu *kvtierv1.GPUStatus) {
	t.Helper()
	o.ReadAllTokens = -1
	srv := openServer(t, t.TempDir(), o)
	defer closeServer(t, srv)
	s := openSequence(t, srv, &kvtierv1.OpenSequenceRequest{Spec: m.spec, Profile: kvtierv1.Profile_PROFILE_BALANCED})
	m.feed(t, s, 0, m.n)
	for begin := time.Now(); ; time.Sleep(5 * time.Millisecond) {
		if st := s.snapshot(); st.sealed() >= segment {
			break
		}
		if time.Since(begin) > 2*time.Minute { // an emulated GPU takes a while
			t.Fatal("nothing is sealed")
		}
	}
	for _, ref := range s.snapshot().spans {
		ids = append(ids, ref.Segments...)
	}
	status, err := (&inspectionService{srv: srv}).GetStatus(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	if (status.Gpu != nil) != (o.GPUBytes != 0) {
		t.Errorf("status of the GPU: %v", status.Gpu)
	}
	if status.Gpu.GetSegmentsKept() > 0 { // they are there, and were never brought up
		a := m.ask(t, s, 0, m.n-1, exactBudget)
		if u, _ := srv.store.GPUUsage(); a.account.BytesGpu == 0 || u.BytesWritten != 0 {
			t.Errorf("%v, %+v", a.account, u)
		}
	}
	return ids, status.Gpu
}

// TestDeviceSeals: a daemon with a GPU makes the segments that one without makes, on the GPU; or on the host, where the GPU fails.
func TestDeviceSeals(t *testing.T) {
	const fail = "MOCKCUDA_FAIL"
	info := cudatest.Open(t).Info().Name
	spec := deviceSpec()
	spec.QueryHeads, spec.KvHeads = 3, 1
	m := newModel(9, spec, segment+400)
	want, _ := sealedIDs(t, m, Options{})
	got, made := sealedIDs(t, m, Options{GPUBytes: 64 << 20, GPUAuditShare: 1})
	if failed := os.Getenv(fail) != ""; failed != (made.SegmentsSealed == 0) || made.SegmentsKept != made.SegmentsSealed {
		t.Errorf("the GPU made %v", made)
	}
	if strings.Join(got, " ") != strings.Join(want, " ") {
		t.Errorf("segments %v, without a GPU %v", got, want)
	}
	if os.Getenv(fail) != "" || testing.Short() || !strings.HasPrefix(info, "Mock") { // a real device does not fail on purpose
		return
	}
	for _, where := range []string{"cuLaunchKernel:5:719", "cuLaunchKernel:3:701", "cuModuleLoadDataEx:1:2"} {
		cmd := exec.Command(os.Args[0], "-test.run=^TestDeviceSeals$", "-test.v")
		cmd.Env = append(os.Environ(), fail+"="+where)
		if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "--- PASS: TestDeviceSeals") {
			t.Errorf("%s: %v\n%s", where, err, out)
		}
	}
}
