package main

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"kvtier/bench/million"
)

const millionHelp = `Hold a context larger than memory in a real daemon, and answer decode steps from it.

The context is made up ('go doc kvtier/bench/synth' says how, and 'kvbench shape' how it compares with real models),
by default in the geometry of Llama-3-8B. It is streamed into a kvtierd of its own, as a prefill would; then each step
asks one position of all layers, and appends it. Calls are checked against dense attention over the rows, made again. At
last the daemon is killed, started again, and asked the same.

A context of 1,048,576 tokens takes some 43 GB of disk in the folder that --dir names, and the better part of an hour on
two cores; 65,536 tokens take 3 GB and a few minutes.`

func newMillion() *cobra.Command {
	var o million.Options
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "million [flags]",
		Short: "Decode from a context larger than memory: speed, bytes by tier, error, memory, coming back after a kill",
		Long:  millionHelp,
		Example: `  kvbench million
  kvbench million --tokens 1048576 --ram 15GiB --disk 45GiB --json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			o.Say = sayer(cmd, "million")
			rep, err := million.Run(cmd.Context(), o)
			if err != nil {
				return err
			}
			if asJSON {
				return printJSON(cmd.OutOrStdout(), rep)
			}
			return printMillion(cmd.OutOrStdout(), rep)
		},
	}
	f := cmd.Flags()
	f.IntVar(&o.Geometry.Tokens, "tokens", 65536, "tokens of the context")
	f.IntVar(&o.Geometry.Layers, "layers", 32, "layers")
	f.IntVar(&o.Geometry.KVHeads, "kv-heads", 8, "KV heads")
	f.IntVar(&o.Geometry.Group, "group", 4, "query heads a KV head")
	f.IntVar(&o.Geometry.HeadDim, "head-dim", 128, "head dimension")
	f.IntSliceVar(&o.Budgets, "budgets", []int{4096, 16384}, "tokens that a head's answer may read, as bytes that so many have at 4 bits, beside page means")
	f.IntVar(&o.Warm, "warm", 32, "steps of each budget before those that are measured")
	f.IntVar(&o.Steps, "steps", 64, "steps of each budget that are measured")
	f.IntVar(&o.Audits, "audits", 32, "calls of each budget that are compared with dense attention")
	f.IntVar(&o.Dense, "dense", 2, "layers that are also answered from everything stored, once")
	f.StringVar(&o.RAM, "ram", "2GiB", "limit of the daemon's RAM tier")
	f.StringVar(&o.GPU, "gpu", "off", "limit of the daemon's GPU tier: off, auto or a size")
	f.IntVar(&o.GPUAbove, "gpu-choose-above", 0, "as kvtierd has it")
	f.Float32Var(&o.InRAM, "read-all-in-ram", 0, "least share of a budget that is answered from everything where all of it lies in RAM; 0: none")
	f.BoolVar(&o.ByPage, "by-page", true, "answer budgets by page, as kvtierd does by itself; off: line by line")
	f.DurationVar(&o.ReadWait, "read-wait", 0, "longest wait of a step's calls for reads of keys and values from NVMe; 0: as long as it takes")
	f.StringVar(&o.Disk, "disk", "8GiB", "limit of the daemon's NVMe tier")
	f.StringVar(&o.Dir, "dir", "", "folder in which the run's own is made (default: that for temporary files)")
	f.BoolVar(&o.Keep, "keep", false, "keep the run's folder")
	f.StringVar(&o.Folder, "folder", "", "folder that an earlier run of the same geometry and seed kept: its context is asked, not made")
	f.StringVar(&o.Kvtierd, "kvtierd", "", "the daemon to run (default: the one beside kvbench, or in PATH)")
	f.Uint64Var(&o.Seed, "seed", 1, "of all that is random")
	f.BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

const mib = 1 << 20

func printMillion(w io.Writer, rep *million.Report) error {
	g, b := rep.Geometry, rep.Build
	fmt.Fprintf(w, "%d tokens, %d layers, %d KV heads, %d query heads each, head dimension %d; seed %d\n\n", g.Tokens, g.Layers, g.KVHeads, g.Group, g.HeadDim, rep.Seed)
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	line := func(what, format string, args ...any) { fmt.Fprintf(t, what+"\t"+format+"\n", args...) }
	if b.Seconds > 0 {
		line("build", "%.0f s; %.0f tokens/s, %.0f token-heads/s; %.1f GiB of rows; put off %d times, %.0f s", b.Seconds, b.PerSecond, b.TokenHeads,
			float64(b.Bytes)/(1<<30), b.PutOff, b.PutOffSeconds)
	}
	line("stored", "%d tokens sealed, %.2f GiB of segments, %.2f bits a value; folder %.2f GiB", b.Sealed, float64(b.SealedBytes)/(1<<30), b.BitsPerValue, float64(b.Disk)/(1<<30))
	for i := range rep.Decode {
		printDecode(line, &rep.Decode[i])
	}
	if rep.Dense.Layers > 0 {
		line("everything", "%.0f ms a layer (%d of them), %.1f MiB from NVMe: %.1f s a step, %.0f times as long", rep.Dense.MsPerCall, rep.Dense.Layers,
			rep.Dense.NVMeBytes/mib, rep.Dense.MsPerStep/1e3, rep.Dense.Ratio)
	}
	o := rep.Reopen
	line("after kill -9", "ready in %.2f s, first answer %.2f s, all layers %.2f s; %d of %d tokens there; answers differ by %.1e at most; %.1f MiB from NVMe",
		o.ReadySeconds, o.FirstSeconds, o.StepSeconds, o.Accepted, o.Expected, o.Difference, o.NVMeBytes/mib)
	line("", "the same again: %s ms; %s MiB from NVMe", numbers("%.0f", 1, o.LaterMs), numbers("%.1f", mib, o.LaterNVMe))
	if err := t.Flush(); err != nil {
		return err
	}
	fmt.Fprintln(w, "\nmemory of the daemon, MiB")
	t = tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, "s\tphase\tresident\tRAM tier\ttails\tNVMe tier\t")
	last := ""
	for i, s := range rep.Memory {
		if s.Phase != last || i == len(rep.Memory)-1 || i%max(1, len(rep.Memory)/24) == 0 {
			fmt.Fprintf(t, "%.0f\t%s\t%d\t%d\t%d\t%d\t\n", s.Seconds, s.Phase, s.RSS/mib, s.RAM/mib, s.Tail/mib, s.Disk/mib)
		}
		last = s.Phase
	}
	return t.Flush()
}

func printDecode(line func(what, format string, args ...any), d *million.DecodeReport) {
	line(fmt.Sprintf("budget %d", d.Budget), "step: median %.1f ms, p95 %.1f, p99 %.1f, most %.1f; %.2f a second (%d steps)", d.MedianMs, d.P95Ms, d.P99Ms, d.MostMs, d.PerSecond, d.Steps)
	line("", "zone %.1f, score %.1f, scan %.1f, fetch %.1f ms of all heads together; calls %.1f ms", d.Stages.Zone, d.Stages.Score, d.Stages.Scan, d.Stages.Fetch, d.Stages.Total)
	line("", "a step moves %.1f MiB from RAM, %.2f from NVMe (most %.2f), %.1f of unquantised rows; %.4f of all at 4 bits; RAM gave %.4f",
		d.RAMBytes/mib, d.NVMeBytes/mib, float64(d.NVMeMost)/mib, d.ZoneBytes/mib, (d.RAMBytes+d.NVMeBytes)/max(1, d.FullBytes), d.HitRate)
	if d.GPUBytes > 0 {
		line("", "a step reads %.1f MiB in the memory of the GPU", d.GPUBytes/mib)
	}
	line("", "a step scans %.0f tokens and reads %.0f, over all layers and KV heads", d.Scanned, d.Read)
	if d.LateCalls > 0 {
		line("", "reads were late in %.3f of the calls: %.0f tokens and %.2f MiB a step", d.LateCalls, d.LateTokens, d.LateBytes/mib)
	}
	if len(d.Warm) > 0 {
		line("", "steps before: ms, by tenths: %s; MiB from NVMe: %s", numbers("%.0f", 1, d.Warm), numbers("%.1f", mib, d.WarmNVMe))
	}
	if x := d.Strong; x.Layers > 0 {
		line("", "%d tokens had 3 %% or more of a query head's attention (last step, layers: %d); the values of %d were not read", x.Tokens, x.Layers, x.Unread)
	}
	if a := d.Audit; a.Rows > 0 {
		line("", "error: mean %.4f, median %.4f, p95 %.4f, most %.4f (%d query heads of %d calls); stated %.4f, codec %.4f", a.Mean, a.Median, a.P95, a.Max, a.Rows, a.Calls, d.EstimatedError, d.CodecError)
		line("", "an oracle that reads as many tokens, the heaviest of each query head, and nothing else of the body: error %.4f", a.Oracle)
		line("", "dense attention: %.2f to the first 16, %.2f to the newest 256, %.2f to the body", a.Sink, a.Recent, a.Body)
		for _, l := range slices.Sorted(maps.Keys(a.ByLayer)) {
			line("", "layer %d: error %.4f", l, a.ByLayer[l])
		}
	}
}

// numbers prints x, each over unit.
func numbers(format string, unit float64, x []float64) (out string) {
	for i, v := range x {
		if i > 0 {
			out += " "
		}
		out += fmt.Sprintf(format, v/unit)
	}
	return out
}
