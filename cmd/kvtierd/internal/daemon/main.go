package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"runtime"
	"strings"
	"syscall"

	"github.com/spf13/pflag"

	"kvtier/attention/kernels"
	"kvtier/cmd/internal/buildinfo"
)

// Exit codes, as the help has them.
const (
	exitOK = iota
	exitFailure
	exitUsage
)

// Main runs kvtierd with the command line args and returns its exit code. The first SIGTERM or
// SIGINT shuts down in order; a second one ends the process at once.
func Main(args []string, stdout, stderr io.Writer, w Wiring) int {
	c, do, err := load(args, os.Environ(), stdout)
	switch {
	case errors.Is(err, pflag.ErrHelp):
		return exitOK
	case err != nil:
		for line := range strings.Lines(err.Error()) {
			fmt.Fprintf(stderr, "kvtierd: %s\n", strings.TrimSpace(line))
		}
		return exitUsage
	case do.version:
		fmt.Fprintf(stdout, "kvtierd %s (%s, %s/%s)\n", buildinfo.Version(), runtime.Version(), runtime.GOOS, runtime.GOARCH)
		return exitOK
	case do.printConfig:
		c.print(stdout)
		return exitOK
	}
	loops, err := kernels.Active()
	if err != nil {
		fmt.Fprintf(stderr, "kvtierd: %v\n", err)
		return exitUsage
	}
	log := newLogger(stderr, c)
	for _, warning := range c.Warnings {
		log.Warn(warning)
	}
	ctx, stop := untilSignal()
	defer stop()
	log.Info("starting", "version", buildinfo.Version(), "data", c.Data, "config", c.File, "kernels", loops, "pid", os.Getpid())
	if err := run(ctx, c, log, w); err != nil {
		log.Error("kvtierd failed", "error", err)
		return exitFailure
	}
	return exitOK
}

// untilSignal returns a context that ends with the first SIGINT or SIGTERM. Before that is seen the default holds again, so that the next one kills.
func untilSignal() (ctx context.Context, stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	go func() {
		select {
		case <-signals:
		case <-ctx.Done():
		}
		signal.Stop(signals)
		cancel()
	}()
	return ctx, cancel
}

func newLogger(w io.Writer, c *Config) *slog.Logger {
	opts := &slog.HandlerOptions{Level: c.LogLevel}
	if c.LogFormat == "json" {
		return slog.New(slog.NewJSONHandler(w, opts))
	}
	return slog.New(slog.NewTextHandler(w, opts))
}
