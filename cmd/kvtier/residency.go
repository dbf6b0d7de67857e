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

func newResidency(a *app) *cobra.Command {
	var width int
	cmd := &cobra.Command{
		Use:   "residency SEQ",
		Short: "Show which parts of a sequence lie in RAM",
		Long: `Show where a sequence's planes lie: a table of planes, and for each layer a strip with the
sealed spans from first to last. A cell says which share of its pieces lies in RAM.`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: a.completeSequences,
		PreRunE: func(*cobra.Command, []string) error {
			if width < 1 {
				return fmt.Errorf("--width %d: a strip needs at least one cell", width)
			}
			return nil
		},
		RunE: run(func(cmd *cobra.Command, args []string) error {
			return a.withSequence(cmd, args[0], func(ctx context.Context, c *client, seq *kvtierv1.SequenceInfo) error {
				r, err := c.Residency(ctx, &kvtierv1.ResidencyRequest{SequenceId: seq.GetSequenceId()})
				if err != nil {
					return err
				}
				return a.print(r, func(w io.Writer) { residencyTable(w, r, width) })
			})
		}),
	}
	cmd.Flags().IntVar(&width, "width", 64, "largest number of cells in a strip")
	return cmd
}

func residencyTable(w io.Writer, r *kvtierv1.ResidencyResponse, width int) {
	if len(r.GetPlanes()) == 0 {
		fmt.Fprintln(w, "nothing is sealed yet: all tokens lie unquantised in RAM")
		return
	}
	rows := [][]string{{"PLANE", "TOTAL", "RAM", "NVME", "IN RAM"}}
	var sum kvtierv1.PlaneResidency
	for _, p := range r.GetPlanes() {
		rows = append(rows, planeRow(p))
		sum.BytesTotal += p.GetBytesTotal()
		sum.BytesRam += p.GetBytesRam()
		sum.BytesNvme += p.GetBytesNvme()
	}
	sum.Plane = "all"
	columns(w, append(rows, planeRow(&sum)))
	heading(w, "Layers, first span to last (· none in RAM, ░ ▒ ▓ a part, █ all)")
	for _, l := range r.GetLayers() {
		fmt.Fprintf(w, "%4d [%s] %s\n", l.GetLayer(), strip(l.GetRamShare(), width), share(mean(l.GetRamShare())))
	}
}

func planeRow(p *kvtierv1.PlaneResidency) []string {
	return []string{p.GetPlane(), size.Format(p.GetBytesTotal()), size.Format(p.GetBytesRam()),
		size.Format(p.GetBytesNvme()), percent(p.GetBytesRam(), p.GetBytesTotal())}
}

// strip draws shares as one cell each, or as the mean of neighbours if there are more than width.
func strip(shares []float32, width int) string {
	cells := min(len(shares), width)
	var b strings.Builder
	for i := range cells {
		b.WriteRune(cell(mean(shares[i*len(shares)/cells : (i+1)*len(shares)/cells])))
	}
	return b.String()
}

// cell keeps its two ends for exactly none and exactly all, so that a lone miss stays visible.
func cell(x float64) rune {
	switch {
	case x <= 0:
		return '·'
	case x < 1.0/3:
		return '░'
	case x < 2.0/3:
		return '▒'
	case x < 1:
		return '▓'
	}
	return '█'
}

func mean(xs []float32) float64 {
	if len(xs) == 0 {
		return 0
	}
	sum := 0.0
	for _, x := range xs {
		sum += float64(x)
	}
	return sum / float64(len(xs))
}
