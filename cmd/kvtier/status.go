package main

import (
	"context"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"kvtier/cmd/internal/size"
	kvtierv1 "kvtier/proto/kvtier/v1"
)

func newStatus(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "status",
		Short: "Show what the daemon holds and does",
		Args:  cobra.NoArgs,
		RunE: run(func(cmd *cobra.Command, _ []string) error {
			return a.call(cmd, func(ctx context.Context, c *client) error {
				s, err := c.GetStatus(ctx, &kvtierv1.GetStatusRequest{})
				if err != nil {
					return err
				}
				return a.print(s, func(w io.Writer) { statusTable(w, s) })
			})
		}),
	}
}

func statusTable(w io.Writer, s *kvtierv1.GetStatusResponse) {
	audit := "none yet"
	if s.GetAudits() > 0 {
		audit = fmt.Sprintf("%s, true error mean %.4f, 95%% under %.4f; stated 95%% held in %s",
			count(s.GetAudits()), s.GetAuditErrorMean(), s.GetAuditErrorP95(), share(s.GetAuditCoverage()))
	}
	rows := [][]string{
		{"daemon", fmt.Sprintf("%s, up %s", orDash(s.GetVersion()), duration(time.Duration(s.GetUptimeSeconds())*time.Second))},
		{"data", orDash(s.GetDataDir())},
		{"memory", size.Format(s.GetRssBytes()) + " resident"},
		{"sequences", fmt.Sprintf("%s, %s open, %s leases", count(s.GetSequences()), count(s.GetSequencesOpen()), count(s.GetLeases()))},
		{"tails", used(s.GetTailBytes(), s.GetTailBytesLimit())},
		{"sealing", fmt.Sprintf("%s segments wait", count(s.GetSealsPending()))},
		{"calls", fmt.Sprintf("%s attends, %s appends", count(s.GetAttends()), count(s.GetAppends()))},
		{"audits", audit},
	}
	if g := s.GetGpu(); g != nil {
		rows = append(rows, []string{"gpu", fmt.Sprintf("%s segments sealed, %s of them stayed; %s came before they were asked for, %s of them were used; %s of RAM pinned",
			count(g.GetSegmentsSealed()), count(g.GetSegmentsKept()), count(g.GetSegmentsAhead()), count(g.GetSegmentsAheadUsed()), size.Format(g.GetPinnedBytes()))})
	}
	if g := s.GetGpuAudits(); g != nil {
		rows = append(rows, []string{"gpu audits", gpuAuditsText(g)})
	}
	columns(w, rows)
	heading(w, "Tiers")
	rows = [][]string{{"TIER", "USED", "PIECES", "HITS", "READ", "WRITTEN", "EVICTED", "LATE", "DAMAGED"}}
	for _, t := range s.GetTiers() {
		rows = append(rows, []string{
			t.GetName(), used(t.GetBytesUsed(), t.GetBytesLimit()), count(t.GetPieces()),
			percent(t.GetHits(), t.GetHits()+t.GetMisses()),
			size.Format(t.GetBytesRead()), size.Format(t.GetBytesWritten()),
			count(t.GetEvictions()), count(t.GetLateReads()), count(t.GetCorruptions()),
		})
	}
	columns(w, rows)
}

// gpuAuditsText says how the GPU's answers compared with the host's, and whether it is in service.
func gpuAuditsText(g *kvtierv1.GPUAudits) string {
	text := "none yet"
	if n := g.GetCompared(); n > 0 {
		text = fmt.Sprintf("%s compared with the host, outputs within %.1e, log-sum-exps within %.1e", count(n), g.GetLargestError(), g.GetLargestLseError())
	}
	if why := g.GetGivenUp(); why != "" {
		text += "; GIVEN UP until the daemon is started again: " + why
	}
	return text
}
