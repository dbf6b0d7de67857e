package main

import (
	"fmt"
	"io"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"kvtier/bench/contexts"
	"kvtier/bench/daemon"
	bytesize "kvtier/cmd/internal/size"
)

const contextsHelp = `Hold many contexts in a daemon at once and see what that does to answers, memory and disk.

A kvtierd of its own is started on a folder that is removed at the end. One context is made and
decoded from at a fixed rate; then all contexts are made and decoded from at the same rate, each turn
in one chosen at random. Lengths fall as Zipf's law has it, groups share a prefix by fork, and some
turns close their context and open it again. Then the daemon is killed and started anew. Keys and
values are made up ('go doc kvtier/bench/contexts' says how), with SmolLM2-135M's heads.

A call appends one token's row to a layer and answers its queries, over gRPC. Its time includes waiting
where the daemon put it off. After a share of the turns, and after the recovery, an answer in mode
exact is compared with dense attention in float64 over the rows that were sent.

  first     the first call of each turn, which finds the context as it was left
  unfair    the 99th percentile of a context's calls that a tenth of the contexts exceed, over that
            which half of them exceed
  put off   calls that the daemon refused for want of room (RESOURCE_EXHAUSTED), made again later

With --huge the load on all contexts is made again while another context, of so many tokens, has calls one after the other:
for everything that is stored of a layer, for one position and for 512, for the daemon's own budget, and appends.

Before it is sealed a token takes 768 bytes a layer, in RAM and on disk, 23 KB with all 30: 1,000 contexts
of that need tens of GB, and each layer's segment takes its time to seal. The first example is a small one.`

