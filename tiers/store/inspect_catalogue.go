package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/record"
	"github.com/cockroachdb/pebble/v2/sstable"
	"github.com/cockroachdb/pebble/v2/vfs"

	"kvtier/tiers"
	"kvtier/tiers/files"
)

// openCatalogue opens the catalogue, compares it with its digest as the daemon
// does, and reads what Pebble does not: all blocks of all tables, and what lies
// behind the first record of a log that does not check.
func (x *Inspection) openCatalogue() {
	dir := filepath.Join(x.dir, catalogueDir)
	once := newReadOnce(x.fs.Pebble())
	defer once.forget()
	l, found := newLedger(), digest{}
	err := guard(func() (err error) {
		if x.db, err = openExisting(once, dir, x.log); err != nil || x.db == nil {
			return err
		}
		if found, err = l.load(x.db); err != nil {
			return err
		}
		return l.compare(found)
	})
	if err != nil {
		x.report(Finding{VerdictOf(err), catalogueDir, Nowhere, text(err), AdviseRestore, tiers.ID{}})
	}
	x.Whole = x.checkChanges(found, err == nil) && err == nil
	x.checkTables(dir)
	x.checkLogs(once, dir)
}

// checkChanges compares the catalogue with the number of changes noted beside
// it; false: some are lost.
func (x *Inspection) checkChanges(found digest, known bool) bool {
	const advice = "nothing: the daemon writes it anew. Until then a catalogue that loses changes is not noticed"
	b, err := files.ReadFile(x.fs, filepath.Join(x.dir, changesFile))
	if errors.Is(err, fs.ErrNotExist) {
		if found.changes > 0 {
			x.report(Finding{Note, changesFile, Nowhere, "it is missing", advice, tiers.ID{}})
		}
		return true
	}
	if err != nil {
		x.report(Finding{Unread, changesFile, Nowhere, text(err), AdviseReading, tiers.ID{}})
		return true
	}
	changes, ok := readChanges(bytes.NewReader(b))
	switch {
	case !ok:
		x.report(Finding{Note, changesFile, 0, "its checksum is wrong, as after a power cut", advice, tiers.ID{}})
	case known && changes > found.changes:
		x.report(Finding{Damage, catalogueDir, Nowhere, text(lostChanges(changes, found)), AdviseRestore, tiers.ID{}})
		return false
	}
	return true
}

// checkTables checks every block of the tables in use. Those that are not, which
// a crash leaves, Pebble removes when it opens.
func (x *Inspection) checkTables(dir string) {
	if x.db == nil {
		return
	}
	tables, err := x.db.SSTables()
	if err != nil {
		x.report(Finding{VerdictOf(err), catalogueDir, Nowhere, text(err), AdviseRestore, tiers.ID{}})
	}
	o := &pebble.Options{}
	o.EnsureDefaults()
	for _, level := range tables {
		for _, t := range level {
			name := fmt.Sprintf("%s.sst", t.BackingSSTNum)
			err := guard(func() error { return checkTable(x.fs.Pebble(), filepath.Join(dir, name), o.MakeReaderOptions()) })
			if err != nil {
				x.report(Finding{VerdictOf(err), filepath.Join(catalogueDir, name), Nowhere, text(err), AdviseRestore, tiers.ID{}})
			}
		}
	}
}

func checkTable(fsys vfs.FS, path string, o sstable.ReaderOptions) error {
	f, err := fsys.Open(path)
	if err != nil {
		return err
	}
	readable, err := sstable.NewSimpleReadable(f)
	if err != nil {
		return errors.Join(err, f.Close())
	}
	r, err := sstable.NewReader(context.Background(), readable, o) // closes it if it fails
	if err != nil {
		return err
	}
	return errors.Join(r.ValidateBlockChecksums(), r.Close())
}

// checkLogs reads the catalogue's logs and manifests to their last byte. To
// Pebble the first record that does not check is the end.
func (x *Inspection) checkLogs(fsys vfs.FS, dir string) {
	names, err := x.fs.List(dir)
	if err != nil {
		return // Pebble said so
	}
	for _, name := range names {
		number, ok := logNumber(name)
		if !ok {
			continue
		}
		at, err := endOfLog(fsys, filepath.Join(dir, name), number)
		if err == nil {
			continue
		}
		f := Finding{Note, filepath.Join(catalogueDir, name), at, "what lies from here on is no whole record, as after a crash; the catalogue has all its records without it",
			"nothing: the daemon's next start does without it", tiers.ID{}}
		if VerdictOf(err) == Unread {
			f.Verdict, f.What, f.Advice = Unread, text(err), AdviseReading
		} else if !x.Whole {
			f.Verdict, f.What, f.Advice = Damage, "records are lost from here on: "+text(err), AdviseRestore
		}
		x.report(f)
	}
}

// logNumber returns the number of a log or manifest of Pebble's.
func logNumber(name string) (number uint64, ok bool) {
	digits, isLog := strings.CutSuffix(name, ".log")
	if !isLog {
		if digits, ok = strings.CutPrefix(name, "MANIFEST-"); !ok {
			return 0, false
		}
	}
	number, err := strconv.ParseUint(digits, 10, 64)
	if !isLog {
		number = 0 // manifests' records do not bear it
	}
	return number, err == nil
}

// endOfLog returns where the last whole record ends, and an error if there is
// something behind it.
func endOfLog(fsys vfs.FS, path string, number uint64) (at int64, err error) {
	f, err := fsys.Open(path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	b, err := io.ReadAll(f)
	if err != nil {
		return 0, err
	}
	r := numbered(record.NewReader, bytes.NewReader(b), number)
	for {
		at = min(r.Offset(), int64(len(b)))
		one, err := r.Next()
		if err == nil {
			_, err = io.Copy(io.Discard, one)
		}
		switch {
		case err == nil:
			continue
		case errors.Is(err, io.EOF), len(bytes.Trim(b[at:], "\x00")) == 0: // zeros are room that was made
			return at, nil
		}
		return at, err
	}
}

// numbered calls a constructor whose second parameter has a type that Pebble
// does not export.
func numbered[N ~uint64](newReader func(io.Reader, N) *record.Reader, r io.Reader, number uint64) *record.Reader {
	return newReader(r, N(number))
}
