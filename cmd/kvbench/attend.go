package main

import (
	"fmt"
	"io"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"kvtier/bench/speed"
)

const attendHelp = `Answer one position of one layer from RAM, and show where the time goes.

A context is made up as for 'kvbench planted', with nothing planted in it, and sealed; lengths are
the first tokens of the longest one. One KV head's tokens are made and sealed, and all heads hold
copies of them, each in memory of its own; each head's group asks queries of its own. No daemon and
no transport take part. A token of all 8 heads takes some 7 KB here, and 8 KB more with --ggml.

Ways of one length take turns. 'dense' is our attention over bfloat16 rows; 'everything' reads all
codes; a share is of the bytes that all sealed tokens take at 4 bits. Stages are summed over the
heads, so that they add up to the time times the threads:

  zone   the first tokens and those not sealed yet, exact
  score  page means, and what the answer and its error owe to means and to tokens whose values were not read
  scan   the choice of pages, keys, and the choice of where to read on; of everything: all arithmetic
  fetch  the choice of values, and the values; of everything: pinning
  rest   plans, merging, rotating back

Times are medians, and in brackets their spread; 'over dense' compares within a repeat. 'growth' is
the time over that of the length before. The error is against dense attention, mean over heads; of
ggml's, against numpy over the same K/V.`

func newAttend() *cobra.Command {
	var o speed.AttendOptions
	var ggml, asJSON bool
	cmd := &cobra.Command{
		Use:   "attend [flags]",
		Short: "Where the time of an answer goes, and how it grows with the context",
		Long:  attendHelp,
		Example: `  kvbench attend --tokens 4096,32768
  kvbench attend --ggml --threads 1 --json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			if ggml {
				if o.Python, err = findPython(); err != nil {
					return err
				}
			}
			o.Say = sayer(cmd, "attend")
			rep, err := speed.MeasureAttend(cmd.Context(), o)
			if err != nil {
				return err
			}
			if asJSON {
				return printJSON(cmd.OutOrStdout(), rep)
			}
			return printAttend(cmd.OutOrStdout(), rep)
		},
	}
	f := cmd.Flags()
	f.IntSliceVar(&o.Tokens, "tokens", nil, "lengths of the context (default: 1024 to 262144, doubling)")
	f.Float64SliceVar(&o.Budgets, "budgets", []float64{.2, .1}, "shares of the bytes at 4 bits, each in (0, 1]")
	f.IntVar(&o.HeadDim, "head-dim", 128, "head dimension")
	f.IntVar(&o.KVHeads, "kv-heads", 8, "KV heads")
	f.IntVar(&o.Group, "group", 4, "query heads a KV head")
	f.IntVar(&o.Threads, "threads", 2, "KV heads answered at once; also ggml's threads")
	f.IntVar(&o.Repeats, "repeats", 5, "repeats")
	f.Uint64Var(&o.Seed, "seed", 1, "of all that is random")
	f.BoolVar(&ggml, "ggml", false, "measure ggml's flash attention beside (llama-cpp-python must be installed)")
	f.BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func printAttend(w io.Writer, rep *speed.AttendReport) error {
	fmt.Fprintf(w, "one position: %d KV heads, %d query heads each, head dimension %d; %d threads\n",
		rep.KVHeads, rep.Group, rep.HeadDim, rep.Threads)
	if rep.Ggml != nil {
		fmt.Fprintf(w, "%v\n", *rep.Ggml)
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "\ntokens\twhat\tms\t\tover dense\t\tgrowth\tzone\tscore\tscan\tfetch\trest\tbytes\terror")
	before := map[string]float64{}
	for _, r := range rep.Rows {
		growth := ""
		if ms := before[r.What]; ms > 0 {
			growth = fmt.Sprintf("%.2f", r.Ms.Median/ms)
		}
		before[r.What] = r.Ms.Median
		fmt.Fprintf(t, "%d\t%s\t%s\t%s\t%s\t%s\t%s\n", r.Tokens, r.What, spread("%.2f", r.Ms), spread("%.2f", r.Dense), growth,
			attendStages(r), attendError(r))
	}
	return t.Flush()
}

func attendStages(r speed.AttendRow) string {
	s := r.Stages
	if s == nil {
		return "\t\t\t\t\t"
	}
	return fmt.Sprintf("%.2f\t%.2f\t%.2f\t%.2f\t%.2f\t%.3f", s.Zone, s.Score, s.Scan, s.Fetch, s.Rest, r.Read)
}

func attendError(r speed.AttendRow) string {
	if r.Error == 0 { // dense attention, with which the others are compared
		return ""
	}
	return fmt.Sprintf("%.4f", r.Error)
}
