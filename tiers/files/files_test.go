package files_test

import (
	"bytes"
	"errors"
	"io"
	"io/fs"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"testing"

	"kvtier/tiers/files"
	"kvtier/tiers/files/filestest"
)

// The system's file system and the disk of the tests do the same.
func TestFS(t *testing.T) {
	for name, c := range map[string]struct {
		fs  files.FS
		dir string
	}{
		"system": {files.OS, t.TempDir()},
		"memory": {filestest.NewDisk(), "/"},
	} {
		t.Run(name, func(t *testing.T) { testFS(t, c.fs, filepath.Join(c.dir, "a", "b")) })
	}
}

func testFS(t *testing.T, fsys files.FS, dir string) {
	ok := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	is := func(err, want error) {
		t.Helper()
		if !errors.Is(err, want) {
			t.Fatalf("%v, want %v", err, want)
		}
	}
	ok(fsys.MkdirAll(dir))
	ok(fsys.MkdirAll(dir))
	name := filepath.Join(dir, "f")
	_, err := fsys.Open(name, 0)
	is(err, fs.ErrNotExist)
	f, err := fsys.Open(name, files.Create)
	ok(err)
	_, err = fsys.Open(name, files.Create)
	is(err, fs.ErrExist)
	if _, err := f.WriteAt([]byte("hello"), 3); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 9)
	n, err := f.ReadAt(b, 0)
	if is(err, io.EOF); n != 8 || string(b[:n]) != "\x00\x00\x00hello" {
		t.Fatalf("read %q", b[:n])
	}
	ok(f.Truncate(5))
	ok(f.Truncate(7))
	if size, err := f.Size(); err != nil || size != 7 {
		t.Fatalf("%d bytes: %v", size, err)
	}
	ok(errors.Join(f.Sync(), f.Close(), fsys.SyncDir(dir)))
	if b, err := files.ReadFile(fsys, name); err != nil || string(b) != "\x00\x00\x00he\x00\x00" {
		t.Fatalf("read %q: %v", b, err)
	}
	ok(files.WriteFile(fsys, name, []byte("one")))
	ok(files.WriteFile(fsys, name, []byte("2")))
	if b, err := files.ReadFile(fsys, name); err != nil || string(b) != "2" {
		t.Fatalf("read %q: %v", b, err)
	}
	x, err := fsys.Open(filepath.Join(dir, "x"), files.Create|files.Direct)
	ok(err)
	ok(x.Allocate(1 << 20))
	if size, err := x.Size(); err != nil || size != 1<<20 {
		t.Fatalf("%d bytes: %v", size, err)
	}
	ok(x.Close())
	ok(fsys.Rename(name, filepath.Join(dir, "g")))
	is(fsys.Remove(name), fs.ErrNotExist)
	lock, err := fsys.Lock(filepath.Join(dir, "LOCK"))
	ok(err)
	_, err = fsys.Lock(filepath.Join(dir, "LOCK"))
	is(err, files.ErrLocked)
	_, err = fsys.Share(filepath.Join(dir, "LOCK"))
	is(err, files.ErrLocked)
	ok(lock.Close())
	lock, err = fsys.Lock(filepath.Join(dir, "LOCK"))
	ok(err)
	ok(lock.Close())
	one, err := fsys.Share(filepath.Join(dir, "LOCK"))
	ok(err)
	two, err := fsys.Share(filepath.Join(dir, "LOCK"))
	ok(err)
	ok(one.Close())
	_, err = fsys.Lock(filepath.Join(dir, "LOCK"))
	is(err, files.ErrLocked)
	ok(two.Close())
	_, err = fsys.Share(filepath.Join(dir, "none"))
	is(err, fs.ErrNotExist)
	testReadOnly(t, files.ReadOnly(fsys), dir)
	names, err := fsys.List(dir)
	ok(err)
	slices.Sort(names)
	if !slices.Equal(names, []string{"LOCK", "g", "x"}) {
		t.Fatalf("files are %v", names)
	}
	if free, err := fsys.Free(dir); err != nil || free <= 0 {
		t.Fatalf("%d bytes free: %v", free, err)
	}
}

