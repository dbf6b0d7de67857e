package main

import (
	"fmt"
	"io"
	"strconv"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"kvtier/bench/planted"
)

const plantedHelp = `Plant answers in synthetic contexts of keys and values and see what sparse answers retain.

No model takes part: keys, values and queries are made up, with the clusters, spectra, sinks and
sharpness of real ones ('go doc kvtier/bench/planted' says how). Tasks are RULER's kinds: one needle, one among
distractors, four equal ones, a needle a head, chains of four hops that follow their own answers,
and the ranking of classes of words. Segments are sealed and answered by the project's own path.

Budgets are shares of the bytes that all sealed tokens take at 4 bits.`

type plantedFlags struct {
	tokens      []int
	shapes      []string
	budgets     []float64
	samples     int
	seed        uint64
	weight      string
	comparators bool
	json        bool
}

func plantedVerb() *cobra.Command {
	f := plantedFlags{}
	cmd := &cobra.Command{
		Use:   "planted [flags]",
		Short: "Plant answers in synthetic keys and values, at any length, and see what is retained",
		Long:  plantedHelp,
		Example: `  kvbench planted
  kvbench planted --tokens 32768,262144 --shapes 64x3 --budgets .1 --json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return f.run(cmd) },
	}
	p := cmd.Flags()
	p.IntSliceVar(&f.tokens, "tokens", []int{131072}, "lengths of the contexts")
	p.StringSliceVar(&f.shapes, "shapes", []string{"128x4", "64x3"}, "head dimension x query heads a KV head")
	p.Float64SliceVar(&f.budgets, "budgets", []float64{.05, .1, .2}, "shares of the bytes at 4 bits, each in (0, 1]")
	p.IntVar(&f.samples, "samples", 16, "questions a task")
	p.Uint64Var(&f.seed, "seed", 1, "of all that is random")
	p.StringVar(&f.weight, "weight", ".3:.6", "share of the softmax that falls on what is looked for, from:to")
	p.BoolVar(&f.comparators, "comparators", true, "compare with Quest's blocks, a window and an oracle at equal bytes")
	p.BoolVar(&f.json, "json", false, "print JSON")
	return cmd
}

func (f *plantedFlags) run(cmd *cobra.Command) error {
	shapes, err := parseShapes(f.shapes)
	if err != nil {
		return err
	}
	low, high, err := parseSpan(f.weight)
	if err != nil {
		return err
	}
	say := sayer(cmd, "planted")
	reports := []*planted.Report{}
	for _, tokens := range f.tokens {
		for _, shape := range shapes {
			rep, err := planted.Run(cmd.Context(), planted.Options{Shape: shape, Tokens: tokens, Samples: f.samples,
				WeightLow: low, WeightHigh: high, Seed: f.seed}, f.budgets, f.comparators, say)
			if err != nil {
				return err
			}
			if !f.json {
				printPlanted(cmd.OutOrStdout(), rep)
			}
			reports = append(reports, rep)
		}
	}
	if !f.json {
		return nil
	}
	return printJSON(cmd.OutOrStdout(), reports)
}

// parseShapes reads shapes such as 128x4.
func parseShapes(texts []string) (out []planted.Shape, err error) {
	for _, t := range texts {
		d, g, ok := strings.Cut(t, "x")
		dim, err1 := strconv.Atoi(d)
		group, err2 := strconv.Atoi(g)
		if !ok || err1 != nil || err2 != nil {
			return nil, fmt.Errorf("shape %q: write it as head dimension x query heads, as in 128x4", t)
		}
		out = append(out, planted.Shape{HeadDim: dim, Group: group})
	}
	return out, nil
}

// parseSpan reads two numbers with a colon between them.
func parseSpan(text string) (from, to float64, err error) {
	a, b, ok := strings.Cut(text, ":")
	from, err1 := strconv.ParseFloat(a, 64)
	to, err2 := strconv.ParseFloat(b, 64)
	if !ok || err1 != nil || err2 != nil {
		return 0, 0, fmt.Errorf("weight %q: write it as from:to, as in .3:.6", text)
	}
	return from, to, nil
}

// printPlanted writes one context's table.
func printPlanted(w io.Writer, rep *planted.Report) {
	c := rep.Context
	fmt.Fprintf(w, "%d synthetic tokens, head dimension %d, %d query heads; %d sealed; %d samples a task, seed %d\n",
		rep.Tokens, rep.Shape.HeadDim, rep.Shape.Group, rep.Sealed, rep.Samples, rep.Seed)
	fmt.Fprintf(w, "weight on what was looked for %.2f (%.2f to %.2f); norm of queries that look %.2f of ordinary ones'; ordinary weight on the top 1 %% %.2f, 10 %% %.2f; keys vary in %.0f directions\n\n",
		c.WeightMean, c.WeightLeast, c.WeightMost, c.QueryNorm, c.Top1, c.Top10, c.KeyRank)
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, "task\tmethod\tbudget\tbytes\tretained\t95 %\tof\tplanted weight read\tstrong (>10 %) unread\terror\tp95\tLSE error\tstated\ttrue\tstated/true\t")
	for _, r := range rep.Rows {
		fmt.Fprintf(tw, "%s\t%s\t%.2f\t%.3f\t%s\t%s\t%s\t%.4f\t%.3f\t%.3f\t%s\n", r.Task, r.Method, r.Budget, r.Bytes,
			plantedRetained(r), plantedRead(r), plantedStrong(r.Strong[0]), r.ErrorMean, r.ErrorP95, r.LSEError, plantedStated(r))
	}
	tw.Flush()
	fmt.Fprintln(w)
}

func plantedRetained(r planted.Row) string {
	if r.Right == 0 {
		return "-\t-\t-"
	}
	return fmt.Sprintf("%.1f%%\t%.0f-%.0f%%\t%d", 100*r.Retention, 100*r.RetentionCI[0], 100*r.RetentionCI[1], r.Right)
}

func plantedRead(r planted.Row) string {
	if r.Task == planted.Ordinary {
		return "-"
	}
	return fmt.Sprintf("%.3f", r.PlantedRead)
}

func plantedStrong(s planted.Strong) string {
	return fmt.Sprintf("%d/%d", s.Unread, s.Tokens)
}

func plantedStated(r planted.Row) string {
	if r.True == 0 {
		return "-\t-\t-\t"
	}
	return fmt.Sprintf("%.4f\t%.4f\t%.2f\t", r.Stated, r.True, r.StatedPerTrue)
}
