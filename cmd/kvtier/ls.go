package main

import (
	"context"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"kvtier/cmd/internal/size"
	kvtierv1 "kvtier/proto/kvtier/v1"
)

func newLs(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "ls",
		Short: "List the sequences",
		Args:  cobra.NoArgs,
		RunE: run(func(cmd *cobra.Command, _ []string) error {
			return a.call(cmd, func(ctx context.Context, c *client) error {
				list, err := c.ListSequences(ctx, &kvtierv1.ListSequencesRequest{})
				if err != nil {
					return err
				}
				return a.print(list, func(w io.Writer) { a.lsTable(w, list.GetSequences()) })
			})
		}),
	}
}

func (a *app) lsTable(w io.Writer, list []*kvtierv1.SequenceInfo) {
	if len(list) == 0 {
		fmt.Fprintln(w, "no sequences")
		return
	}
	rows := [][]string{{"ID", "NAME", "TOKENS", "SEALED", "STORED", "PROFILE", "USED", "STATE"}}
	for _, s := range list {
		rows = append(rows, []string{
			s.GetSequenceId(), orDash(s.GetName()),
			count(s.GetAck().GetAccepted()), count(s.GetAck().GetSealed()),
			size.Format(s.GetSealedBytes()), profileWord(s.GetProfile()),
			a.age(s.GetUsedUnix()), stateWord(s),
		})
	}
	columns(w, rows)
}

func stateWord(s *kvtierv1.SequenceInfo) string {
	switch {
	case s.GetDamage() != "":
		return "DAMAGED"
	case s.GetOpen():
		return "open"
	}
	return "closed"
}

// completeSequences offers ids to the shell; a daemon that does not answer offers nothing.
func (a *app) completeSequences(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	var ids []string
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	_ = a.call(cmd, func(ctx context.Context, c *client) error {
		list, err := c.ListSequences(ctx, &kvtierv1.ListSequencesRequest{})
		for _, s := range list.GetSequences() {
			ids = append(ids, cobra.CompletionWithDesc(s.GetSequenceId(), printable(s.GetName())))
		}
		return err
	})
	return ids, cobra.ShellCompDirectiveNoFileComp
}
