package store

import (
	"errors"
	"os"
	"os/exec"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"

	"kvtier/tiers"
	"kvtier/tiers/files"
)

func putOne(t *testing.T, s *Store, seed uint64) *tiers.Header {
	t.Helper()
	h, parts := sealedLow(seed)
	b := s.NewBatch()
	defer b.Close()
	if err := b.PutSegment(t.Context(), h, parts); err != nil {
		t.Fatal(err)
	}
	if err := b.Commit(t.Context()); err != nil {
		t.Fatal(err)
	}
	return h
}

// Low planes that are dropped of a segment that is gone by then do not bring it back, over what lies in its place now.
func TestDropLowOfADroppedSegment(t *testing.T) {
	for seed := uint64(1); seed <= 8; seed++ { // which record comes first at a start is chance
		dir, o := t.TempDir(), Options{RAMBytes: 32 << 20, DiskBytes: 64 << 20}
		s := openAt(t, dir, o)
		old := putOne(t, s, seed)
		low, all := s.NewBatch(), s.NewBatch()
		low.DropLow(old)
		if err := errors.Join(all.DropSegment(old.ID), all.Commit(t.Context()), low.Commit(t.Context())); err != nil {
			t.Fatal(err)
		}
		live := putOne(t, s, 100+seed) // takes the room
		if err := errors.Join(low.Close(), all.Close(), s.Close()); err != nil {
			t.Fatal(err)
		}
		s = openAt(t, dir, o)
		if _, err := s.Header(old.ID); err == nil {
			t.Errorf("seed %d: the segment that was dropped is back", seed)
		}
		if err := s.Verify(t.Context(), live); err != nil {
			t.Errorf("seed %d: %v", seed, err)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// Low planes go once, however often that is asked for.
func TestDropLowTwice(t *testing.T) {
	dir, o := t.TempDir(), Options{RAMBytes: 32 << 20, DiskBytes: 64 << 20}
	s := openAt(t, dir, o)
	h := putOne(t, s, 1)
	if !s.HasLow(h.ID) {
		t.Fatal("no low planes")
	}
	for range 2 {
		b := s.NewBatch()
		b.DropLow(h)
		b.DropLow(h)
		if err := errors.Join(b.Commit(t.Context()), b.Close()); err != nil {
			t.Fatal(err)
		}
		if s.HasLow(h.ID) {
			t.Error("low planes are there")
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = openAt(t, dir, o)
	defer s.Close()
	if err := s.Verify(t.Context(), h); err != nil || s.HasLow(h.ID) {
		t.Errorf("after a start: low planes %v, %v", s.HasLow(h.ID), err)
	}
}

// failingLogs are a file system on which the catalogue's logs cannot be made durable while fail is set.
type failingLogs struct {
	files.FS
	fail atomic.Bool
}

func (f *failingLogs) Pebble() vfs.FS { return &failingPebble{f.FS.Pebble(), f} }

type failingPebble struct {
	vfs.FS
	f *failingLogs
}

func (p *failingPebble) Create(name string, c vfs.DiskWriteCategory) (vfs.File, error) {
	return p.wrap(p.FS.Create(name, c))
}

func (p *failingPebble) ReuseForWrite(old, name string, c vfs.DiskWriteCategory) (vfs.File, error) {
	return p.wrap(p.FS.ReuseForWrite(old, name, c))
}

func (p *failingPebble) wrap(f vfs.File, err error) (vfs.File, error) {
	if err != nil {
		return nil, err
	}
	return &failingFile{f, p.f}, nil
}

type failingFile struct {
	vfs.File
	f *failingLogs
}

func (f *failingFile) Sync() error     { return f.syncs(f.File.Sync) }
func (f *failingFile) SyncData() error { return f.syncs(f.File.SyncData) }

func (f *failingFile) syncs(sync func() error) error {
	if f.f.fail.Load() {
		return syscall.EIO
	}
	return sync()
}

const (
	folderVariable = "KVTIER_TEST_FAILING_FOLDER"
	wentOn         = "the process went on"
)

// A commit that cannot be made durable ends the process, whoever recovers panics: nobody goes on with room that the catalogue may give to others.
func TestFailedCommitEndsTheProcess(t *testing.T) {
	if dir := os.Getenv(folderVariable); dir != "" {
		commitOnFailingDisk(t, dir)
		return
	}
	dir := t.TempDir()
	self := exec.Command(os.Args[0], "-test.run=^TestFailedCommitEndsTheProcess$")
	self.Env = append(os.Environ(), folderVariable+"="+dir)
	out, err := self.CombinedOutput()
	if err == nil || strings.Contains(string(out), wentOn) || !strings.Contains(string(out), syscall.EIO.Error()) {
		t.Fatalf("it ended with %v and said\n%s", err, out)
	}
	s := openAt(t, dir, Options{RAMBytes: 32 << 20, DiskBytes: 64 << 20})
	defer s.Close()
	found := 0
	for seed := uint64(1); seed <= 2; seed++ { // the second may have been committed
		h, _ := sealedLow(seed)
		if _, err := s.Header(h.ID); err == nil {
			found++
			if err := s.Verify(t.Context(), h); err != nil {
				t.Error(err)
			}
		}
	}
	if found == 0 {
		t.Error("what was committed before is gone")
	}
}

// commitOnFailingDisk commits a segment, another one that the disk refuses, and a third one, as calls do whose panics are recovered.
func commitOnFailingDisk(t *testing.T, dir string) {
	disk := &failingLogs{FS: files.OS}
	s := openAt(t, dir, Options{RAMBytes: 32 << 20, DiskBytes: 64 << 20, FS: disk})
	putOne(t, s, 1)
	disk.fail.Store(true)
	func() {
		defer func() { _ = recover() }()
		putOne(t, s, 2)
	}()
	disk.fail.Store(false)
	putOne(t, s, 3)
	t.Fatal(wentOn)
}

func openAt(t *testing.T, dir string, o Options) *Store {
	t.Helper()
	s, err := Open(t.Context(), dir, o)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// A segment that was put and is dropped, with another of the same bytes, before it is committed is put again.
func TestPutBesideRemoval(t *testing.T) {
	s := openAt(t, t.TempDir(), Options{RAMBytes: 32 << 20, DiskBytes: 64 << 20})
	defer s.Close()
	h, parts := sealedLow(1)
	first, drop := s.NewBatch(), s.NewBatch()
	if err := errors.Join(first.PutSegment(t.Context(), h, parts), drop.DropSegment(h.ID), drop.Commit(t.Context())); err != nil {
		t.Fatal(err)
	}
	if err := first.Commit(t.Context()); !errors.Is(err, ErrVanished) {
		t.Fatalf("committed: %v", err)
	}
	if err := errors.Join(first.Close(), drop.Close()); err != nil {
		t.Fatal(err)
	}
	if err := s.Verify(t.Context(), putOne(t, s, 1)); err != nil {
		t.Error(err)
	}
}
