package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/spf13/cobra"

	"kvtier/cmd/internal/place"
)

const rootHelp = `kvtier looks at, checks and tidies what a running kvtierd holds; check and doctor also work without one.

A SEQ argument is a sequence's id, its name, or the beginning of an id if only one
sequence's id begins so.

With -o json a verb prints the protocol's messages as Protobuf's JSON mapping has them:
field names as in proto/kvtier/v1, 64-bit integers as strings, bytes as base64.

Exit codes:
  0  done, nothing wrong found
  1  damage, or another negative finding (verify, check, doctor, stored bytes that fail their checksum)
  2  usage: an unknown flag or argument, an ambiguous sequence, a layer that does not exist
  3  no daemon can be reached
  4  no such sequence
  5  the daemon answered with another error, or something could not be read (check)`

// app is what all verbs share: where to print, how to reach the daemon.
type app struct {
	in       io.Reader
	out, err io.Writer
	now      func() time.Time

	addr    string
	format  string
	timeout time.Duration
	// timeoutSet: the caller gave --timeout, so that it also holds for verbs that take long.
	timeoutSet bool
}

func newApp(in io.Reader, out, err io.Writer) *app {
	return &app{in: in, out: out, err: err, now: time.Now}
}

// defaultAddr is $KVTIER_ADDR, or the Unix socket of the default data folder.
func defaultAddr() string {
	if addr := os.Getenv("KVTIER_ADDR"); addr != "" {
		return addr
	}
	return "unix://" + place.Socket(place.DataDir())
}

func newRoot(a *app) *cobra.Command {
	root := &cobra.Command{
		Use:           "kvtier",
		Short:         "Look at, check and tidy what a kvtierd holds",
		Long:          rootHelp,
		SilenceUsage:  true,
		SilenceErrors: true,
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error {
			a.timeoutSet = cmd.Flags().Changed("timeout")
			return a.checkFlags()
		},
	}
	f := root.PersistentFlags()
	f.StringVar(&a.addr, "addr", defaultAddr(), "daemon's address: unix://PATH or HOST:PORT; KVTIER_ADDR sets the default")
	f.StringVarP(&a.format, "output", "o", "table", "output format: table or json")
	f.DurationVar(&a.timeout, "timeout", 30*time.Second, "longest wait for an answer; verify and flush wait without limit unless it is given; 0: no limit")
	root.SetIn(a.in)
	root.SetOut(a.out)
	root.SetErr(a.err)
	root.AddCommand(
		newStatus(a), newLs(a), newDescribe(a), newExplain(a), newAudits(a), newResidency(a), newVerify(a), newCheck(a),
		newDoctor(a), newDelete(a), newFlush(a), newVersion(a),
	)
	return root
}

func (a *app) checkFlags() error {
	if a.format != "table" && a.format != "json" {
		return fmt.Errorf("unknown output format %q: use -o table or -o json", a.format)
	}
	if a.timeout < 0 {
		return fmt.Errorf("--timeout %v is negative: use 0 for no limit", a.timeout)
	}
	return nil
}

// execute runs the command line and returns the exit code.
func execute(ctx context.Context, a *app, args []string) int {
	root := newRoot(a)
	root.SetArgs(args)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return exitOK
	}
	failure := a.explainError(err)
	if failure.message != "" {
		fmt.Fprintln(a.err, "kvtier: "+failure.message)
	}
	return failure.code
}

// run adapts a verb: what it returns is the daemon's or the system's error. Errors that cobra makes
// itself, for flags and arguments, stay untouched and count as usage.
func run(verb func(cmd *cobra.Command, args []string) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error {
		if err := verb(cmd, args); err != nil {
			return &verbError{err}
		}
		return nil
	}
}
