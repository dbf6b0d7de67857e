package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/reflection"

	kvtierv1 "kvtier/proto/kvtier/v1"
	"kvtier/tiers/files"
)

// Backend is a server as the daemon needs it.
type Backend interface {
	// Register adds the protocol's services to g.
	Register(g *grpc.Server)
	// ServeFast serves the fast path until Close, and then returns nil.
	ServeFast(l *net.UnixListener) error
	Metrics() prometheus.Gatherer
	// Close ends all work and makes what is accepted durable.
	Close(ctx context.Context) error
}

// Wiring makes the daemon's server.
type Wiring struct {
	// Open recovers the data folder.
	Open        func(ctx context.Context, c *Config, log *slog.Logger) (Backend, error)
	GRPCOptions func() []grpc.ServerOption
}

// daemon is a running server with its front doors.
type daemon struct {
	cfg     *Config
	log     *slog.Logger
	wiring  Wiring
	backend Backend
	grpc    *grpc.Server
	health  *health.Server
	pages   *pages

	tcp, http    net.Listener
	socket, fast *net.UnixListener
	// failed gets the first error of every front door that ends before it should.
	failed chan error
}

// run serves until ctx ends, then shuts down. Ports are bound and sockets looked at before the data
// folder is touched, so that a wrong address fails at once.
func run(ctx context.Context, c *Config, log *slog.Logger, w Wiring) (err error) {
	limitMemory(c)
	d := &daemon{cfg: c, log: log, wiring: w, pages: newPages(c.PProf), failed: make(chan error, 8)}
	start := time.Now()
	defer d.closeListeners()
	if err := d.prepare(ctx); err != nil {
		return err
	}
	d.backend, err = w.Open(ctx, c, log)
	if err != nil && ctx.Err() != nil {
		log.Info("stopped while the data folder was being recovered; nothing is lost", "data", c.Data)
		return nil
	}
	if err != nil {
		return fmt.Errorf("opening %s: %w", c.Data, err)
	}
	if err := d.serve(ctx); err != nil {
		return errors.Join(err, d.shutdown())
	}
	d.announce(ctx, time.Since(start))
	select {
	case <-ctx.Done():
		log.Info("shutting down", "timeout", c.ShutdownTimeout)
	case err = <-d.failed:
		log.Error("a front door failed; shutting down", "error", err)
	}
	return errors.Join(err, d.shutdown())
}

func (d *daemon) prepare(ctx context.Context) (err error) {
	if err := files.OS.MkdirAll(d.cfg.Data); err != nil {
		return fmt.Errorf("--data: %w", err)
	}
	for _, path := range []string{d.cfg.Socket, d.cfg.FastSocket} {
		if path == "" {
			continue
		}
		if err := clearSocket(path); err != nil {
			return err
		}
	}
	if d.cfg.Listen != "" {
		if d.tcp, err = listenTCP(ctx, "listen", d.cfg.Listen); err != nil {
			return err
		}
	}
	if d.cfg.Metrics == "" {
		return nil
	}
	if d.http, err = listenTCP(ctx, "metrics", d.cfg.Metrics); err != nil {
		return err
	}
	d.start("metrics", func() error { return d.pages.serve(d.http) })
	return nil
}

// serve opens the front doors. The sockets come after the data folder's lock is held: two daemons
// that start together cannot take each other's.
func (d *daemon) serve(ctx context.Context) (err error) {
	d.grpc = grpc.NewServer(d.wiring.GRPCOptions()...)
	d.health = health.NewServer()
	d.backend.Register(d.grpc)
	grpc_health_v1.RegisterHealthServer(d.grpc, d.health)
	reflection.Register(d.grpc)
	if d.cfg.Socket != "" {
		if d.socket, err = listenUnix(ctx, d.cfg.Socket); err != nil {
			return err
		}
		d.start("socket", func() error { return d.grpc.Serve(d.socket) })
	}
	if d.tcp != nil {
		d.start("listen", func() error { return d.grpc.Serve(d.tcp) })
	}
	if d.cfg.FastSocket != "" {
		if d.fast, err = listenUnix(ctx, d.cfg.FastSocket); err != nil {
			return err
		}
		d.start("fast path", func() error { return d.backend.ServeFast(d.fast) })
	}
	for name := range d.grpc.GetServiceInfo() {
		if strings.HasPrefix(name, "kvtier.") {
			d.health.SetServingStatus(name, grpc_health_v1.HealthCheckResponse_SERVING)
		}
	}
	d.pages.open(d.backend.Metrics())
	return nil
}

// start runs a front door and reports its failure.
func (d *daemon) start(name string, serve func() error) {
	go func() {
		if err := serve(); err != nil {
			d.failed <- fmt.Errorf("%s: %w", name, err)
		}
	}()
}

// announce says that the daemon is ready, and where.
func (d *daemon) announce(ctx context.Context, took time.Duration) {
	c := d.cfg
	attrs := []any{
		"data", c.Data, "socket", c.Socket, "fast_socket", c.FastSocket, "listen", boundAddr(d.tcp), "metrics", boundAddr(d.http),
		"ram", c.RAM.String(), "disk", c.Disk.String(), "tail", c.Tail.String(), "took", took.Round(time.Millisecond),
	}
	status, err := d.askStatus(ctx)
	if err != nil {
		d.log.Warn("the daemon does not answer its own call", "error", err)
	} else {
		attrs = append(attrs, "sequences", status.GetSequences())
	}
	d.log.Info("ready", attrs...)
}

func boundAddr(l net.Listener) string {
	if l == nil {
		return ""
	}
	return l.Addr().String()
}

// askStatus calls the daemon through its own front door: what it then announces is what a client gets.
func (d *daemon) askStatus(ctx context.Context) (*kvtierv1.GetStatusResponse, error) {
	door := d.tcp
	if d.socket != nil {
		door = d.socket
	}
	addr := door.Addr()
	conn, err := grpc.NewClient("passthrough:///self", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, addr.Network(), addr.String())
		}))
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	return kvtierv1.NewInspectionServiceClient(conn).GetStatus(ctx, &kvtierv1.GetStatusRequest{})
}

// shutdown lets calls in flight finish, within the limit, and closes the server. Closing has as much
// time again: it is what makes accepted tokens durable, so slow clients must not take its share.
func (d *daemon) shutdown() error {
	d.pages.ready.Store(false)
	d.health.Shutdown()
	drained := make(chan struct{})
	go func() {
		d.grpc.GracefulStop()
		close(drained)
	}()
	select {
	case <-drained:
	case <-time.After(d.cfg.ShutdownTimeout):
		d.log.Warn("calls were still in flight; they are cut off", "after", d.cfg.ShutdownTimeout)
		d.grpc.Stop()
	}
	ctx, cancel := context.WithTimeout(context.Background(), d.cfg.ShutdownTimeout)
	defer cancel()
	if err := d.backend.Close(ctx); err != nil {
		return fmt.Errorf("closing %s: %w", d.cfg.Data, err)
	}
	d.log.Info("closed", "data", d.cfg.Data)
	return nil
}

// closeListeners removes the sockets too. Closing twice does no harm.
func (d *daemon) closeListeners() {
	_ = d.pages.server.Close()
	if d.tcp != nil {
		_ = d.tcp.Close()
	}
	if d.socket != nil {
		_ = d.socket.Close()
	}
	if d.fast != nil {
		_ = d.fast.Close()
	}
}
