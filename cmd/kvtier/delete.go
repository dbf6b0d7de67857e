package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	kvtierv1 "kvtier/proto/kvtier/v1"
)

func newDelete(a *app) *cobra.Command {
	var yes bool
	cmd := &cobra.Command{
		Use:   "delete SEQ",
		Short: "Delete a sequence and what only it holds",
		Long: `Delete a sequence and the stored bytes that no other sequence refers to. It cannot be undone.
On a terminal the command asks first, unless --yes is given.`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: a.completeSequences,
		RunE: run(func(cmd *cobra.Command, args []string) error {
			seq, err := a.find(cmd, args[0])
			if err != nil {
				return err
			}
			if !yes && !a.confirm(seq) {
				return failf(exitUsage, "nothing was deleted")
			}
			return a.call(cmd, func(ctx context.Context, c *client) error {
				r, err := c.sequences.DeleteSequence(ctx, &kvtierv1.DeleteSequenceRequest{SequenceId: seq.GetSequenceId()})
				if err != nil {
					return err
				}
				return a.print(r, func(w io.Writer) { fmt.Fprintln(w, "deleted", seq.GetSequenceId()) })
			})
		}),
	}
	cmd.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	return cmd
}

// find is resolve with a connection of its own: the time a person takes to answer must not count
// against the call's limit.
func (a *app) find(cmd *cobra.Command, arg string) (*kvtierv1.SequenceInfo, error) {
	var seq *kvtierv1.SequenceInfo
	err := a.withSequence(cmd, arg, func(_ context.Context, _ *client, s *kvtierv1.SequenceInfo) error {
		seq = s
		return nil
	})
	return seq, err
}

// confirm asks on a terminal; as with rm, a script is taken at its word.
func (a *app) confirm(seq *kvtierv1.SequenceInfo) bool {
	if !isTerminal(a.in) {
		return true
	}
	fmt.Fprintf(a.err, "delete sequence %s (%s, %s tokens)? [y/N] ", seq.GetSequenceId(),
		orDash(seq.GetName()), count(seq.GetAck().GetAccepted()))
	answer, _ := bufio.NewReader(a.in).ReadString('\n')
	answer = strings.ToLower(strings.TrimSpace(answer))
	return answer == "y" || answer == "yes"
}
