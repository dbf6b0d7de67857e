package daemon

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/reflection/grpc_reflection_v1"

	kvtierv1 "kvtier/proto/kvtier/v1"
)

// fakeBackend stands for a server. A ListSequences call waits until block is closed.
type fakeBackend struct {
	kvtierv1.UnimplementedInspectionServiceServer
	kvtierv1.UnimplementedSequenceServiceServer
	block    chan struct{}
	entered  chan struct{}
	registry *prometheus.Registry
	closeErr error
	log      io.Writer

	mu struct {
		sync.Mutex
		fast   *net.UnixListener
		closed bool
	}
}

func newFakeBackend() *fakeBackend {
	b := &fakeBackend{block: make(chan struct{}), entered: make(chan struct{}, 1), registry: prometheus.NewRegistry(), log: io.Discard}
	b.registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "kvtier_sequences"}, func() float64 { return 7 }))
	return b
}

func (b *fakeBackend) Register(g *grpc.Server) {
	kvtierv1.RegisterInspectionServiceServer(g, b)
	kvtierv1.RegisterSequenceServiceServer(g, b)
}

func (b *fakeBackend) ServeFast(l *net.UnixListener) error {
	b.mu.Lock()
	b.mu.fast = l
	b.mu.Unlock()
	for {
		conn, err := l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err != nil {
			return err
		}
		_, _ = io.WriteString(conn, "fast")
		conn.Close()
	}
}

func (b *fakeBackend) Metrics() prometheus.Gatherer { return b.registry }

func (b *fakeBackend) Close(context.Context) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.mu.closed = true
	if b.mu.fast != nil {
		b.mu.fast.Close()
	}
	return b.closeErr
}

func (b *fakeBackend) GetStatus(context.Context, *kvtierv1.GetStatusRequest) (*kvtierv1.GetStatusResponse, error) {
	return &kvtierv1.GetStatusResponse{Sequences: 7}, nil
}

func (b *fakeBackend) ListSequences(ctx context.Context, _ *kvtierv1.ListSequencesRequest) (*kvtierv1.ListSequencesResponse, error) {
	b.entered <- struct{}{}
	fmt.Fprintln(b.log, "a call is in flight")
	select {
	case <-b.block:
	case <-ctx.Done():
	}
	return &kvtierv1.ListSequencesResponse{}, ctx.Err()
}

func (b *fakeBackend) wiring() Wiring {
	return Wiring{
		Open:        func(context.Context, *Config, *slog.Logger) (Backend, error) { return b, nil },
		GRPCOptions: func() []grpc.ServerOption { return nil },
	}
}

// TestMain lets the test binary be a daemon of its own, for what only a process can show.
func TestMain(m *testing.M) {
	if os.Getenv("KVTIERD_TEST_CHILD") != "" {
		b := newFakeBackend()
		b.log = os.Stderr
		os.Exit(Main(os.Args[1:], os.Stdout, os.Stderr, b.wiring()))
	}
	os.Exit(m.Run())
}

func shortTempDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "kv")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// logBuffer is a log that can be read while it is written.
type logBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

func waitFor(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited too long for %s", what)
		}
	}
}

// running is a daemon in this process.
type running struct {
	cfg  *Config
	log  *logBuffer
	stop context.CancelFunc
	done chan error
}

func startDaemon(t *testing.T, w Wiring, args ...string) *running {
	t.Helper()
	dir := filepath.Join(shortTempDir(t), "data")
	c := mustLoad(t, nil, append([]string{"--data", dir, "--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0"}, args...)...)
	ctx, cancel := context.WithCancel(context.Background())
	r := &running{cfg: c, log: &logBuffer{}, stop: cancel, done: make(chan error, 1)}
	go func() { r.done <- run(ctx, c, newLogger(r.log, c), w) }()
	t.Cleanup(func() {
		cancel()
		<-r.done
	})
	waitFor(t, "the daemon to be ready", func() bool { return strings.Contains(r.log.String(), "msg=ready") || len(r.done) > 0 })
	return r
}

// wait ends the daemon and returns run's error.
func (r *running) wait() error {
	r.stop()
	err := <-r.done
	r.done <- err
	return err
}

// logged returns what the log's ready line says for key.
func (r *running) logged(key string) string {
	_, rest, _ := strings.Cut(r.log.String(), "msg=ready")
	_, rest, _ = strings.Cut(rest, " "+key+"=")
	value, _, _ := strings.Cut(rest, " ")
	return strings.TrimSpace(value)
}

