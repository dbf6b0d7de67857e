// Command kvtierd is the daemon: it stores the attention keys and values of long contexts in
// tiers, and answers attention over them.
package main

import (
	"context"
	"log/slog"
	"os"
	"runtime"

	"kvtier/cmd/internal/buildinfo"
	"kvtier/cmd/kvtierd/internal/daemon"
	"kvtier/server"
)

func main() {
	cores := spread()
	open := func(ctx context.Context, c *daemon.Config, log *slog.Logger) (daemon.Backend, error) {
		return open(ctx, c, log, cores)
	}
	wiring := daemon.Wiring{Open: open, GRPCOptions: server.GRPCOptions}
	os.Exit(daemon.Main(os.Args[1:], os.Stdout, os.Stderr, wiring))
}

// On how many threads the Go runtime runs goroutines. With one for each core, the few goroutines of a call that computes for seconds
// hold them all: others wait for 10 ms each time that they want to go on, and nobody looks at the network meanwhile.
// With more threads than such a call takes (a goroutine for each of 8 KV heads) the kernel shares the cores, and lets who slept go first.
const (
	threadsPerCore = 4
	leastThreads   = 16
)

// spread sees to that, unless the environment says otherwise, and returns how many cores there are.
func spread() (cores int) {
	cores = runtime.GOMAXPROCS(0)
	if os.Getenv("GOMAXPROCS") == "" {
		runtime.GOMAXPROCS(max(threadsPerCore*cores, leastThreads))
	}
	return cores
}

func open(ctx context.Context, c *daemon.Config, log *slog.Logger, cores int) (daemon.Backend, error) {
	s, err := server.Open(ctx, server.Options{
		Cores:          cores,
		DataDir:        c.Data,
		GPUBytes:       int64(c.GPU),
		GPUDevice:      c.GPUDevice,
		GPUChooseAbove: c.GPUChooseAbove,
		NoPrefetch:     !c.GPUPrefetch,
		SealOnHost:     !c.GPUSeal,
		RAMBytes:       int64(c.RAM),
		DiskBytes:      int64(c.Disk),
		TailBytes:      int64(c.Tail),
		ReadAllTokens:  orNone(c.ReadAll),
		ReadAllInRAM:   c.ReadAllInRAM,
		ByPage:         c.ByPage,
		DefaultShare:   c.Share,
		PromoteBytes:   int64(c.Promote),
		ReadWait:       c.ReadWait,
		AuditShare:     orNone(c.Audit),
		GPUAuditShare:  orNone(c.GPUAudit),
		Steer:          c.Steer,
		SyncInterval:   c.SyncInterval,
		Logger:         log,
		Version:        buildinfo.Version(),
	})
	if err != nil {
		return nil, err
	}
	return s, nil
}

// orNone turns the 0 that a person gives into what the server's options mean by none: there, 0 is
// the default.
func orNone[T int | float32](x T) T {
	if x == 0 {
		return -1
	}
	return x
}
