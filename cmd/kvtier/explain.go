package main

import (
	"cmp"
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
tokens that mattered to each query head, as text if the worker stored it. Labelled spans
(files, shots of a video) come first, ranked by the attention their tokens received together.

How a token took part:
  exact      kept unquantised (the first tokens, the recent window, the open tail)
  read       its key was scanned and its value read
  scanned    its key was scanned; its value counted by a mean
  estimated  by a mean alone`

func newExplain(a *app) *cobra.Command {
	var layer, top, spans uint32
	var head int
	cmd := &cobra.Command{
		Use:               "explain SEQ --layer L",
		Short:             "Show what a layer's last query scored, read and estimated",
		Long:              explainHelp,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: a.completeSequences,
		RunE: run(func(cmd *cobra.Command, args []string) error {
			return a.withSequence(cmd, args[0], func(ctx context.Context, c *client, seq *kvtierv1.SequenceInfo) error {
				e, err := c.Explain(ctx, &kvtierv1.ExplainRequest{SequenceId: seq.GetSequenceId(), Layer: layer, Top: top, TopSpans: spans})
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
	f.Uint32Var(&spans, "spans", 16, "labelled spans to show")
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
	moved := acc.GetBytesGpu() + acc.GetBytesRam() + acc.GetBytesNvme()
	columns(w, [][]string{
		{"position", count(e.GetPosition())},
		{"mode", modeWord(acc.GetMode())},
		{"tokens", fmt.Sprintf("%s exact, %s scanned, %s read, %s estimated (sums over KV heads)",
			count(acc.GetTokensExact()), count(acc.GetTokensScanned()), count(acc.GetTokensRead()), count(acc.GetTokensEstimated()))},
		{"pages", fmt.Sprintf("%s of %s scored", count(e.GetPagesScored()), count(e.GetPagesTotal()))},
		{"leaves", fmt.Sprintf("%s read at half a bit, %s at 1, %s at 5", count(e.GetLeavesScored()), count(e.GetLeavesScanned()), count(e.GetLeavesRefined()))},
		{"values", count(e.GetValuesRead()) + " read"},
		{"bytes", fmt.Sprintf("%s of %s (%s): %s from RAM, %s from NVMe; exact zone %s",
			size.Format(moved), size.Format(acc.GetBytesFull()), percent(moved, acc.GetBytesFull()),
			size.Format(acc.GetBytesRam()), size.Format(acc.GetBytesNvme()), size.Format(acc.GetBytesExactZone()))},
		{"error", fmt.Sprintf("%s estimated, 95%% under %s (%s audits); %s of the codec%s", errorText(acc.GetEstimatedError()),
			errorText(acc.GetErrorP95()), count(uint64(acc.GetCalibrationAudits())), errorText(acc.GetCodecError()), missedText(acc))},
		{"time", fmt.Sprintf("%s: score %s, scan %s, fetch %s, exact zone %s", nanoseconds(acc.GetNsTotal()), nanoseconds(acc.GetNsScore()),
			nanoseconds(acc.GetNsScan()), nanoseconds(acc.GetNsFetch()), nanoseconds(acc.GetNsExactZone()))},
	})
	if len(e.GetSpans()) > 0 {
		explainSpans(w, e)
	}
	for _, h := range e.GetHeads() {
		explainHead(w, h)
	}
}

// explainSpans ranks labelled spans; with one head kept, by that head's attention.
func explainSpans(w io.Writer, e *kvtierv1.ExplainResponse) {
	if heads := e.GetHeads(); len(heads) == 1 && len(e.GetSpans()[0].GetHeadMass()) > 1 {
		heading(w, fmt.Sprintf("Labelled spans, by attention of query head %d", heads[0].GetQueryHead()))
		rows := [][]string{{"MASS", "TOKENS", "KIND", "LABEL"}}
		of := func(s *kvtierv1.ExplainSpan) float32 { return s.GetHeadMass()[heads[0].GetQueryHead()] }
		for _, s := range slices.SortedStableFunc(slices.Values(e.GetSpans()), func(a, b *kvtierv1.ExplainSpan) int { return cmp.Compare(of(b), of(a)) }) {
			rows = append(rows, append([]string{share(float64(of(s)))}, spanCells(s.GetSpan())...))
		}
		columns(w, rows)
		return
	}
	heading(w, fmt.Sprintf("Labelled spans, by attention; mean over query heads. In no span: %s", share(float64(e.GetMassUnlabelled()))))
	rows := [][]string{{"MASS", "EXACT", "READ", "SCANNED", "ESTIMATED", "TOKENS", "KIND", "LABEL"}}
	for _, s := range e.GetSpans() {
		rows = append(rows, append([]string{share(float64(s.GetMass())), share(float64(s.GetMassExact())), share(float64(s.GetMassRead())),
			share(float64(s.GetMassScanned())), share(float64(s.GetMassEstimated()))}, spanCells(s.GetSpan())...))
	}
	columns(w, rows)
}

func spanCells(s *kvtierv1.Span) []string {
	return []string{spanRange(s.GetStart(), s.GetEnd()), spanKindWord(s.GetKind()), orDash(s.GetLabel())}
}

// missedText says that a target was missed, after other words.
func missedText(acc *kvtierv1.Account) string {
	if acc.GetTargetMissed() {
		return "; TARGET MISSED"
	}
	return ""
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