func dialUnix(t *testing.T, path string) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient("unix:"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

func TestServes(t *testing.T) {
	b := newFakeBackend()
	r := startDaemon(t, b.wiring())
	conn := dialUnix(t, r.cfg.Socket)
	for _, service := range []string{"", "kvtier.v1.InspectionService", "kvtier.v1.SequenceService"} {
		h, err := grpc_health_v1.NewHealthClient(conn).Check(t.Context(), &grpc_health_v1.HealthCheckRequest{Service: service})
		if err != nil || h.GetStatus() != grpc_health_v1.HealthCheckResponse_SERVING {
			t.Errorf("health of %q: %v, %v", service, h, err)
		}
	}
	if names := reflectedServices(t, conn); !strings.Contains(names, "kvtier.v1.SequenceService") {
		t.Errorf("reflection lists %q", names)
	}
	fast, err := net.Dial("unix", r.cfg.FastSocket)
	if err != nil {
		t.Fatal(err)
	}
	defer fast.Close()
	if got, _ := io.ReadAll(fast); string(got) != "fast" {
		t.Errorf("the fast path said %q", got)
	}
	for path, want := range map[string]os.FileMode{r.cfg.Data: 0o700, r.cfg.Socket: 0o600, r.cfg.FastSocket: 0o600} {
		if info, err := os.Stat(path); err != nil || info.Mode().Perm() != want {
			t.Errorf("%s: %v, %v; want mode %04o", path, info.Mode(), err, want)
		}
	}
	if r.logged("sequences") != "7" || r.logged("ram") != "1GiB" || r.logged("data") != r.cfg.Data {
		t.Errorf("the log says %q", r.log.String())
	}
	if err := r.wait(); err != nil || !b.mu.closed {
		t.Errorf("shutdown: %v, closed %v", err, b.mu.closed)
	}
	for _, path := range []string{r.cfg.Socket, r.cfg.FastSocket} {
		if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is still there: %v", path, err)
		}
	}
}

func reflectedServices(t *testing.T, conn *grpc.ClientConn) string {
	t.Helper()
	stream, err := grpc_reflection_v1.NewServerReflectionClient(conn).ServerReflectionInfo(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&grpc_reflection_v1.ServerReflectionRequest{
		MessageRequest: &grpc_reflection_v1.ServerReflectionRequest_ListServices{},
	}); err != nil {
		t.Fatal(err)
	}
	reply, err := stream.Recv()
	if err != nil {
		t.Fatal(err)
	}
	_ = stream.CloseSend()
	return fmt.Sprint(reply.GetListServicesResponse().GetService())
}

func get(t *testing.T, addr, path string) (int, string) {
	t.Helper()
	reply, err := http.Get("http://" + addr + path)
	if err != nil {
		t.Fatal(err)
	}
	defer reply.Body.Close()
	body, _ := io.ReadAll(reply.Body)
	return reply.StatusCode, string(body)
}

func TestPages(t *testing.T) {
	for _, profiles := range []bool{false, true} {
		r := startDaemon(t, newFakeBackend().wiring(), fmt.Sprintf("--pprof=%v", profiles))
		addr := r.logged("metrics")
		if code, body := get(t, addr, "/healthz"); code != 200 || body != "ok\n" {
			t.Errorf("/healthz: %d %q", code, body)
		}
		if code, body := get(t, addr, "/metrics"); code != 200 || !strings.Contains(body, "kvtier_sequences 7") {
			t.Errorf("/metrics: %d %q", code, body)
		}
		want := map[bool]int{false: 404, true: 200}[profiles]
		if code, _ := get(t, addr, "/debug/pprof/cmdline"); code != want {
			t.Errorf("/debug/pprof with --pprof=%v: %d", profiles, code)
		}
	}
}

// While the data folder is recovered, the pages say so and a signal ends the daemon in order.
func TestRecovering(t *testing.T) {
	opening := make(chan struct{})
	w := newFakeBackend().wiring()
	w.Open = func(ctx context.Context, _ *Config, _ *slog.Logger) (Backend, error) {
		close(opening)
		<-ctx.Done()
		return nil, ctx.Err()
	}
	port, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := port.Addr().String()
	port.Close()
	c := mustLoad(t, nil, "--data", shortTempDir(t), "--listen", "", "--metrics", addr)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- run(ctx, c, slog.New(slog.DiscardHandler), w) }()
	<-opening
	for _, path := range []string{"/healthz", "/metrics"} {
		if code, _ := get(t, addr, path); code != http.StatusServiceUnavailable {
			t.Errorf("%s: %d", path, code)
		}
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestShutdownWaitsForCalls(t *testing.T) {
	b := newFakeBackend()
	r := startDaemon(t, b.wiring())
	result := make(chan error, 1)
	client := kvtierv1.NewInspectionServiceClient(dialUnix(t, r.cfg.Socket))
	go func() {
		_, err := client.ListSequences(context.Background(), &kvtierv1.ListSequencesRequest{})
		result <- err
	}()
	<-b.entered
	r.stop()
	waitFor(t, "the shutdown to begin", func() bool { return strings.Contains(r.log.String(), "shutting down") })
	close(b.block)
	if err := <-result; err != nil {
		t.Errorf("the call in flight failed: %v", err)
	}
	if err := r.wait(); err != nil {
		t.Error(err)
	}
}

func TestShutdownCutsOffSlowCalls(t *testing.T) {
	b := newFakeBackend()
	b.closeErr = errors.New("disk gone")
	r := startDaemon(t, b.wiring(), "--shutdown-timeout", "50ms")
	client := kvtierv1.NewInspectionServiceClient(dialUnix(t, r.cfg.Socket))
	result := make(chan error, 1)
	go func() {
		_, err := client.ListSequences(context.Background(), &kvtierv1.ListSequencesRequest{})
		result <- err
	}()
	<-b.entered
	if err := r.wait(); err == nil || !strings.Contains(err.Error(), "disk gone") {
		t.Errorf("closing failed, but run says %v", err)
	}
	if err := <-result; err == nil {
		t.Error("the call that never ends succeeded")
	}
}

func TestSocketsInUse(t *testing.T) {
	first := startDaemon(t, newFakeBackend().wiring())
	opened := false
	w := newFakeBackend().wiring()
	w.Open = func(context.Context, *Config, *slog.Logger) (Backend, error) {
		opened = true
		return nil, errors.New("opened")
	}
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"--socket", first.cfg.Socket}, "another process answers on " + first.cfg.Socket},
		{[]string{"--listen", first.logged("listen")}, "is in use"},
		{[]string{"--metrics", first.logged("metrics")}, "is in use"},
		{[]string{"--socket", "/tmp/" + strings.Repeat("x", 110)}, "choose a shorter one"},
		{[]string{"--fast-socket", first.cfg.Data}, "is no socket"},
	} {
		args := append([]string{"--data", shortTempDir(t), "--listen", "", "--metrics", ""}, c.args...)
		err := run(t.Context(), mustLoad(t, nil, args...), slog.New(slog.DiscardHandler), w)
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%v: %v; want %q", c.args, err, c.want)
		}
	}
	if opened {
		t.Error("the data folder was opened although an address was in use")
	}
	if err := clearSocket(first.cfg.Socket); err == nil {
		t.Error("a socket in use was removed")
	}
}

