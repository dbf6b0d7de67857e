// Command kvtierd is the daemon: it stores the attention keys and values of long contexts in
// tiers, and answers attention over them.
package main

import (
	"context"
	"log/slog"
	"os"

	"kvtier/cmd/internal/buildinfo"
	"kvtier/cmd/kvtierd/internal/daemon"
	"kvtier/server"
)

func main() {
	wiring := daemon.Wiring{Open: open, GRPCOptions: server.GRPCOptions}
	os.Exit(daemon.Main(os.Args[1:], os.Stdout, os.Stderr, wiring))
}

func open(ctx context.Context, c *daemon.Config, log *slog.Logger) (daemon.Backend, error) {
	s, err := server.Open(ctx, server.Options{
		DataDir:       c.Data,
		GPUBytes:      int64(c.GPU),
		GPUDevice:     c.GPUDevice,
		RAMBytes:      int64(c.RAM),
		DiskBytes:     int64(c.Disk),
		TailBytes:     int64(c.Tail),
		ReadAllTokens: orNone(c.ReadAll),
		ReadAllInRAM:  c.ReadAllInRAM,
		DefaultShare:  c.Share,
		PromoteBytes:  int64(c.Promote),
		ReadWait:      c.ReadWait,
		AuditShare:    orNone(c.Audit),
		GPUAuditShare: orNone(c.GPUAudit),
		Steer:         c.Steer,
		SyncInterval:  c.SyncInterval,
		Logger:        log,
		Version:       buildinfo.Version(),
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
