package server

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	"kvtier/attention"
	kvtierv1 "kvtier/proto/kvtier/v1"
	"kvtier/tiers"
	"kvtier/tiers/gpu"
	"kvtier/tiers/gpu/cuda"
	"kvtier/tiers/gpu/cuda/cudatest"
)

func deviceSpec() *kvtierv1.ModelSpec {
	s := testSpec()
	s.HeadDim, s.QueryHeads, s.KvHeads = 64, 6, 2
	return s
}

// sealedFolder makes a data folder with a context, most of which is sealed.
func sealedFolder(t *testing.T, m *model, p kvtierv1.Profile) (dir, id string) {
	t.Helper()
	dir = t.TempDir()
	srv := openServer(t, dir, Options{ReadAllTokens: -1})
	s := openSequence(t, srv, &kvtierv1.OpenSequenceRequest{Spec: m.spec, Profile: p})
	m.feed(t, s, 0, m.n)
	waitSealed(t, s, 2*segment)
	closeServer(t, srv)
	return dir, s.id
}

// deviceTrace asks the context of a folder, once for the GPU to bring up what it can, and again for the answers.
func deviceTrace(t *testing.T, m *model, dir, id string, o Options) (answers []*answer, u tiers.Usage) {
	t.Helper()
	o.ReadAllTokens, o.SealOnHost = -1, true // an emulated GPU would take long
	srv := openServer(t, dir, o)
	defer closeServer(t, srv)
	s := find(t, srv, id)
	ask := func(s *sequence, positions ...int) {
		for _, pos := range positions {
			for l := range int(m.spec.Layers) {
				for _, b := range []budget{exactBudget, shareBudget(.3), {mode: kvtierv1.AttendMode_ATTEND_MODE_TARGET, target: .2}} {
					answers = append(answers, m.ask(t, s, l, pos, b))
				}
			}
		}
	}
	newest := 2*segment + 399
	ask(s, newest)
	settle(t, srv)
	ask(s, newest, 2*segment+10, segment+5, 30)
	f := openSequence(t, srv, &kvtierv1.OpenSequenceRequest{ForkOf: s.id, ForkAt: segment + 500})
	m.feed(t, f, segment+500, segment+520)
	ask(f, segment+519)
	u, ok := srv.store.GPUUsage()
	if ok && u.Pieces > 0 && srv.store.DeviceWork().Pinned == 0 { // the means and first bits of all segments are in RAM
		t.Error("the GPU copies nothing from RAM by itself")
	}
	return answers, u
}

