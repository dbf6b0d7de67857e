package main

import (
	"errors"
	"fmt"
	"io"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"kvtier/bench/gpu"
)

const gpuHelp = `Test and measure attention in the memory of a CUDA device.

First a self-test: the kernels' answers beside those of the Go loop over the same stored bytes, for
every head dimension, profile, and lengths that end anywhere. Then how fast bytes come to the device
and back, and what its memory gives (a copy on the device: bytes read and written). Then attention of
one layer at several lengths: the kernels alone, by the device's clock, and whole answers, from the
query in the host's memory to the partials there; once with everything read, once with a fifth of
the pages, which are chosen on the device.

At last sealing: full segments of 1, 8 and 32 layers at once, by the device's clock and from rows in
the host's memory to images there, beside one core of the host. The first segment of each has to be
the host's, byte for byte. --sealing leaves out what comes before but the self-test.

It needs a build with GPU support ('make cuda') and a driver; nothing else, and no network.`

func newGPU() *cobra.Command {
	o := gpu.Options{}
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "gpu [flags]",
		Short: "Attention on a CUDA device: self-test, memory and link, kernels, whole answers",
		Long:  gpuHelp,
		Example: `  kvbench gpu
  kvbench gpu --sealing --repeats 10
  kvbench gpu --device 1 --tokens 131072,1048576 --json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			o.Say = sayer(cmd, "gpu")
			rep, err := gpu.Measure(cmd.Context(), o)
			if rep != nil {
				if asJSON {
					err = errors.Join(err, printJSON(cmd.OutOrStdout(), rep))
				} else {
					err = errors.Join(err, printGPU(cmd.OutOrStdout(), rep))
				}
			}
			if err == nil && len(rep.Failed()) > 0 {
				return fmt.Errorf("%d of %d self-tests failed: do not use this device", len(rep.Failed()), len(rep.SelfTest))
			}
			return err
		},
	}
	f := cmd.Flags()
	f.IntVar(&o.Device, "device", 0, "number of the device")
	f.IntSliceVar(&o.Tokens, "tokens", []int{8 << 10, 32 << 10, 128 << 10, 512 << 10, 1 << 20}, "lengths, multiples of 2,048, ascending")
	f.IntVar(&o.Repeats, "repeats", 50, "repeats")
	f.BoolVar(&o.Sealing, "sealing", false, "measure sealing alone, after the self-test")
	f.BoolVar(&o.Short, "short", false, "small shapes alone: for an emulated device")
	f.Uint64Var(&o.Seed, "seed", 1, "of all that is random")
	f.BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func printGPU(w io.Writer, rep *gpu.Report) error {
	i := rep.Info
	fmt.Fprintf(w, "%s, %d.%d, %d multiprocessors, %d MiB, driver %d\n", i.Name, i.Major, i.Minor, i.SMs, i.Memory>>20, i.Driver)
	worst, lse := 0., 0.
	for _, c := range rep.SelfTest {
		worst, lse = max(worst, c.Error), max(lse, c.LSE)
	}
	fmt.Fprintf(w, "self-test: %d shapes, %d failed, largest relative error %.1e, of a log-sum-exp %.1e\n", len(rep.SelfTest), len(rep.Failed()), worst, lse)
	for _, c := range rep.Failed() {
		fmt.Fprintf(w, "  FAILED %+v: %s\n", c.Shape, c.Fail)
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	if len(rep.Rows) > 0 {
		printAttention(t, rep)
	}
	if len(rep.Sealed) > 0 {
		fmt.Fprintln(t, "\nseal d\tKV heads\tlayers\tprofile\ttokens\tkernels µs\ttoken-heads/s\twhole µs\ttoken-heads/s\thost's core\tmetric µs\t")
	}
	for _, r := range rep.Sealed {
		fmt.Fprintf(t, "%d\t%d\t%d\t%s\t%d\t%s\t%.3g\t%s\t%.3g\t%.3g\t%.0f\n", r.HeadDim, r.Heads, r.Layers, r.Profile, r.Tokens,
			spread("%.0f", r.Kernel), r.KernelRate, spread("%.0f", r.Whole), r.WholeRate, r.HostRate, r.Metric)
	}
	return t.Flush()
}

func printAttention(t io.Writer, rep *gpu.Report) {
	fmt.Fprintln(t, "\ncopies\tMiB\tGB/s\t")
	for _, c := range rep.Copies {
		fmt.Fprintf(t, "%s\t%d\t%s\n", c.What, c.Bytes>>20, spread("%.1f", c.GBs))
	}
	fmt.Fprintln(t, "\nd\tKV heads\tgroup\tprofile\ttokens\tpages read\tMiB\tkernels µs\t\tGB/s\tof memory\tanswer µs\t")
	for _, r := range rep.Rows {
		fmt.Fprintf(t, "%d\t%d\t%d\t%s\t%d\t%.2f\t%.1f\t%s\t%.0f\t%.2f\t%s\n", r.HeadDim, r.Heads, r.Group, r.Profile, r.Tokens, r.Read,
			float64(r.Bytes)/(1<<20), spread("%.0f", r.Kernel), r.GBs, r.OfMemory, spread("%.0f", r.Answer))
	}
}
