package main

import (
	"encoding/json"
	"fmt"
	"io"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"kvtier/bench/speed"
)

func newKernels() *cobra.Command {
	var o speed.Options
	var mib int
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "kernels",
		Short: "How near the inner loops come to a raw read of the same bytes",
		Long: `Run the inner loops of attention, in each variant that the processor has, over memory that is
larger than its caches, on 1 and on 2 threads, in turns with a raw read of the same bytes. Only
shares of the raw read can be compared between machines. A token is one token of one KV head; all query rows of
the group are answered. Medians of all repeats, and in brackets their spread.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			o.Bytes = mib << 20
			results, err := speed.Measure(o)
			if err != nil {
				return err
			}
			if asJSON {
				enc := json.NewEncoder(cmd.OutOrStdout())
				enc.SetIndent("", "  ")
				return enc.Encode(results)
			}
			return printKernels(cmd.OutOrStdout(), results)
		},
	}
	cmd.Flags().IntVar(&mib, "mib", 512, "MiB to go through; make it more than the caches hold")
	cmd.Flags().IntVar(&o.Rows, "rows", 4, "query rows that share a KV head")
	cmd.Flags().IntVar(&o.HeadDim, "head-dim", 128, "head dimension")
	cmd.Flags().IntVar(&o.Repeats, "repeats", 7, "repeats")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func printKernels(w io.Writer, results []speed.Result) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "kernel\tvariant\tthreads\tGB/s\t\tof the raw read\t\tns a token")
	for _, r := range results {
		token := ""
		if r.TokenNs > 0 {
			token = fmt.Sprintf("%.1f", r.TokenNs)
		}
		fmt.Fprintf(t, "%s\t%s\t%d\t%.1f\t[%.1f..%.1f]\t%.2f\t[%.2f..%.2f]\t%s\n", r.Kernel, r.Variant, r.Threads,
			r.GBs.Median, r.GBs.Least, r.GBs.Most, r.Share.Median, r.Share.Least, r.Share.Most, token)
	}
	return t.Flush()
}
