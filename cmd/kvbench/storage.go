package main

import (
	"fmt"
	"path/filepath"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"kvtier/bench/quality"
)

func newStorage() *cobra.Command {
	var dumps string
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "storage --dump 'DIR/*.npz'",
		Short: "Bits a key or value that sealed segments of dumped layers take",
		Long: `Seal the first segment of each dump (as 'kvbench quality' reads them) by every profile, keys and
values in bfloat16, and say how many bits a number it takes: image, header and location in the
catalogue. "lossless" is the part that the exact profile's unquantised rows take.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			files, err := dumpFiles(dumps)
			if err != nil {
				return err
			}
			stored, err := quality.Storage(cmd.Context(), files)
			if err != nil {
				return err
			}
			if asJSON {
				return printJSON(cmd.OutOrStdout(), stored)
			}
			t := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 0, 2, ' ', tabwriter.AlignRight)
			fmt.Fprintln(t, "profile\tbits a value\tlossless\t")
			for _, s := range stored {
				fmt.Fprintf(t, "%s\t%.3f\t%.3f\t\n", s.Profile, s.Bits, s.Lossless)
			}
			return t.Flush()
		},
	}
	cmd.Flags().StringVar(&dumps, "dump", "", "pattern of .npz files, one a layer")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	_ = cmd.MarkFlagRequired("dump")
	return cmd
}

// dumpFiles expands the pattern of --dump.
func dumpFiles(pattern string) ([]string, error) {
	files, err := filepath.Glob(pattern)
	if err != nil {
		return nil, fmt.Errorf("--dump %q: %w", pattern, err)
	}
	if len(files) == 0 {
		return nil, fmt.Errorf("--dump %q matches no file: 'python -m kvtier.capture' makes dumps", pattern)
	}
	return files, nil
}
