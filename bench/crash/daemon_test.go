package crash

import (
	"bytes"
	"context"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"google.golang.org/grpc"

	"kvtier/bench/daemon"
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
	*daemon.Daemon
	log *bytes.Buffer // read it once the process is killed
}

// start runs the daemon on dir; it may not be ready yet.
func start(bin, dir string) (*process, error) {
	log := &bytes.Buffer{}
	// Small tiers: pieces come and go, and open tails are spilled and read back. No context is short enough to be read
	// whole, so that queries are sparse.
	d, err := daemon.Run(bin, dir, log, "--log-level", "info",
		"--ram", "1MiB", "--disk", "128MiB", "--tail", "5MiB", "--read-all", "1", "--read-all-in-ram", "0", "--audit", "0.05", "--sync-interval", "5ms")
	if err != nil {
		return nil, err
	}
	return &process{clients{d.Seq, d.Look}, d, log}, nil
}

// ready waits until the daemon answers.
func (p *process) ready(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	return p.Ready(ctx)
}