// settle waits until nothing more comes up to the GPU.
func settle(t *testing.T, srv *Server) {
	t.Helper()
	last, since := int64(-1), time.Now()
	for time.Since(since) < 100*time.Millisecond {
		if u, _ := srv.store.GPUUsage(); u.BytesWritten != last {
			last, since = u.BytesWritten, time.Now()
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// sameAnswers compares answers that read everything, and says how many bytes the GPU gave.
func sameAnswers(t *testing.T, got, want []*answer, within float32) (fromGPU, fromHost uint64) {
	t.Helper()
	for i := range want {
		fromGPU += got[i].account.BytesGpu
		fromHost += got[i].account.BytesRam + got[i].account.BytesNvme
		if want[i].account.TokensEstimated > 0 || got[i].account.TokensEstimated > 0 {
			continue // where the GPU holds a part, others are estimated
		}
		if e := attention.RelativeError(got[i].out, want[i].out); !(e <= within) {
			t.Errorf("answer %d: error %v, %v", i, e, got[i].account)
		}
		for r, x := range want[i].lse {
			if d := got[i].lse[r] - x; !(d <= within && d >= -within) {
				t.Errorf("answer %d, row %d: lse %v, want %v", i, r, got[i].lse[r], x)
			}
		}
	}
	return fromGPU, fromHost
}

// TestDevice: one trace with everything on the GPU, with a part of it, and
// without a GPU: the same answers, within what the GPU rounds. Sparse answers err no more for what is read on the GPU.
func TestDevice(t *testing.T) {
	cudatest.Open(t)
	for _, p := range []kvtierv1.Profile{kvtierv1.Profile_PROFILE_BALANCED, kvtierv1.Profile_PROFILE_NEUTRAL, kvtierv1.Profile_PROFILE_EXACT} {
		t.Run(p.String(), func(t *testing.T) {
			m := newModel(9, deviceSpec(), 2*segment+400)
			dir, id := sealedFolder(t, m, p)
			want, _ := deviceTrace(t, m, dir, id, Options{})
			all, _ := deviceTrace(t, m, dir, id, Options{GPUBytes: 64 << 20})
			gpu, host := sameAnswers(t, all, want, 2e-3)
			if p == kvtierv1.Profile_PROFILE_EXACT {
				if gpu != 0 {
					t.Errorf("the GPU gave %d bytes of lossless rows", gpu)
				}
				return
			}
			for i, a := range all[6:9] { // the newest position, layer 0: all of it lies there
				if a.account.TokensEstimated != 0 || a.account.BytesGpu == 0 || a.account.Mode != kvtierv1.AttendMode_ATTEND_MODE_EXACT {
					t.Errorf("answer %d: %v", i, a.account)
				}
			}
			room := int64(500 << 10) // of 4 segments, each of which takes about half a byte or a byte a value
			if p == kvtierv1.Profile_PROFILE_NEUTRAL {
				room *= 2
			}
			part, u := deviceTrace(t, m, dir, id, Options{GPUBytes: room})
			someGPU, moreHost := sameAnswers(t, part, want, 2e-3)
			if someGPU == 0 || someGPU >= gpu || moreHost <= host || u.BytesUsed > u.BytesLimit {
				t.Errorf("of a part: %d of %d bytes of the GPU, %d and %d of the host, %+v", someGPU, gpu, moreHost, host, u)
			}
		})
	}
}

// TestDeviceLost: a device that is lost in the middle costs no answer.
func TestDeviceLost(t *testing.T) {
	const fail = "MOCKCUDA_FAIL"
	if !strings.HasPrefix(cudatest.Open(t).Info().Name, "Mock") {
		t.Skip("a real device is not lost on purpose")
	}
	if os.Getenv(fail) == "" {
		for _, where := range []string{"cuLaunchKernel:2:719", "cuMemcpyHtoDAsync:4:719", "cuEventQuery:3:719", "cuMemcpyDtoHAsync:3:719", "cuLaunchKernel:3:701"} {
			cmd := exec.Command(os.Args[0], "-test.run=^TestDeviceLost$", "-test.v")
			cmd.Env = append(os.Environ(), fail+"="+where)
			if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "--- PASS: TestDeviceLost") {
				t.Errorf("%s: %v\n%s", where, err, out)
			}
		}
		return
	}
	m := newModel(9, deviceSpec(), 2*segment+400)
	dir, id := sealedFolder(t, m, kvtierv1.Profile_PROFILE_BALANCED)
	want, _ := deviceTrace(t, m, dir, id, Options{})
	got, _ := deviceTrace(t, m, dir, id, Options{GPUBytes: 64 << 20})
	sameAnswers(t, got, want, 2e-3)
}

// TestDeviceMissing: where there is no driver, no device, or a driver that fails, a daemon that would take any GPU answers as one without, and one that is
// told to take one says why it does not start.
func TestDeviceMissing(t *testing.T) {
	const child = "SERVER_TEST_MISSING"
	if os.Getenv(child) == "" {
		if !strings.HasPrefix(cudatest.Open(t).Info().Name, "Mock") {
			t.Skip("a real device is not taken away")
		}
		for what, env := range map[string][]string{
			"no CUDA driver": {"LD_LIBRARY_PATH=" + t.TempDir()},
			"no CUDA device": {"MOCKCUDA_NODEVICE=1"},
			"cuInit":         {"MOCKCUDA_FAIL=cuInit:1:999"},
		} {
			cmd := exec.Command(os.Args[0], "-test.run=^TestDeviceMissing$", "-test.v")
			cmd.Env = append(append(os.Environ(), child+"="+what), env...)
			if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "--- PASS: TestDeviceMissing") && !strings.Contains(string(out), "--- SKIP: TestDeviceMissing") {
				t.Errorf("%s: %v\n%s", what, err, out)
			}
		}
		return
	}
	what := os.Getenv(child)
	_, err := cuda.Devices()
	if err == nil {
		t.Skip("this machine has a driver beside the emulated one")
	}
	t.Log(err)
	if no := errors.Is(err, cuda.ErrNoDriver) || errors.Is(err, cuda.ErrNoDevice); no && !strings.Contains(err.Error(), what) {
		t.Errorf("%q, not %q", err, what)
	}
	m := newModel(9, deviceSpec(), 2*segment+400)
	dir, id := sealedFolder(t, m, kvtierv1.Profile_PROFILE_BALANCED)
	want, _ := deviceTrace(t, m, dir, id, Options{})
	got, _ := deviceTrace(t, m, dir, id, Options{GPUBytes: gpu.Auto})
	if fromGPU, fromHost := sameAnswers(t, got, want, 0); fromGPU != 0 || fromHost == 0 {
		t.Errorf("%d bytes came from a GPU, %d from the host", fromGPU, fromHost)
	}
	if srv, err := Open(t.Context(), Options{DataDir: t.TempDir(), GPUBytes: 64 << 20}); err == nil || !strings.Contains(err.Error(), "--gpu off") {
		t.Errorf("a daemon that is told to take a GPU starts without one: %v, %v", srv != nil, err)
	}
}

// TestDeviceStuck: a device that does not answer costs one call its patience. The host answers, and goes on to, until the device has done what it was asked.
func TestDeviceStuck(t *testing.T) {
	cudatest.Open(t)
	m := newModel(9, deviceSpec(), 2*segment+400)
	dir, id := sealedFolder(t, m, kvtierv1.Profile_PROFILE_BALANCED)
	const patience = time.Second
	srv := openServer(t, dir, Options{ReadAllTokens: -1, GPUBytes: 64 << 20, GPUPatience: patience})
	s := find(t, srv, id)
	askOf := func(layer int) (*answer, time.Duration) {
		begin := time.Now()
		return m.ask(t, s, layer, 2*segment+399, exactBudget), time.Since(begin)
	}
	ask := func() (*answer, time.Duration) { return askOf(0) }
	ask()
	askOf(1)
	settle(t, srv)
	want, _ := ask()
	if want.account.BytesGpu == 0 {
		t.Fatalf("the GPU has no part in the answer: %v", want.account)
	}
	cudatest.Stall(t, true)
	t.Cleanup(func() { cudatest.Stall(t, false) }) // before the server closes
	for i := range 3 {
		got, took := ask()
		if got.account.BytesGpu > 0 {
			t.Errorf("%d: the GPU has answered: %v", i, got.account)
		}
		if e := attention.RelativeError(got.out, want.out); !(e <= 2e-3) {
			t.Errorf("%d: error %v", i, e)
		}
		if i == 0 && took < patience {
			t.Errorf("the host answers after %v", took)
		}
	}
	cudatest.Stall(t, false)
	for begin := time.Now(); ; time.Sleep(10 * time.Millisecond) {
		if got, _ := ask(); got.account.BytesGpu > 0 {
			break
		}
		if time.Since(begin) > 30*time.Second {
			t.Fatal("the GPU is not asked again")
		}
	}
	cudatest.Stall(t, true)
	if got, took := askOf(1); got.account.BytesGpu > 0 || took > 30*time.Second { // where its segments lie the device was never told
		t.Errorf("%v after %v", got.account, took)
	}
	if err := srv.Close(t.Context()); !errors.Is(err, gpu.ErrStuck) { // it ends all the same
		t.Errorf("close: %v", err)
	}
}

// TestDeviceAhead: segments of a layer are on the GPU when it is asked for the first time, because the layer before was; or not, where that is off.
func TestDeviceAhead(t *testing.T) {
	cudatest.Open(t)
	m := newModel(9, deviceSpec(), 2*segment+400)
	dir, id := sealedFolder(t, m, kvtierv1.Profile_PROFILE_BALANCED)
	for _, off := range []bool{false, true} {
		srv := openServer(t, dir, Options{ReadAllTokens: -1, GPUBytes: 64 << 20, SealOnHost: true, NoPrefetch: off})
		s := find(t, srv, id)
		m.ask(t, s, 0, 2*segment+399, exactBudget)
		settle(t, srv)
		got := m.ask(t, s, 1, 2*segment+399, exactBudget)
		w := srv.store.DeviceWork()
		if fromGPU := got.account.BytesGpu > 0; fromGPU == off || (w.AheadUsed == 2) == off || (w.Ahead < 2) != off {
			t.Errorf("off: %v; %v, %+v", off, got.account, w)
		}
		closeServer(t, srv)
	}
}

// TestDeviceWorker: a worker in another process hands rows and queries over in its own device memory, and gets its answers there: the same as inline. So
// it does after the GPU was given up, by answers of the host.
func TestDeviceWorker(t *testing.T) {
	const env = "KVTIER_TEST_WORKER" // the fast path's socket, the sequence, and who answers
	cudatest.Open(t)
	if to := os.Getenv(env); to != "" {
		x := strings.Split(to, "|")
		deviceWorker(t, x[0], x[1], x[2] == "gpu")
		return
	}
	for _, who := range []string{"gpu", "host"} {
		t.Run(who, func(t *testing.T) {
			m := newModel(9, deviceSpec(), segment+400)
			r := newRig(t, Options{ReadAllTokens: -1, GPUBytes: 64 << 20, SealOnHost: true})
			s := openSequence(t, r.srv, &kvtierv1.OpenSequenceRequest{Spec: m.spec, Profile: kvtierv1.Profile_PROFILE_BALANCED})
			m.feed(t, s, 0, segment+300)
			waitSealed(t, s, segment)
			settle(t, r.srv)
			if who == "host" {
				if err := r.srv.store.GiveUpDevice(errors.New("as a test wants it")); err != nil {
					t.Fatal(err)
				}
			}
			cmd := exec.Command(os.Args[0], "-test.run=^TestDeviceWorker$", "-test.v")
			cmd.Env = append(os.Environ(), env+"="+r.socket+"|"+s.id+"|"+who)
			if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "--- PASS: TestDeviceWorker") {
				t.Errorf("worker: %v\n%s", err, out)
			}
		})
	}
}

