package main

import (
	"fmt"
	"io"
	"math"
	"os/exec"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"kvtier/bench/disk"
	bytesize "kvtier/cmd/internal/size"
)

const diskHelp = `Read and write the NVMe tier in turns with fio, on the same files in the same run.

A tier is filled with segments of 2 MiB in a folder of its own, which is removed at the end. Random
places of its files are read past the page cache, and every block that the tier reads is checked:

  fio libaio          fio keeps so many reads under way ('depth'); the others are compared with it
  fio io_uring        the same with the kernel's newer interface, where there is one
  fio in batches      fio submits so many reads and waits for all of them
  raw                 as many goroutines, each with plain reads, unverified
  tier, one by one    as many goroutines, each pinning one range at a time
  tier, batches       one goroutine that pins as many ranges together
  tier, long batches  one goroutine that pins 16 times as many together, of which the tier keeps
                      so many under way

Segments are then written, by one and by four goroutines, and made durable after every 16; fio
writes as much in blocks of a segment's size. Without fio the tier is compared with raw reads alone.

Rates are medians, and in brackets their spread; 'beside' compares within a repeat. 'CPU' is
processor time a read or write. A disk shared with others changes from minute to minute: only what
stands beside each other compares.`

func newDisk() *cobra.Command {
	o := disk.Options{}
	size, written := bytesize.Bytes(1<<30), bytesize.Bytes(256<<20)
	var blocks []int
	var fio string
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "disk [flags]",
		Short: "The NVMe tier beside fio: random reads by size and depth, and writing segments",
		Long:  diskHelp,
		Example: `  kvbench disk --dir /mnt/nvme
  kvbench disk --blocks 4,64 --depths 8 --bytes 4GiB --json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			o.Bytes, o.Written = int64(size), int64(written)
			o.Blocks = nil
			for _, kib := range blocks {
				if kib < 0 || kib > math.MaxInt32>>10 {
					return fmt.Errorf("--blocks: %d KiB is out of range", kib)
				}
				o.Blocks = append(o.Blocks, kib<<10)
			}
			o.Say = sayer(cmd, "disk")
			if o.Fio, err = exec.LookPath(fio); err != nil {
				if cmd.Flags().Changed("fio") {
					return fmt.Errorf("--fio: %w", err)
				}
				o.Say("there is no fio here: the tier is compared with raw reads alone")
			}
			rep, err := disk.Measure(cmd.Context(), o)
			if err != nil {
				return err
			}
			if asJSON {
				return printJSON(cmd.OutOrStdout(), rep)
			}
			return printDisk(cmd.OutOrStdout(), rep)
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.Dir, "dir", ".", "folder on the disk to measure")
	f.Var(&size, "bytes", "size of the files that are read")
	f.Var(&written, "written", "what each way of writing writes a repeat")
	f.IntSliceVar(&blocks, "blocks", []int{4, 16, 64, 256}, "KiB a read: powers of two")
	f.IntSliceVar(&o.Depths, "depths", []int{1, 8, 32}, "reads under way at once")
	f.DurationVar(&o.Time, "time", time.Second, "that each way of reading takes a repeat")
	f.IntVar(&o.Repeats, "repeats", 5, "repeats")
	f.Uint64Var(&o.Seed, "seed", 1, "of all that is random")
	f.StringVar(&fio, "fio", "fio", "the program fio")
	f.BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func printDisk(w io.Writer, rep *disk.Report) error {
	with := rep.Fio
	if with == "" {
		with = "no fio"
	}
	direct := "past the page cache"
	if !rep.Direct {
		direct = "THROUGH THE PAGE CACHE: the file system has no direct I/O, and the tier's figures are not of the disk"
	}
	fmt.Fprintf(w, "%d MiB, read %s; %s\n", rep.Bytes>>20, direct, with)
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "\nwhat\tKiB\tdepth\tway\ta second\t\tMB/s\tbeside\t\tCPU µs")
	for _, r := range rep.Rows {
		fmt.Fprintf(t, "%s\t%d\t%d\t%s\t%s\t%.0f\t%s\t%.0f\n", r.What, r.Block>>10, r.Depth, r.Way, spread("%.0f", r.Rate),
			r.MBs.Median, spread("%.2f", r.Beside), r.CPU)
	}
	return t.Flush()
}
