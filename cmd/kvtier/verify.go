package main

import (
	"context"
	"errors"
	"fmt"
	"io"

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
	last, err := a.followVerify(ctx, c, req, newProgress(a, "verify", quiet))
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
		p.show(r.GetBytesDone(), r.GetBytesTotal(), r.GetFinished(), fmt.Sprintf("%s segments, %d damaged", count(r.GetSegmentsDone()), len(r.GetDamage())))
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
