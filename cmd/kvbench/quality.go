package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"kvtier/bench/quality"
	"kvtier/tiers"
)

const qualityHelp = `Answer the last positions of dumped layers by kvtier's own path and by what it is compared with,
at the same bytes and on the same codes, and compare with exact attention in float64.

A dump is one .npz a layer with the arrays q [queries, q heads, head_dim] (the last positions),
k and v [tokens, kv heads, head_dim], and optionally q_sample [m, q heads, head_dim] with
q_sample_pos [m] (earlier queries): float32 or float16, after RoPE, queries not scaled.
'python -m kvtier.capture' makes them. All tokens but the first 16, and the 256 before the first
query, are sealed; the metric in which they are grouped is made of queries before the seal only.

Methods: kvtier (line by line, as 'kvtierd --by-page=false' answers); pages (whole pages, as kvtierd answers by itself: it
lets them read three times its budget, here a share is of what is read); gpu (what a GPU does that chooses pages, in plain
Go: the share is of the pages; only if it is named, profile balanced); oracle (tokens of the largest true weight, found for nothing); quest16 (blocks of
16 by min/max bounds); mean16 (blocks of 16 by mean key); streaming (first and newest tokens);
k4v4 (everything at 4 bits); exact (everything that the profile stores).`

func newQuality() *cobra.Command {
	var (
		dumps, profile, svg, layers string
		asJSON                      bool
		o                           quality.Options
	)
	cmd := &cobra.Command{
		Use:   "quality --dump 'DIR/*.npz'",
		Short: "Error, strong tokens and bytes of sparse answers on dumps of real models",
		Long:  qualityHelp,
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			files, err := dumpFiles(dumps)
			if err != nil {
				return err
			}
			if o.Profile, err = profileOf(profile); err != nil {
				return err
			}
			for _, s := range o.Shares {
				if !(s > 0 && s <= 1) {
					return fmt.Errorf("--shares: %v is not in (0, 1]", s)
				}
			}
			if o.Step < 1 {
				return errors.New("--step has to be 1 or more")
			}
			o.Progress = func(done, of int) { fmt.Fprintf(cmd.ErrOrStderr(), "\r%d/%d layers", done, of) }
			results, err := quality.Measure(cmd.Context(), files, o)
			fmt.Fprintln(cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			if svg != "" {
				if err := os.WriteFile(svg, quality.Curves(results), 0o644); err != nil {
					return err
				}
			}
			if asJSON {
				return printJSON(cmd.OutOrStdout(), results)
			}
			return printQuality(cmd.OutOrStdout(), results, layers != "")
		},
	}
	f := cmd.Flags()
	f.StringVar(&dumps, "dump", "", "pattern of .npz files, one a layer")
	f.StringVar(&profile, "profile", "balanced", "balanced, neutral or exact")
	f.Float64SliceVar(&o.Shares, "shares", []float64{.05, .1, .15, .2, .3}, "budgets: shares of the sealed body's 4-bit bytes")
	f.IntVar(&o.Step, "step", 4, "ask every so many of a dump's queries")
	f.StringSliceVar(&o.Methods, "methods", nil, "methods to run (default all)")
	f.Float64Var(&o.Scale, "scale", 0, "factor on q.k (default 1/sqrt(head_dim))")
	f.StringVar(&svg, "svg", "", "write curves of error against bytes to this file")
	f.StringVar(&layers, "by", "", "'layer': also print errors by layer")
	f.BoolVar(&asJSON, "json", false, "print JSON")
	_ = cmd.MarkFlagRequired("dump")
	return cmd
}

func profileOf(name string) (tiers.Profile, error) {
	p, ok := map[string]tiers.Profile{"balanced": tiers.ProfileBalanced, "neutral": tiers.ProfileNeutral, "exact": tiers.ProfileExact}[name]
	if !ok {
		return 0, fmt.Errorf("--profile %q: balanced, neutral or exact", name)
	}
	return p, nil
}

func printQuality(w io.Writer, results []quality.Result, byLayer bool) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, "method\tbudget\tRAM\tdisk\terror\tp95\tp99\tmax\tstated\tKL\tstrong >10%\tunread\t>3%\tunread\t")
	for _, r := range results {
		stated := "-"
		if r.Stated != nil {
			stated = fmt.Sprintf("%.4f", *r.Stated)
		}
		fmt.Fprintf(t, "%s\t%.2f\t%.3f\t%.3f\t%.4f\t%.3f\t%.3f\t%.2f\t%s\t%.4f\t%d\t%s\t%d\t%s\t\n", r.Method, r.Share, r.RAM, r.Disk,
			r.Error.Mean, r.Error.P95, r.Error.P99, r.Error.Max, stated, r.KL.Mean,
			r.Strong10.Tokens, unread(r.Strong10), r.Strong3.Tokens, unread(r.Strong3))
	}
	if err := t.Flush(); err != nil || !byLayer {
		return err
	}
	return printLayers(w, results)
}

func unread(s quality.Strong) string {
	return fmt.Sprintf("%.1f%% (%.1f-%.1f)", 100*s.Share(), 100*s.Low, 100*s.High)
}

func printLayers(w io.Writer, results []quality.Result) error {
	var layers []string
	for l := range results[0].ByLayer {
		layers = append(layers, l)
	}
	slices.Sort(layers)
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprint(t, "\nerror\tbudget\t")
	for _, l := range layers {
		fmt.Fprint(t, l+"\t")
	}
	for _, r := range results {
		fmt.Fprintf(t, "\n%s\t%.2f\t", r.Method, r.Share)
		for _, l := range layers {
			fmt.Fprintf(t, "%.4f\t", r.ByLayer[l])
		}
	}
	fmt.Fprintln(t)
	return t.Flush()
}
