package main

import (
	"context"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	kvtierv1 "kvtier/proto/kvtier/v1"
)

func newFlush(a *app) *cobra.Command {
	var seal bool
	cmd := &cobra.Command{
		Use:   "flush SEQ",
		Short: "Make a sequence's tokens safe from a power cut",
		Long: `Wait until all accepted tokens of a sequence would survive a power cut.
With --seal also seal everything that lies behind the recent window, even a short segment.`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: a.completeSequences,
		RunE: run(func(cmd *cobra.Command, args []string) error {
			return a.callLong(cmd, onSequence(args[0], func(ctx context.Context, c *client, seq *kvtierv1.SequenceInfo) error {
				r, err := c.sequences.Flush(ctx, &kvtierv1.FlushRequest{SequenceId: seq.GetSequenceId(), Seal: seal})
				if err != nil {
					return err
				}
				return a.print(r, func(w io.Writer) {
					ack := r.GetAck()
					fmt.Fprintf(w, "flushed %s: %s tokens accepted, %s power-safe, %s sealed\n", seq.GetSequenceId(),
						count(ack.GetAccepted()), count(ack.GetPowerSafe()), count(ack.GetSealed()))
				})
			}))
		}),
	}
	cmd.Flags().BoolVar(&seal, "seal", false, "also seal what lies behind the recent window")
	return cmd
}