// Through ReadOnly nothing changes, and all can be read.
func testReadOnly(t *testing.T, fsys files.FS, dir string) {
	g := filepath.Join(dir, "g")
	for what, err := range map[string]error{
		"make":        second(fsys.Open(filepath.Join(dir, "new"), files.Create)),
		"remove":      fsys.Remove(g),
		"rename":      fsys.Rename(g, filepath.Join(dir, "h")),
		"mkdir":       fsys.MkdirAll(filepath.Join(dir, "sub")),
		"pebble make": second(fsys.Pebble().Create(filepath.Join(dir, "new"), "")),
		"pebble edit": second(fsys.Pebble().OpenReadWrite(g, "")),
		"pebble link": fsys.Pebble().Link(g, filepath.Join(dir, "h")),
	} {
		if !errors.Is(err, files.ErrReadOnly) {
			t.Errorf("%s: %v", what, err)
		}
	}
	f, err := fsys.Open(g, files.Direct)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(make([]byte, 4096), 0); err == nil {
		t.Error("a write went through")
	}
	if f.Truncate(0) == nil || f.Allocate(1<<20) == nil {
		t.Error("a change of size went through")
	}
	if b, err := files.ReadFile(fsys, g); err != nil || string(b) != "2" {
		t.Errorf("read %q: %v", b, err)
	}
	if err := errors.Join(fsys.MkdirAll(dir), fsys.SyncDir(dir)); err != nil {
		t.Errorf("what needs no change: %v", err)
	}
}

func second[T any](_ T, err error) error { return err }

// What was synced survives every power cut; what was not may survive in part,
// and in some cut each part of it does and does not.
func TestPowerCut(t *testing.T) {
	d := filestest.NewDisk()
	if err := d.MkdirAll("/d"); err != nil {
		t.Fatal(err)
	}
	open := func(name string) files.File {
		f, err := d.Open(name, files.Create)
		if err != nil {
			t.Fatal(err)
		}
		return f
	}
	write := func(f files.File, b byte, off int64) {
		if _, err := f.WriteAt(bytes.Repeat([]byte{b}, 4096), off); err != nil {
			t.Fatal(err)
		}
	}
	f := open("/d/synced")
	write(f, 1, 0)
	if err := errors.Join(f.Sync(), d.SyncDir("/d")); err != nil {
		t.Fatal(err)
	}
	durable := d.Ops()
	write(f, 2, 4096)
	write(f, 3, 8192)
	open("/d/unsynced")
	if err := d.Remove("/d/synced"); err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	for i := range 300 {
		cut := d.PowerCut(d.Ops(), rand.New(rand.NewPCG(1, uint64(i))))
		names, err := cut.List("/d")
		if err != nil {
			t.Fatal(err)
		}
		for _, n := range []string{"synced", "unsynced"} {
			if slices.Contains(names, n) {
				seen[n] = true
			} else {
				seen["no "+n] = true
			}
		}
		cut = d.PowerCut(durable+2, rand.New(rand.NewPCG(1, uint64(i)))) // the writes alone
		b, err := files.ReadFile(cut, "/d/synced")
		if err != nil || len(b) < 4096 || !bytes.Equal(b[:4096], bytes.Repeat([]byte{1}, 4096)) {
			t.Fatalf("what was synced is gone: %d bytes, %v", len(b), err)
		}
		has2, has3 := bytes.IndexByte(b, 2) >= 0, bytes.IndexByte(b, 3) >= 0
		switch {
		case len(b) == 4096:
			seen["nothing"] = true
		case !has2 && has3:
			seen["the later alone"] = true
		case has2 && bytes.Count(b, []byte{2}) < 4096:
			seen["torn"] = true
		case has2 && has3:
			seen["both"] = true
		}
	}
	for _, want := range []string{"synced", "no synced", "unsynced", "no unsynced", "nothing", "the later alone", "torn", "both"} {
		if !seen[want] {
			t.Errorf("never: %s", want)
		}
	}
	if b, err := files.ReadFile(d.Kill(durable+2), "/d/synced"); err != nil || len(b) != 3*4096 {
		t.Errorf("a kill left %d bytes: %v", len(b), err)
	}
}

// A small file is as it was or whole, whenever power goes.
func TestWriteFile(t *testing.T) {
	d := filestest.NewDisk()
	if err := errors.Join(d.MkdirAll("/d"), files.WriteFile(d, "/d/f", []byte("old"))); err != nil {
		t.Fatal(err)
	}
	from := d.Ops()
	if err := files.WriteFile(d, "/d/f", []byte("new")); err != nil {
		t.Fatal(err)
	}
	for n := from; n <= d.Ops(); n++ {
		for i := range uint64(50) {
			cut := d.PowerCut(n, rand.New(rand.NewPCG(uint64(n), i)))
			b, err := files.ReadFile(cut, "/d/f")
			if s := string(b); err != nil || s != "old" && s != "new" || n == d.Ops() && s != "new" {
				t.Fatalf("after %d changes %q, %v", n, b, err)
			}
			if err := files.WriteFile(cut, "/d/f", []byte("newer")); err != nil {
				t.Fatal(err)
			}
		}
	}
}