// deviceWorker is the worker's process.
func deviceWorker(t *testing.T, socket, id string, onDevice bool) {
	d := cudatest.Open(t)
	const size = 1 << 20
	var at cuda.Ptr
	var handle cuda.Handle
	var stream cuda.Stream
	var pinned []byte
	do := func(f func(c *cuda.Context) error) {
		t.Helper()
		if err := d.Do(t.Context(), f); err != nil {
			t.Fatal(err)
		}
	}
	do(func(c *cuda.Context) (err error) {
		if at, err = c.Alloc(2 * size); err != nil {
			return err
		}
		if handle, err = c.MemHandle(at); err != nil {
			return err
		}
		if pinned, err = c.HostAlloc(2 * size); err != nil {
			return err
		}
		clear(pinned)
		if stream, err = c.NewStream(); err != nil {
			return err
		}
		return errors.Join(c.Set(at, 0, 2*size, stream), stream.Synchronize())
	})
	defer do(func(c *cuda.Context) error { return errors.Join(stream.Destroy(), c.HostFree(pinned), c.Free(at)) })

	plain, shared := dialFast(t, socket), dialFast(t, socket)
	region := func(region uint32, n uint64) []byte { return append(regionBody(region, n), handle[:]...) }
	for _, c := range []struct {
		body []byte
		code codes.Code
	}{
		{region(0, size), codes.InvalidArgument}, {region(7, 0), codes.InvalidArgument}, {region(7, 2*size+1), codes.InvalidArgument},
		{region(7, size)[:75], codes.InvalidArgument}, {append(regionBody(7, size), make([]byte, 64)...), codes.InvalidArgument},
	} {
		_, err := shared.call(opDeviceRegion, c.body)
		wantError(t, err, c.code, "")
	}
	if _, err := shared.call(opDeviceRegion, region(7, 2*size)); err != nil {
		t.Fatal(err)
	}
	// Tensors go through the first half of the region, results come in the second; the client's own places are copied there and back.
	shared.in = &testRegion{id: 7, b: pinned[:size]}
	shared.push = func() {
		do(func(c *cuda.Context) error {
			return errors.Join(c.CopyToDevice(at, pinned[:size], stream), stream.Synchronize())
		})
	}
	shared.out = &testRegion{id: 7, b: pinned[size:]}
	shared.outAt = size
	shared.pull = func() {
		do(func(c *cuda.Context) error {
			return errors.Join(c.CopyToHost(pinned[size:], at+size, stream), stream.Synchronize())
		})
	}
	for _, c := range []*fastClient{plain, shared} {
		if _, err := c.open(t.Context(), id); err != nil {
			t.Fatal(err)
		}
	}
	m := newModel(9, deviceSpec(), segment+400)
	row, kv := int(m.spec.QueryHeads*m.spec.HeadDim), int(m.spec.KvHeads*m.spec.HeadDim)
	for i, pos := range []int{segment + 300, segment + 301, segment + 302} {
		for layer := range int(m.spec.Layers) {
			writer := []*fastClient{shared, plain}[i%2] // who brings the token's rows
			item := &kvtierv1.AttendItem{SequenceId: id, Start: uint64(pos), Q: bf16Bytes(m.q[layer][pos*row : (pos+1)*row]),
				K: bf16Bytes(m.k[layer][pos*kv : (pos+1)*kv]), V: bf16Bytes(m.v[layer][pos*kv : (pos+1)*kv])}
			if layer == 0 {
				item.TokenIds = m.ids[pos : pos+1]
			}
			ask := func(c *fastClient, it *kvtierv1.AttendItem) *kvtierv1.AttendResult {
				req := request(layer, exactly, it)
				req.Dtype = kvtierv1.ElementType_ELEMENT_TYPE_BF16
				res, err := c.attend(t.Context(), m.spec, req)
				if err != nil {
					t.Fatal(err)
				}
				return res.Results[0]
			}
			got := ask(writer, item)
			again := &kvtierv1.AttendItem{SequenceId: id, Start: item.Start, Q: item.Q}
			for _, c := range []*fastClient{plain, shared} {
				if res := ask(c, again); !bytes.Equal(res.Output, got.Output) || !bytes.Equal(res.Lse, got.Lse) {
					t.Fatalf("token %d, layer %d: another answer", pos, layer)
				}
			}
			if onDevice != (got.Account.BytesGpu > 0) {
				t.Errorf("token %d, layer %d: %v", pos, layer, got.Account)
			}
		}
	}
	if _, err := shared.call(opUnregion, binary.LittleEndian.AppendUint32(nil, 7)); err != nil {
		t.Fatal(err)
	}
}
