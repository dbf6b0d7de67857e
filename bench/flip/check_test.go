package flip

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"kvtier/server"
	"kvtier/tiers"
	"kvtier/tiers/files"
	"kvtier/tiers/nvme"
	"kvtier/tiers/store"
)

// run is bytes of a file, [from, to).
type run struct{ from, to int64 }

// checkWhole checks a folder in which nothing is wrong, and returns which bytes
// of extents are in use.
func checkWhole(t *testing.T, dir string) map[string][]run {
	t.Helper()
	r, err := server.Check(t.Context(), server.CheckOptions{DataDir: dir})
	if err != nil || len(r.Findings) > 0 {
		t.Fatalf("check of the undamaged folder: %+v, %v", r, err)
	}
	x, err := store.Inspect(t.Context(), files.OS, dir, func(f store.Finding) { t.Errorf("%+v", f) })
	if err != nil {
		t.Fatal(err)
	}
	runs := map[string][]run{}
	for _, s := range x.Layout() {
		name, from := filepath.Join("segments", nvme.ExtentName(s.Run.Extent)), int64(s.Run.First)*tiers.BlockSize
		runs[name] = append(runs[name], run{from, from + int64(s.Run.Blocks)*tiers.BlockSize})
	}
	if err := x.Close(); err != nil {
		t.Fatal(err)
	}
	return runs
}

// compareCheck says what an offline check of the flipped folder should have
// found: damage where the daemon refuses the folder or an answer, and at least a
// note of all else, but for bytes that nobody uses.
func (tr *truth) compareCheck(d damage, r *server.CheckReport, o outcome) error {
	switch {
	case r.Unread > r.Damage*len(tr.list): // what a damaged catalogue says nothing of
		return fmt.Errorf("check could not read a folder that can be read: %+v", r.Findings)
	case o >= atQuery && r.Damage == 0:
		return fmt.Errorf("check found no damage, but %+v; the daemon: %v", r.Findings, o)
	case len(r.Findings) == 0 && (o != harmless || !tr.unused(d)):
		return fmt.Errorf("check found nothing; the daemon: %v", o)
	}
	return nil
}

// unused says whether nobody reads a byte: free room of an extent; or Pebble's
// OPTIONS, in which only names are compared when a database is opened.
func (tr *truth) unused(d damage) bool {
	switch {
	case strings.HasPrefix(d.file, "segments"):
		at := int64(d.at)
		return !slices.ContainsFunc(tr.runs[d.file], func(r run) bool { return r.from <= at && at < r.to })
	case strings.HasPrefix(d.file, filepath.Join("catalogue", "OPTIONS-")):
		return true
	}
	return false
}
