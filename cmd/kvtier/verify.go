package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"kvtier/cmd/internal/size"
	kvtierv1 "kvtier/proto/kvtier/v1"
)

func newVerify(a *app) *cobra.Command {
	var quiet bool
	cmd := &cobra.Command{
		Use:   "verify [SEQ]",
		Short: "Read every stored byte and check it",
		Long: `Read every stored byte, of one sequence or of all, and check it against its checksum.
Progress goes to standard error, damage to standard output. The exit code is 1 if damage is found.`,
		Args:              cobra.MaximumNArgs(1),
		ValidArgsFunction: a.completeSequences,
		RunE: run(func(cmd *cobra.Command, args []string) error {
			return a.callLong(cmd, func(ctx context.Context, c *client) error {
				return a.verify(ctx, c, args, quiet)
			})
		}),
	}
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "no progress")
	return cmd
}

func (a *app) verify(ctx context.Context, c *client, args []string, quiet bool) error {
	req := &kvtierv1.VerifyRequest{}
	if len(args) == 1 {
		seq, err := c.resolve(ctx, args[0])
		if err != nil {
			return err
		}
		req.SequenceId = seq.GetSequenceId()
	}
	last, err := a.followVerify(ctx, c, req, newProgress(a, quiet))
	if err != nil {
		return err
	}
	if err := a.print(last, func(w io.Writer) { verifyTable(w, last) }); err != nil {
		return err
	}
	if len(last.GetDamage()) > 0 {
		return &failure{code: exitFinding}
	}
	return nil
}

// followVerify reads the stream to its end and returns the last report.
func (a *app) followVerify(ctx context.Context, c *client, req *kvtierv1.VerifyRequest, p *progress) (*kvtierv1.VerifyResponse, error) {
	stream, err := c.Verify(ctx, req)
	if err != nil {
		return nil, err
	}
	defer p.end()
	var last *kvtierv1.VerifyResponse
	for {
		r, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, err
		}
		last = r
		p.show(r)
	}
	// A stream that merely stops is no proof that everything was read.
	if !last.GetFinished() {
		return nil, failf(exitServer, "the daemon stopped before everything was checked: run 'kvtier verify' again")
	}
	return last, nil
}

func verifyTable(w io.Writer, r *kvtierv1.VerifyResponse) {
	for _, line := range r.GetDamage() {
		fmt.Fprintln(w, "DAMAGED", printable(line))
	}
	verdict := "no damage"
	if n := len(r.GetDamage()); n > 0 {
		verdict = fmt.Sprintf("%d damaged", n)
	}
	fmt.Fprintf(w, "checked %s in %s segments: %s\n", size.Format(r.GetBytesDone()), count(r.GetSegmentsDone()), verdict)
}

// progress writes how far a check is: over one line on a terminal, else a line now and then.
type progress struct {
	a        *app
	quiet    bool
	terminal bool
	start    time.Time
	next     time.Time
	drawn    bool
}

func newProgress(a *app, quiet bool) *progress {
	now := a.now()
	return &progress{a: a, quiet: quiet, terminal: isTerminal(a.err), start: now, next: now}
}

func (p *progress) show(r *kvtierv1.VerifyResponse) {
	now := p.a.now()
	if p.quiet || (now.Before(p.next) && !r.GetFinished()) {
		return
	}
	line := fmt.Sprintf("verify: %s of %s (%s), %s segments, %d damaged", size.Format(r.GetBytesDone()), size.Format(r.GetBytesTotal()),
		percent(r.GetBytesDone(), r.GetBytesTotal()), count(r.GetSegmentsDone()), len(r.GetDamage()))
	if s := now.Sub(p.start).Seconds(); s >= 1 {
		line += fmt.Sprintf(", %s/s", size.Format(uint64(float64(r.GetBytesDone())/s)))
	}
	if p.terminal {
		fmt.Fprintf(p.a.err, "\r\x1b[K%s", line)
		p.next, p.drawn = now.Add(100*time.Millisecond), true
		return
	}
	fmt.Fprintln(p.a.err, line)
	p.next = now.Add(5 * time.Second)
}

// end leaves the line, so that what follows starts on its own.
func (p *progress) end() {
	if p.drawn {
		fmt.Fprintln(p.a.err)
	}
}