func TestFrontDoorFailureEndsTheDaemon(t *testing.T) {
	b := newFakeBackend()
	r := startDaemon(t, failingFast{b}.wiring())
	if err := <-r.done; err == nil || !strings.Contains(err.Error(), "fast path: broken") {
		t.Errorf("run says %v", err)
	} else {
		r.done <- err
	}
	if !b.mu.closed {
		t.Error("the server was not closed")
	}
}

type failingFast struct{ *fakeBackend }

func (failingFast) ServeFast(*net.UnixListener) error { return errors.New("broken") }

func (f failingFast) wiring() Wiring {
	w := f.fakeBackend.wiring()
	w.Open = func(context.Context, *Config, *slog.Logger) (Backend, error) { return f, nil }
	return w
}

// child is a daemon in a process of its own.
func startChild(t *testing.T, dir string, args ...string) (*exec.Cmd, *logBuffer) {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	log := &logBuffer{}
	cmd := exec.Command(exe, append([]string{"--data", dir, "--listen", "", "--metrics", ""}, args...)...)
	cmd.Env = append(os.Environ(), "KVTIERD_TEST_CHILD=1")
	cmd.Stderr = log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill() })
	waitFor(t, "the child to be ready", func() bool { return strings.Contains(log.String(), "msg=ready") })
	return cmd, log
}

func TestSignals(t *testing.T) {
	dir := shortTempDir(t)
	killed, _ := startChild(t, dir)
	if err := killed.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = killed.Wait()
	if _, err := os.Lstat(filepath.Join(dir, "kvtier.sock")); err != nil {
		t.Fatalf("a killed daemon should leave its socket: %v", err)
	}
	cmd, log := startChild(t, dir)
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("after SIGTERM: %v\n%s", err, log.String())
	}
	if left, _ := filepath.Glob(filepath.Join(dir, "*.sock")); len(left) > 0 {
		t.Errorf("left %v", left)
	}
}

func TestSecondSignalKills(t *testing.T) {
	dir := shortTempDir(t)
	cmd, log := startChild(t, dir, "--shutdown-timeout", "1h")
	client := kvtierv1.NewInspectionServiceClient(dialUnix(t, filepath.Join(dir, "kvtier.sock")))
	go func() { _, _ = client.ListSequences(context.Background(), &kvtierv1.ListSequencesRequest{}) }()
	waitFor(t, "the call", func() bool { return strings.Contains(log.String(), "a call is in flight") })
	if err := cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "the shutdown to begin", func() bool { return strings.Contains(log.String(), "shutting down") })
	if err := cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err == nil || strings.Contains(log.String(), "msg=closed") {
		t.Errorf("the second signal did not end it at once: %v\n%s", err, log.String())
	}
}

func TestMainExitCodes(t *testing.T) {
	w := newFakeBackend().wiring()
	for _, c := range []struct {
		args []string
		code int
		out  string
	}{
		{[]string{"--version"}, exitOK, "kvtierd "},
		{[]string{"--help"}, exitOK, "Usage: kvtierd"},
		{[]string{"--print-config", "--data", "/x"}, exitOK, `data: "/x" # flag`},
		{[]string{"--nonsense"}, exitUsage, ""},
		{[]string{"--data", "/dev/null/x", "--listen", "", "--metrics", ""}, exitFailure, ""},
	} {
		var out, errOut bytes.Buffer
		if code := Main(c.args, &out, &errOut, w); code != c.code || !strings.Contains(out.String(), c.out) {
			t.Errorf("%v: code %d, %q, %q", c.args, code, out.String(), errOut.String())
		}
	}
}
