package main

import (
	"context"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"kvtier/cmd/internal/size"
	kvtierv1 "kvtier/proto/kvtier/v1"
)

func newDescribe(a *app) *cobra.Command {
	var ids bool
	cmd := &cobra.Command{
		Use:               "describe SEQ",
		Short:             "Show a sequence: its model, its sealed spans, its labels",
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: a.completeSequences,
		RunE: run(func(cmd *cobra.Command, args []string) error {
			return a.withSequence(cmd, args[0], func(ctx context.Context, c *client, seq *kvtierv1.SequenceInfo) error {
				d, err := c.DescribeSequence(ctx, &kvtierv1.DescribeSequenceRequest{SequenceId: seq.GetSequenceId(), TokenIds: ids})
				if err != nil {
					return err
				}
				return a.print(d, func(w io.Writer) { a.describeTable(w, d) })
			})
		}),
	}
	cmd.Flags().BoolVar(&ids, "ids", false, "also print the token ids")
	return cmd
}

func (a *app) describeTable(w io.Writer, d *kvtierv1.DescribeSequenceResponse) {
	a.describeHead(w, d)
	if len(d.GetSealed()) > 0 {
		heading(w, "Sealed spans")
		columns(w, sealedRows(d.GetSealed()))
	}
	if len(d.GetSpans()) > 0 {
		heading(w, "Labels")
		rows := [][]string{{"TOKENS", "KIND", "LABEL"}}
		for _, s := range d.GetSpans() {
			rows = append(rows, []string{spanRange(s.GetStart(), s.GetEnd()), spanKindWord(s.GetKind()), orDash(s.GetLabel())})
		}
		columns(w, rows)
	}
	if len(d.GetTokenIds()) > 0 {
		heading(w, "Token ids")
		fmt.Fprintln(w, strings.Trim(fmt.Sprint(d.GetTokenIds()), "[]"))
	}
}

func (a *app) describeHead(w io.Writer, d *kvtierv1.DescribeSequenceResponse) {
	info, ack := d.GetInfo(), d.GetInfo().GetAck()
	rows := [][]string{
		{"id", info.GetSequenceId()},
		{"name", orDash(info.GetName())},
		{"state", stateWord(info)},
		{"parent", orDash(info.GetParentId())},
		{"created", a.age(info.GetCreatedUnix())},
		{"used", a.age(info.GetUsedUnix())},
		{"tokens", fmt.Sprintf("%s accepted, %s crash-safe, %s power-safe, %s sealed",
			count(ack.GetAccepted()), count(ack.GetCrashSafe()), count(ack.GetPowerSafe()), count(ack.GetSealed()))},
		{"exact until", fmt.Sprintf("%s (later tokens come from sparse attention)", count(d.GetExactUntil()))},
		{"profile", profileWord(info.GetProfile())},
		{"stored", size.Format(info.GetSealedBytes())},
		{"model", modelText(d.GetSpec())},
	}
	if d.GetExactUntil() >= ack.GetAccepted() {
		rows[7][1] = "the end"
	}
	if info.GetDamage() != "" {
		rows = append(rows, []string{"DAMAGE", printable(info.GetDamage())})
	}
	columns(w, rows)
}

func modelText(m *kvtierv1.ModelSpec) string {
	sliding := 0
	for _, k := range m.GetLayerKinds() {
		if k.GetSlidingWindow() > 0 {
			sliding++
		}
	}
	if len(m.GetLayerKinds()) == 1 {
		sliding *= int(m.GetLayers())
	}
	text := fmt.Sprintf("%d layers (%d sliding), %d query heads, %d KV heads, head dim %d, %s",
		m.GetLayers(), sliding, m.GetQueryHeads(), m.GetKvHeads(), m.GetHeadDim(), dtypeWord(m.GetKvDtype()))
	if m.GetSoftcap() > 0 {
		text += fmt.Sprintf(", softcap %g", m.GetSoftcap())
	}
	if len(m.GetSinkLogits()) > 0 {
		text += ", learned sinks"
	}
	return text
}

func sealedRows(spans []*kvtierv1.SealedSpan) [][]string {
	rows := [][]string{{"TOKENS", "USED", "BYTES", "BITS/VALUE", "LOW PLANES", "SHARED BY", "SPAN"}}
	for _, s := range spans {
		id := fmt.Sprintf("%x", s.GetSpanId())
		rows = append(rows, []string{
			spanRange(s.GetStart(), s.GetStart()+s.GetTokens()),
			percent(s.GetLimit(), s.GetTokens()), size.Format(s.GetBytes()),
			fmt.Sprintf("%.2f", s.GetBitsPerValue()), yesNo(s.GetLowPlanes()),
			count(uint64(s.GetReferences())), id[:min(len(id), 12)],
		})
	}
	return rows
}
