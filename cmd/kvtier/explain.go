package main

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strconv"

	"github.com/spf13/cobra"

	"kvtier/cmd/internal/size"
	kvtierv1 "kvtier/proto/kvtier/v1"
)

const explainHelp = `Show what the last query of a layer did: what was scored, read and estimated, and the
tokens that mattered to each query head, as text if the worker stored it.

How a token took part:
  exact      kept unquantised (the first tokens, the recent window, the open tail)
  read       its key was scanned and its value read
  scanned    its key was scanned; its value counted by a summary
  estimated  by a summary alone`

func newExplain(a *app) *cobra.Command {
	var layer, top uint32
	var head int
	cmd := &cobra.Command{
		Use:               "explain SEQ --layer L",
		Short:             "Show what a layer's last query scored, read and estimated",
		Long:              explainHelp,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: a.completeSequences,
		RunE: run(func(cmd *cobra.Command, args []string) error {
			return a.withSequence(cmd, args[0], func(ctx context.Context, c *client, seq *kvtierv1.SequenceInfo) error {
				e, err := c.Explain(ctx, &kvtierv1.ExplainRequest{SequenceId: seq.GetSequenceId(), Layer: layer, Top: top})
				if err != nil {
					return err
				}
				if err := keepHead(e, head); err != nil {
					return err
				}
				return a.print(e, func(w io.Writer) { explainTable(w, e) })
			})
		}),
	}
	f := cmd.Flags()
	f.Uint32Var(&layer, "layer", 0, "the layer, from 0 (required)")
	f.IntVar(&head, "head", -1, "only this query head; -1: all")
	f.Uint32Var(&top, "top", 16, "tokens to show for each query head")
	_ = cmd.MarkFlagRequired("layer")
	return cmd
}

// keepHead drops all heads of e but one; -1 keeps all.
func keepHead(e *kvtierv1.ExplainResponse, head int) error {
	if head == -1 {
		return nil
	}
	all := len(e.GetHeads())
	e.Heads = slices.DeleteFunc(e.GetHeads(), func(h *kvtierv1.ExplainHead) bool { return int(h.GetQueryHead()) != head })
	if len(e.GetHeads()) == 0 {
		return failf(exitUsage, "there is no query head %d: the layer has %d, counted from 0", head, all)
	}
	return nil
}

func explainTable(w io.Writer, e *kvtierv1.ExplainResponse) {
	acc := e.GetAccount()
	moved := acc.GetBytesRam() + acc.GetBytesNvme()
	columns(w, [][]string{
		{"position", count(e.GetPosition())},
		{"mode", modeWord(acc.GetMode())},
		{"tokens", fmt.Sprintf("%s exact, %s scanned, %s read, %s estimated (sums over KV heads)",
			count(acc.GetTokensExact()), count(acc.GetTokensScanned()), count(acc.GetTokensRead()), count(acc.GetTokensEstimated()))},
		{"pages", fmt.Sprintf("%s of %s scored", count(e.GetPagesScored()), count(e.GetPagesTotal()))},
		{"leaves", fmt.Sprintf("%s scored, %s scanned, %s refined", count(e.GetLeavesScored()), count(e.GetLeavesScanned()), count(e.GetLeavesRefined()))},
		{"values", count(e.GetValuesRead()) + " read"},
		{"bytes", fmt.Sprintf("%s of %s (%s): %s from RAM, %s from NVMe; exact zone %s",
			size.Format(moved), size.Format(acc.GetBytesFull()), percent(moved, acc.GetBytesFull()),
			size.Format(acc.GetBytesRam()), size.Format(acc.GetBytesNvme()), size.Format(acc.GetBytesExactZone()))},
		{"error", fmt.Sprintf("%s estimated, %s of the codec", errorText(acc.GetEstimatedError()), errorText(acc.GetCodecError()))},
		{"time", fmt.Sprintf("%s: score %s, scan %s, fetch %s, exact zone %s", nanoseconds(acc.GetNsTotal()), nanoseconds(acc.GetNsScore()),
			nanoseconds(acc.GetNsScan()), nanoseconds(acc.GetNsFetch()), nanoseconds(acc.GetNsExactZone()))},
	})
	for _, h := range e.GetHeads() {
		explainHead(w, h)
	}
}

func explainHead(w io.Writer, h *kvtierv1.ExplainHead) {
	heading(w, fmt.Sprintf("Query head %d: attention mass %s exact, %s read, %s scanned, %s estimated; true error %s", h.GetQueryHead(),
		share(float64(h.GetMassExact())), share(float64(h.GetMassRead())), share(float64(h.GetMassScanned())),
		share(float64(h.GetMassEstimated())), errorText(h.GetTrueError())))
	rows := [][]string{{"POSITION", "WEIGHT", "HOW", "ID", "TEXT", "LABEL"}}
	for _, t := range h.GetTokens() {
		text := "-"
		if len(t.GetText()) > 0 {
			text = strconv.QuoteToGraphic(string(t.GetText()))
		}
		rows = append(rows, []string{
			count(t.GetPosition()), share(float64(t.GetWeight())), orDash(t.GetHow()),
			strconv.FormatUint(t.GetTokenId(), 10), text, orDash(t.GetLabel()),
		})
	}
	columns(w, rows)
}
