package crash

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"

	kvtierv1 "kvtier/proto/kvtier/v1"
)

// build compiles the daemon once.
func build(t *testing.T, dir string) string {
	t.Helper()
	bin := filepath.Join(dir, "kvtierd")
	cmd := exec.Command("go", "build", "-o", bin, "kvtier/cmd/kvtierd")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build kvtierd: %v\n%s", err, out)
	}
	return bin
}

// clients speak to a daemon.
type clients struct {
	seq  kvtierv1.SequenceServiceClient
	look kvtierv1.InspectionServiceClient
}

func newClients(conn *grpc.ClientConn) clients {
	return clients{kvtierv1.NewSequenceServiceClient(conn), kvtierv1.NewInspectionServiceClient(conn)}
}

// process is one run of the daemon.
type process struct {
	clients
	cmd  *exec.Cmd
	log  *bytes.Buffer // read it once done is closed
	done chan struct{}
	conn *grpc.ClientConn
}

// start runs the daemon on dir; it may not be ready yet.
func start(bin, dir string) (*process, error) {
	socket := filepath.Join(dir, "s")
	p := &process{log: &bytes.Buffer{}, done: make(chan struct{})}
	// Small tiers: pieces come and go, and open tails are spilled and read back. No context is short enough to be read
	// whole, so that queries are sparse.
	p.cmd = exec.Command(bin, "--data", filepath.Join(dir, "data"), "--socket", socket, "--fast-socket", "", "--listen", "", "--metrics", "",
		"--ram", "1MiB", "--disk", "128MiB", "--tail", "5MiB", "--read-all", "1", "--audit", "0.05", "--sync-interval", "5ms")
	p.cmd.Stdout, p.cmd.Stderr = p.log, p.log
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		_ = p.cmd.Wait() // it was killed
		close(p.done)
	}()
	var err error
	p.conn, err = grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithConnectParams(grpc.ConnectParams{MinConnectTimeout: time.Second, Backoff: backoff.Config{BaseDelay: 4 * time.Millisecond, Multiplier: 1.2, MaxDelay: 20 * time.Millisecond}}))
	if err != nil {
		p.kill()
		return nil, err
	}
	p.clients = newClients(p.conn)
	return p, nil
}

// ready waits until the daemon answers.
func (p *process) ready(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	go func() {
		select {
		case <-p.done:
			cancel()
		case <-ctx.Done():
		}
	}()
	_, err := p.look.GetStatus(ctx, &kvtierv1.GetStatusRequest{}, grpc.WaitForReady(true))
	if err == nil {
		return nil
	}
	select {
	case <-p.done:
		return fmt.Errorf("the daemon ended: %v\n%s", p.cmd.ProcessState, p.log)
	default:
		return errors.Join(err, errors.New("the daemon does not answer"))
	}
}

// kill ends the process as a crash does.
func (p *process) kill() {
	_ = p.cmd.Process.Signal(os.Kill) // it may be gone
	<-p.done
	if p.conn != nil {
		_ = p.conn.Close()
	}
}
