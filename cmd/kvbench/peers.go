package main

import (
	"fmt"
	"io"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"kvtier/bench/speed"
)

// runPeers measures our kernels beside ggml's operator and prints them.
func runPeers(cmd *cobra.Command, o speed.PeerOptions, asJSON bool) (err error) {
	if o.Python, err = findPython(); err != nil {
		return err
	}
	o.Say = sayer(cmd, "peers")
	rep, err := speed.MeasurePeers(cmd.Context(), o)
	if err != nil {
		return err
	}
	if asJSON {
		return printJSON(cmd.OutOrStdout(), rep)
	}
	return printPeers(cmd.OutOrStdout(), rep)
}

func printPeers(w io.Writer, rep *speed.PeerReport) error {
	s := rep.Shape
	fmt.Fprintf(w, "dense attention of one position: %d tokens, %d KV heads, %d query heads, head dimension %d\n%v\n\n",
		s.Tokens, s.KVHeads, s.QueryHeads, s.HeadDim, rep.Ggml)
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "what\tlayout\tthreads\tms\t\tover ours of equal width\t\tover our 4-bit planes\t\terror")
	for _, r := range rep.Rows {
		if r.Layout == "" {
			fmt.Fprintf(t, "%s\t\t%d\t%s\n", r.What, r.Threads, spread("%.1f", r.Ms))
			continue
		}
		fmt.Fprintf(t, "ggml %s\t%s\t%d\t%s\t%s\t%s\t%.4f\n", r.What, layouts[r.Layout], r.Threads,
			spread("%.1f", r.Ms), spread("%.1f", r.Equal), spread("%.1f", r.Planes), r.Error)
	}
	return t.Flush()
}

// layouts names those of ggml's K/V.
var layouts = map[string]string{"head": "[head][token]", "token": "[token][head]"}

// spread writes a median, and in a column of its own the least and the most.
func spread(format string, s speed.Spread) string {
	return fmt.Sprintf(format+"\t["+format+".."+format+"]", s.Median, s.Least, s.Most)
}
