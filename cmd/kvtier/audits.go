package main

import (
	"context"
	"encoding/hex"
	"fmt"
	"io"
	"strconv"

	"github.com/spf13/cobra"

	kvtierv1 "kvtier/proto/kvtier/v1"
)

const auditsHelp = `Show how well stated errors held, by model, layer and kind of budget, and with --list the
newest audits themselves.

An audit answers a call once more, from everything stored, and measures the true error of the
first answer. HELD is the share of audits whose true error was at most the 95th percentile that
was stated: about 95% if errors are stated well. OVER is the median of stated over true.

Where there is a GPU, a share of its answers is compared with the host's besides: the largest
difference is shown, and why the GPU was given up if one was larger than what it rounds.`

func newAudits(a *app) *cobra.Command {
	var list uint32
	cmd := &cobra.Command{
		Use:               "audits [SEQ]",
		Short:             "Show how well stated errors held, and the newest audits",
		Long:              auditsHelp,
		Args:              cobra.MaximumNArgs(1),
		ValidArgsFunction: a.completeSequences,
		RunE: run(func(cmd *cobra.Command, args []string) error {
			show := func(ctx context.Context, c *client, seq string) error {
				// The protocol's 0 asks for all.
				r, err := c.ListAudits(ctx, &kvtierv1.ListAuditsRequest{SequenceId: seq, Limit: max(1, list)})
				if err != nil {
					return err
				}
				if list == 0 {
					r.Audits = nil
				}
				return a.print(r, func(w io.Writer) { auditsTable(w, r) })
			}
			if len(args) == 0 {
				return a.call(cmd, func(ctx context.Context, c *client) error { return show(ctx, c, "") })
			}
			return a.withSequence(cmd, args[0], func(ctx context.Context, c *client, seq *kvtierv1.SequenceInfo) error {
				return show(ctx, c, seq.GetSequenceId())
			})
		}),
	}
	cmd.Flags().Uint32Var(&list, "list", 0, "also list so many of the newest audits")
	return cmd
}

func auditsTable(w io.Writer, r *kvtierv1.ListAuditsResponse) {
	if g := r.GetGpu(); g != nil {
		defer fmt.Fprintf(w, "\nGPU: %s\n", gpuAuditsText(g))
	}
	if len(r.GetLayers()) == 0 {
		fmt.Fprintln(w, "no audits yet")
		return
	}
	rows := [][]string{{"MODEL", "PROFILE", "BUDGET", "LAYER", "AUDITS", "HELD", "OVER", "MIDDLE", "95%"}}
	for _, l := range r.GetLayers() {
		rows = append(rows, []string{
			fingerprintText(l.GetFingerprint()), profileWord(l.GetProfile()), l.GetBudget(), count(uint64(l.GetLayer())), count(uint64(l.GetAudits())),
			share(float64(l.GetCoverage())), fmt.Sprintf("%.2f", l.GetStatedOverTrue()),
			fmt.Sprintf("x %.2f", l.GetFactorMedian()), fmt.Sprintf("x %.2f", l.GetFactorP95()),
		})
	}
	columns(w, rows)
	if len(r.GetAudits()) == 0 {
		return
	}
	heading(w, "Newest audits")
	rows = [][]string{{"NUMBER", "SEQ", "LAYER", "POSITION", "BUDGET", "READ", "ESTIMATED", "95%", "TRUE"}}
	for _, x := range r.GetAudits() {
		rows = append(rows, []string{
			count(x.GetNumber()), x.GetSequenceId(), count(uint64(x.GetLayer())), count(x.GetPosition()), budgetText(x.GetBudget()),
			share(float64(x.GetShareRead())), errorText(x.GetEstimatedError()), errorText(x.GetErrorP95()), errorText(x.GetTrueError()),
		})
	}
	columns(w, rows)
}

// fingerprintText is a fingerprint as far as people need it to tell models apart.
func fingerprintText(b []byte) string { return hex.EncodeToString(b[:min(4, len(b))]) }

func budgetText(b *kvtierv1.Budget) string {
	number := func(x float32) string { return strconv.FormatFloat(float64(x), 'g', 4, 32) }
	switch {
	case b.GetMode() == kvtierv1.AttendMode_ATTEND_MODE_TARGET:
		return "target " + number(b.GetTargetError())
	case b.GetTokens() > 0:
		return count(b.GetTokens()) + " tokens"
	}
	return "share " + number(b.GetShare())
}
