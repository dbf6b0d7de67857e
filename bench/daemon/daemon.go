// Package daemon runs a kvtierd as a child process, for measurements of the whole service.
package daemon

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"

	kvtierv1 "kvtier/proto/kvtier/v1"
)

// Daemon is a kvtierd that runs. It dies with this process.
type Daemon struct {
	Seq  kvtierv1.SequenceServiceClient
	Look kvtierv1.InspectionServiceClient

	cmd  *exec.Cmd
	log  Log
	done chan struct{}
	conn *grpc.ClientConn
}

// Find returns the daemon to run: path if it is not empty, else the kvtierd beside this program, or in PATH.
func Find(path string) (string, error) {
	if path != "" {
		if _, err := os.Stat(path); err != nil {
			return "", fmt.Errorf("--kvtierd: %w", err)
		}
		return filepath.Abs(path)
	}
	if self, err := os.Executable(); err == nil {
		beside := filepath.Join(filepath.Dir(self), "kvtierd")
		if _, err := os.Stat(beside); err == nil {
			return beside, nil
		}
	}
	found, err := exec.LookPath("kvtierd")
	if err != nil {
		return "", errors.New("there is no kvtierd beside this program or in PATH: run 'make build', or name it by --kvtierd")
	}
	return filepath.Abs(found)
}

// socketPath is how long a Unix socket's path may be, in bytes.
const socketPath = 100

// messageBytes is the longest message either way.
const messageBytes = 256 << 20

// Log takes in what a daemon writes, and gives it back once that has ended.
type Log interface {
	io.Writer
	String() string
}

// Start is Run, keeping the end of what the daemon writes, and waits until it answers.
func Start(ctx context.Context, bin, dir string, args ...string) (*Daemon, error) {
	d, err := Run(bin, dir, &lastLines{}, args...)
	if err != nil {
		return nil, err
	}
	if err := d.Ready(ctx); err != nil {
		d.Kill()
		return nil, err
	}
	return d, nil
}

// Run runs the program bin on folder dir; it may not answer yet. It serves gRPC on a Unix socket in that
// folder and nothing else, unless args say so.
func Run(bin, dir string, log Log, args ...string) (*Daemon, error) {
	socket := filepath.Join(dir, "s")
	if len(socket) > socketPath {
		return nil, fmt.Errorf("%s: the path is too long for a socket: choose another folder", dir)
	}
	d := &Daemon{log: log, done: make(chan struct{})}
	d.cmd = exec.Command(bin, append([]string{"--data", filepath.Join(dir, "data"), "--socket", socket,
		"--fast-socket", "", "--listen", "", "--metrics", "", "--log-level", "warn"}, args...)...)
	d.cmd.Stdout, d.cmd.Stderr = log, log
	d.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := d.cmd.Start(); err != nil {
		return nil, fmt.Errorf("run kvtierd: %w", err)
	}
	go func() {
		_ = d.cmd.Wait() // how it ended is in cmd.ProcessState
		close(d.done)
	}()
	var err error
	d.conn, err = grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(messageBytes), grpc.MaxCallSendMsgSize(messageBytes)),
		grpc.WithConnectParams(grpc.ConnectParams{MinConnectTimeout: time.Second,
			Backoff: backoff.Config{BaseDelay: 4 * time.Millisecond, Multiplier: 1.2, MaxDelay: 20 * time.Millisecond}}))
	if err != nil {
		d.Kill()
		return nil, err
	}
	d.Seq, d.Look = kvtierv1.NewSequenceServiceClient(d.conn), kvtierv1.NewInspectionServiceClient(d.conn)
	return d, nil
}

// Ready waits until the daemon answers.
func (d *Daemon) Ready(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		select {
		case <-d.done:
			cancel()
		case <-ctx.Done():
		}
	}()
	_, err := d.Look.GetStatus(ctx, &kvtierv1.GetStatusRequest{}, grpc.WaitForReady(true))
	if err == nil {
		return nil
	}
	select {
	case <-d.done:
		return fmt.Errorf("kvtierd ended: %v\n%s", d.cmd.ProcessState, d.log.String())
	default:
		return fmt.Errorf("kvtierd does not answer: %w", err)
	}
}

// Kill ends the process as kill -9 does, and waits until it is gone.
func (d *Daemon) Kill() {
	_ = d.cmd.Process.Kill() // it may be gone
	<-d.done
	if d.conn != nil {
		_ = d.conn.Close()
	}
}

// PID is the process's number.
func (d *Daemon) PID() int { return d.cmd.Process.Pid }

// lastLines keeps the end of what is written.
type lastLines struct {
	mu sync.Mutex
	b  []byte
}

const keepBytes = 16 << 10

func (l *lastLines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.b = append(l.b, p...)
	if over := len(l.b) - keepBytes; over > 0 {
		l.b = append([]byte(nil), l.b[over:]...)
	}
	return len(p), nil
}

func (l *lastLines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return string(bytes.TrimSpace(l.b))
}
