package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"kvtier/cmd/internal/size"
	"kvtier/server"
	"kvtier/tiers"
	"kvtier/tiers/files"
	"kvtier/tiers/store"
)

func newCheck(a *app) *cobra.Command {
	var quiet bool
	cmd := &cobra.Command{
		Use:   "check FOLDER",
		Short: "Read a data folder that no daemon runs on, and check every byte in use",
		Long: `Read everything that outlives the daemon in a data folder, and check it: the catalogue against its
digest, every block of every segment against its checksum, every record of the logs of open tails, the
small files, and whether all of it fits together. For use after a crash, on a disk that is in doubt, on a
copy, and on a folder that is mounted read-only: nothing is written, not even a lock file.
Where a daemon runs, 'kvtier verify' reads the stored bytes.

Findings go to standard output, progress to standard error. A finding is
  DAMAGE  what no crash explains: exit code 1
  UNREAD  what could not be read, so that nobody knows: exit code 5, if there is no damage
  NOTE    what a crash leaves and the daemon's next start mends, or does without: exit code 0

Memory: the catalogue's records, and for each core and one more 4 MiB or the longest part of a segment.`,
		Args: cobra.ExactArgs(1),
		RunE: run(func(cmd *cobra.Command, args []string) error {
			return a.check(cmd.Context(), args[0], quiet)
		}),
	}
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "no progress")
	return cmd
}

func (a *app) check(ctx context.Context, dir string, quiet bool) error {
	p := newProgress(a, "check", quiet)
	r, err := server.Check(ctx, server.CheckOptions{DataDir: dir, Progress: func(done, total int64) {
		p.show(uint64(done), uint64(total), done == total, "")
	}})
	p.end()
	switch {
	case errors.Is(err, files.ErrLocked):
		return failf(exitServer, "a daemon runs on %s: use 'kvtier verify', or stop the daemon first", dir)
	case errors.Is(err, tiers.ErrNotFound):
		return failf(exitUsage, "%v: name the folder that kvtierd has as --data", err)
	case err != nil:
		return err
	}
	if a.format == "json" {
		err = a.printValue(r)
	} else {
		var b bytes.Buffer
		checkTable(&b, r)
		_, err = a.out.Write(b.Bytes())
	}
	switch {
	case err != nil:
		return err
	case r.Damage > 0:
		return &failure{code: exitFinding}
	case r.Unread > 0:
		return &failure{code: exitServer}
	}
	return nil
}

func checkTable(w io.Writer, r *server.CheckReport) {
	for _, f := range r.Findings {
		place := f.File
		if f.Offset != store.Nowhere {
			place += fmt.Sprintf(" byte %d", f.Offset)
		}
		fmt.Fprintf(w, "%s %s: %s\n", strings.ToUpper(f.Verdict.String()), printable(place), printable(f.What))
		for _, x := range f.Affected {
			fmt.Fprintf(w, "       concerns %s\n", printable(affectedText(x)))
		}
		fmt.Fprintf(w, "       to do: %s\n", printable(f.Advice))
	}
	verdict := "no damage"
	switch {
	case r.Damage > 0:
		verdict = fmt.Sprintf("%d damaged", r.Damage)
	case r.Unread > 0:
		verdict = "no damage found"
	}
	if r.Unread > 0 {
		verdict += fmt.Sprintf(", %d not read", r.Unread)
	}
	if r.Notes > 0 {
		verdict += fmt.Sprintf(", %d notes", r.Notes)
	}
	fmt.Fprintf(w, "checked %s in %s segments and %s logs of %s sequences: %s\n", size.Format(uint64(r.Bytes)),
		count(uint64(r.Segments)), count(uint64(r.Logs)), count(uint64(r.Sequences)), verdict)
	fmt.Fprintf(w, "%s of extents are free, %s are nobody's\n", size.Format(uint64(r.FreeBytes)), size.Format(uint64(r.StrayBytes)))
}

func affectedText(x server.Affected) string {
	s := "sequence " + x.Sequence
	if x.Name != "" {
		s += " (" + x.Name + ")"
	}
	if x.Layer != server.AllLayers {
		s += fmt.Sprintf(", layer %d", x.Layer)
	}
	if x.End == 0 {
		return s + fmt.Sprintf(", tokens from %d on", x.Start)
	}
	return s + ", tokens " + spanRange(x.Start, x.End)
}