func newContexts() *cobra.Command {
	o := contexts.Options{}
	ram, tail, disk := bytesize.Bytes(1<<30), bytesize.Bytes(2<<30), bytesize.Bytes(20<<30)
	var tokens string
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "contexts [flags]",
		Short: "A thousand contexts in one daemon: answers' times, memory, disk, recovery, and no wrong answer",
		Long:  contextsHelp,
		Example: `  kvbench contexts --contexts 50 --tokens 2048..4096 --layers 4
  kvbench contexts --disk 60GiB --json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			if o.Least, o.Most, err = parseTokens(tokens); err != nil {
				return err
			}
			if o.Daemon, err = daemon.Find(o.Daemon); err != nil {
				return err
			}
			o.RAM, o.Tail, o.Disk = int64(ram), int64(tail), int64(disk)
			o.Say = sayer(cmd, "contexts")
			rep, err := contexts.Measure(cmd.Context(), o)
			if err != nil {
				return err
			}
			if asJSON {
				err = printJSON(cmd.OutOrStdout(), rep)
			} else {
				err = printContexts(cmd.OutOrStdout(), rep)
			}
			wrong := rep.One.Audit.Wrong + rep.All.Audit.Wrong + rep.AfterRecovery.Wrong
			for _, b := range rep.Beside {
				wrong += b.Phase.Audit.Wrong
			}
			if err == nil && wrong > 0 {
				err = fmt.Errorf("%d answers were wrong", wrong)
			}
			return err
		},
	}
	f := cmd.Flags()
	f.IntVar(&o.Contexts, "contexts", 1000, "contexts")
	f.StringVar(&tokens, "tokens", "2048..32768", "tokens of the shortest and of the longest context")
	f.IntVar(&o.Layers, "layers", 30, "layers")
	f.IntVar(&o.Group, "group", 4, "contexts that share a prefix of half the shortest context")
	f.StringVar(&o.Daemon, "kvtierd", "", "the daemon's program (default: beside this one, or in PATH)")
	f.StringVar(&o.Dir, "dir", ".", "folder in which the daemon's data are made")
	f.Var(&ram, "ram", "the daemon's --ram")
	f.Var(&tail, "tail", "the daemon's --tail")
	f.Var(&disk, "disk", "the daemon's --disk")
	f.Float64Var(&o.Rate, "rate", 2, "turns a second")
	f.IntVar(&o.Steps, "steps", 8, "tokens a turn")
	f.IntVar(&o.Workers, "workers", 4, "turns under way at most")
	f.DurationVar(&o.Time, "time", 30*time.Second, "of each of the two loads")
	f.Float64Var(&o.Reopen, "reopen", .1, "share of turns before which their context is closed and opened again")
	f.Float64Var(&o.Audit, "audit", .2, "share of turns after which an answer is checked")
	f.IntVar(&o.Huge, "huge", 0, "tokens of a further context, beside whose calls the load is made again")
	f.Uint64Var(&o.Seed, "seed", 1, "of all that is random")
	f.BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

// parseTokens reads LEAST..MOST, or one number for both.
func parseTokens(s string) (least, most int, err error) {
	a, b, two := strings.Cut(s, "..")
	if !two {
		b = a
	}
	least, err = strconv.Atoi(strings.TrimSpace(a))
	if err == nil {
		most, err = strconv.Atoi(strings.TrimSpace(b))
	}
	if err != nil || least < 1 || most < least {
		return 0, 0, fmt.Errorf("--tokens %q: write LEAST..MOST, such as 2048..32768", s)
	}
	return least, most, nil
}

func printContexts(w io.Writer, rep *contexts.Report) error {
	size := func(n int64) string { return bytesize.Format(uint64(max(n, 0))) }
	fmt.Fprintf(w, "%d contexts of %d to %d tokens (median %d), %d in all; %d layers\n", rep.Contexts, rep.Lengths[0], rep.Lengths[2],
		rep.Lengths[1], rep.Tokens, rep.Layers)
	fmt.Fprintf(w, "made in %.1f s: %.0f tokens a second, without those that are shared\n\n", rep.BuildSeconds, float64(rep.BuildTokens)/rep.BuildSeconds)
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "milliseconds\tp50\tp90\tp99\tmost\tfirst p50\tp99\tcalls\tturns/s\tput off\tunfair\tvisited")
	for _, p := range []struct {
		name string
		contexts.Phase
	}{{"1 context", rep.One}, {fmt.Sprint(rep.Contexts, " contexts"), rep.All}} {
		fmt.Fprintf(t, "%s\t%.2f\t%.2f\t%.2f\t%.1f\t%.2f\t%.2f\t%d\t%.2f\t%d\t%.2f\t%d\n", p.name, p.Attend.P50, p.Attend.P90, p.Attend.P99, p.Attend.Max,
			p.First.P50, p.First.P99, p.Calls, p.Rate, p.PutOff, p.Unfair, p.Visited)
	}
	fmt.Fprintf(t, "ratio\t%.2f\t\t%.2f\n", rep.Ratio.P50, rep.Ratio.P99)
	for _, b := range rep.Beside {
		p := b.Phase
		fmt.Fprintf(t, "beside %s (%d calls of %.1f)\t%.2f\t%.2f\t%.2f\t%.1f\t%.2f\t%.2f\t%d\t%.2f\t%d\t%.2f\t%d\n", b.What, b.Calls, b.P50, p.Attend.P50, p.Attend.P90,
			p.Attend.P99, p.Attend.Max, p.First.P50, p.First.P99, p.Calls, p.Rate, p.PutOff, p.Unfair, p.Visited)
	}
	if err := t.Flush(); err != nil {
		return err
	}
	fmt.Fprintf(w, "\nthe daemon under the load on all (RAM tier %s and tails %s allowed)\n", size(rep.Limits.RAM), size(rep.Limits.Tail))
	fmt.Fprintln(t, "second\tresident\ttails\tRAM tier\tNVMe tier\tfiles\tthreads")
	some := rep.All.Samples
	for i := 0; i < len(some); i += max(1, len(some)/8) {
		s := some[i]
		fmt.Fprintf(t, "%.0f\t%s\t%s\t%s\t%s\t%d\t%d\n", s.Seconds, size(s.RSS), size(s.Tails), size(s.RAM), size(s.Disk), s.Files, s.Threads)
	}
	if err := t.Flush(); err != nil {
		return err
	}
	fmt.Fprintf(w, "\ndisk used %s, of it logs of open tails %s\n", size(rep.DiskUsed), size(rep.LogsUsed))
	fmt.Fprintf(w, "killed and started anew: first answer after %.2f s, %d sequences\n", rep.RecoverySeconds, rep.Recovered)
	fmt.Fprintf(w, "answers checked: %d, %d and %d after the recovery; wrong: %d; largest error %.3f, of a log-sum-exp %.3f\n",
		rep.One.Audit.Answers, rep.All.Audit.Answers, rep.AfterRecovery.Answers, rep.One.Audit.Wrong+rep.All.Audit.Wrong+rep.AfterRecovery.Wrong,
		max(rep.One.Audit.WorstError, rep.All.Audit.WorstError, rep.AfterRecovery.WorstError),
		max(rep.One.Audit.WorstMass, rep.All.Audit.WorstMass, rep.AfterRecovery.WorstMass))
	return nil
}
