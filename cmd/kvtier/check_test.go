package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"kvtier/attention"
	"kvtier/compress"
	"kvtier/tiers"
	"kvtier/tiers/files"
	"kvtier/tiers/seal"
	"kvtier/tiers/store"
)

// checkFolder makes a data folder with fixed names: one sequence of one layer,
// with a sealed span and an empty log.
func checkFolder(t *testing.T) string {
	t.Helper()
	dir := shortTempDir(t)
	s, err := store.Open(t.Context(), dir, store.Options{RAMBytes: 1 << 20, DiskBytes: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	rows := bytes.Repeat([]byte{0x80, 0x3f}, 32*16)
	h, parts := seal.Segment(&seal.Rows{Heads: 1, HeadDim: 16, Type: compress.BF16, K: rows, V: rows},
		seal.Options{Profile: tiers.ProfileBalanced, Metrics: []*attention.Metric{attention.NewQuerySum(16).Metric()}})
	b := s.NewBatch()
	err = errors.Join(
		b.PutSegment(t.Context(), h, parts),
		b.Set(store.KindSpan, []byte("span"), fmt.Appendf(nil, `{"id":"span","start":0,"tokens":32,"segments":["%x"],"token_ids":[0%s]}`,
			h.ID[:], strings.Repeat(",0", 31))),
		b.Set(store.KindSequence, []byte(idBook), []byte(`{"id":"`+idBook+`","name":"moby-dick","spec":{"layers":1,"query_heads":1,"kv_heads":1,`+
			`"head_dim":16,"fingerprint":"YQ=="},"profile":3,"spans":[{"span":"span","limit":32}],"log":1}`)),
		b.Commit(t.Context()), b.Close(), s.Close(),
		os.WriteFile(filepath.Join(dir, "tenant.key"), append(make([]byte, 32), 0xad, 0x55, 0x0a, 0x19), 0o600),
		os.Mkdir(filepath.Join(dir, "tails"), 0o700),
		os.WriteFile(bookLog(dir), nil, 0o600))
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

func bookLog(dir string) string { return filepath.Join(dir, "tails", idBook+"-1.log") }

func TestCheckPrints(t *testing.T) {
	for _, c := range []struct {
		name  string
		spoil func(dir string) error
		code  int
	}{
		{"check", func(string) error { return nil }, exitOK},
		{"check-notes", func(dir string) error {
			return errors.Join(os.WriteFile(bookLog(dir), []byte("torn"), 0o600),
				os.WriteFile(filepath.Join(dir, "tails", "gone-7.log"), []byte("old"), 0o600))
		}, exitOK},
		{"check-damage", func(dir string) error {
			f, err := os.OpenFile(filepath.Join(dir, "segments", "extent-000001.kv"), os.O_WRONLY, 0)
			if err != nil {
				return err
			}
			_, err = f.WriteAt([]byte{1}, 100)
			return errors.Join(err, f.Close(), os.Remove(bookLog(dir)))
		}, exitFinding},
	} {
		dir := checkFolder(t)
		if err := c.spoil(dir); err != nil {
			t.Fatal(err)
		}
		for _, format := range []string{"table", "json"} {
			t.Run(c.name+"/"+format, func(t *testing.T) {
				r := runCLI(t, "unix:/none", "check", dir, "-o", format, "--quiet")
				if r.code != c.code || r.errOut != "" {
					t.Errorf("exit code %d, standard error %q", r.code, r.errOut)
				}
				golden(t, c.name+"."+format, strings.ReplaceAll(r.out, dir, "DATA"))
			})
		}
	}
}

func TestCheckUnread(t *testing.T) {
	dir := checkFolder(t)
	if err := errors.Join(os.Remove(bookLog(dir)), os.Mkdir(bookLog(dir), 0o700)); err != nil {
		t.Fatal(err)
	}
	r := runCLI(t, "unix:/none", "check", dir, "--quiet")
	if r.code != exitServer || !strings.HasPrefix(r.out, "UNREAD tails/") || !strings.Contains(r.out, "no damage found, 1 not read") {
		t.Errorf("%+v", r)
	}
}

func TestCheckProgress(t *testing.T) {
	r := runCLI(t, "unix:/none", "check", checkFolder(t))
	if !strings.HasPrefix(r.errOut, "check: ") || !strings.Contains(r.errOut, "(100.0%)") {
		t.Errorf("standard error: %q", r.errOut)
	}
}

func TestCheckWithoutFolder(t *testing.T) {
	empty := t.TempDir()
	for _, args := range [][]string{{"check"}, {"check", empty}, {"check", filepath.Join(empty, "none")}} {
		if r := runCLI(t, "unix:/none", args...); r.code != exitUsage || r.out != "" {
			t.Errorf("%v: %+v", args, r)
		}
	}
}

func TestCheckBesideADaemon(t *testing.T) {
	dir := checkFolder(t)
	lock, err := files.OS.Lock(filepath.Join(dir, "LOCK"))
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	if r := runCLI(t, "unix:/none", "check", dir); r.code != exitServer || !strings.Contains(r.errOut, "use 'kvtier verify', or stop the daemon first") {
		t.Errorf("%+v", r)
	}
}
