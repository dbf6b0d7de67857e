package store

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cockroachdb/pebble/v2"

	"kvtier/tiers"
)

func openStore(t *testing.T, dir string) *Store {
	t.Helper()
	s, err := Open(t.Context(), dir, Options{RAMBytes: 1 << 20, DiskBytes: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func set(t *testing.T, s *Store, key, value string) {
	t.Helper()
	b := s.NewBatch()
	defer b.Close()
	var err error
	if value == "" {
		err = b.Delete(KindSpan, []byte(key))
	} else {
		err = b.Set(KindSpan, []byte(key), []byte(value))
	}
	if err := errors.Join(err, b.Commit(t.Context())); err != nil {
		t.Fatal(err)
	}
}

func records(t *testing.T, s *Store) string {
	t.Helper()
	var out []string
	if err := s.Records(KindSpan, func(k, v []byte) error {
		out = append(out, string(k)+"="+string(v))
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return strings.Join(out, " ")
}

// The ledger agrees with the catalogue through sets, replacements, deletions,
// abandoned changes and restarts.
func TestLedger(t *testing.T) {
	dir := t.TempDir()
	s := openStore(t, dir)
	for i := range 20 {
		set(t, s, fmt.Sprint("k", i%7), fmt.Sprint(i))
		if i%3 == 0 {
			set(t, s, fmt.Sprint("k", i%5), "")
		}
		b := s.NewBatch()
		if err := errors.Join(b.Set(KindSpan, []byte("never"), []byte("x")), b.Close()); err != nil {
			t.Fatal(err)
		}
		if i%4 == 0 {
			want := records(t, s)
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			s = openStore(t, dir)
			if got := records(t, s); got != want {
				t.Fatalf("after a restart %q, want %q", got, want)
			}
		}
	}
	b := s.NewBatch()
	if err := b.Set(KindSpan, []byte("late"), []byte("x")); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := b.Commit(t.Context()); !errors.Is(err, tiers.ErrClosed) {
		t.Errorf("a commit after Close: %v", err)
	}
}

// Records that vanish or appear behind the ledger's back are noticed.
func TestLedgerNoticesLostRecords(t *testing.T) {
	old := map[string][]byte{}
	for _, c := range []struct {
		name  string
		spoil func(db *pebble.DB) error
	}{
		{"a record gone", func(db *pebble.DB) error { return db.Delete(recordKey(KindSpan, []byte("b")), pebble.Sync) }},
		{"a record too many", func(db *pebble.DB) error {
			k := recordKey(KindSpan, []byte("d"))
			return db.Set(k, sealValue(k, []byte("4")), pebble.Sync)
		}},
		{"an old value", func(db *pebble.DB) error {
			k := recordKey(KindSpan, []byte("a"))
			return db.Set(k, sealValue(k, []byte("0")), pebble.Sync)
		}},
		{"a value under another key", func(db *pebble.DB) error {
			return db.Set(recordKey(KindSpan, []byte("a")), sealValue(recordKey(KindSpan, []byte("b")), []byte("2")), pebble.Sync)
		}},
		{"an old digest", func(db *pebble.DB) error { return db.Set([]byte{byte(kindDigest)}, old["digest"], pebble.Sync) }},
		{"no digest", func(db *pebble.DB) error { return db.Delete([]byte{byte(kindDigest)}, pebble.Sync) }},
		{"nothing left", func(db *pebble.DB) error { return db.DeleteRange([]byte{0}, []byte{255}, pebble.Sync) }},
		{"the last change undone, digest and all", func(db *pebble.DB) error {
			return errors.Join(db.Delete(recordKey(KindSpan, []byte("c")), pebble.Sync), db.Set([]byte{byte(kindDigest)}, old["digest"], pebble.Sync))
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			s := openStore(t, dir)
			set(t, s, "a", "1")
			set(t, s, "b", "2")
			v, closer, err := s.db.Get([]byte{byte(kindDigest)})
			if err != nil {
				t.Fatal(err)
			}
			old["digest"] = append([]byte(nil), v...)
			set(t, s, "c", "3")
			if err := errors.Join(closer.Close(), c.spoil(s.db), s.Close()); err != nil {
				t.Fatal(err)
			}
			if _, err := Open(t.Context(), dir, Options{RAMBytes: 1 << 20, DiskBytes: 1 << 20}); !errors.Is(err, tiers.ErrCorrupt) || !strings.Contains(err.Error(), whatToDo) {
				t.Errorf("opened with %v", err)
			}
		})
	}
}

// The file beside the catalogue may be behind, damaged or gone: it is written anew.
func TestLedgerFileMayBeBehind(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, changesFile)
	s := openStore(t, dir)
	set(t, s, "a", "1")
	behind, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	set(t, s, "b", "2")
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for _, b := range [][]byte{behind, nil, []byte("short"), []byte("twelve bytes")} {
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		s := openStore(t, dir)
		if got := records(t, s); got != "a=1 b=2" {
			t.Errorf("with %q: %q", b, got)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadFile(path); err != nil || string(got[:len(want)]) != string(want) {
			t.Errorf("%q became %q, want %q (%v)", b, got, want, err)
		}
	}
}
