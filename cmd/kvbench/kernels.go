package main

import (
	"fmt"
	"io"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"kvtier/bench/speed"
)

func newKernels() *cobra.Command {
	var o speed.Options
	var peer speed.PeerOptions
	var mib int
	var peers, asJSON bool
	cmd := &cobra.Command{
		Use:   "kernels",
		Short: "How near the inner loops come to a raw read of the same bytes",
		Long: `Run the inner loops of attention, in each variant that the processor has, over memory that is
larger than its caches, on 1 and on 2 threads, in turns with a raw read of the same bytes. Only
shares of the raw read can be compared between machines. A token is one token of one KV head; all query rows of
the group are answered. Medians of all repeats, and in brackets their spread.

With --peers: dense attention of one position over a layer's K/V, the fastest variant of ours in
turns with ggml's flash attention on the processor, in f16, q8_0 and q4_0, contiguous and as
llama.cpp's cache lies. ggml is the one inside llama-cpp-python, or in the folder that KVTIER_GGML names;
each of its outputs is checked. What it was built for is printed: unless it is compiled
for this processor (CMAKE_ARGS=-DGGML_AVX512=ON, say), it is slower than it could be.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if peers {
				peer.HeadDim, peer.QueryHeads, peer.Repeats = o.HeadDim, o.Rows*peer.KVHeads, o.Repeats
				return runPeers(cmd, peer, asJSON)
			}
			o.Bytes = mib << 20
			results, err := speed.Measure(o)
			if err != nil {
				return err
			}
			if asJSON {
				return printJSON(cmd.OutOrStdout(), results)
			}
			return printKernels(cmd.OutOrStdout(), results)
		},
	}
	cmd.Flags().IntVar(&mib, "mib", 512, "MiB to go through; make it more than the caches hold")
	cmd.Flags().IntVar(&o.Rows, "rows", 4, "query rows that share a KV head")
	cmd.Flags().IntVar(&o.HeadDim, "head-dim", 128, "head dimension")
	cmd.Flags().IntVar(&o.Repeats, "repeats", 7, "repeats")
	cmd.Flags().BoolVar(&peers, "peers", false, "compare with ggml instead, which takes llama-cpp-python")
	cmd.Flags().IntVar(&peer.Tokens, "tokens", 65536, "with --peers: tokens")
	cmd.Flags().IntVar(&peer.KVHeads, "kv-heads", 8, "with --peers: KV heads")
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
