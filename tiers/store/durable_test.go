package store

import (
	"errors"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"

	"kvtier/tiers/files"
	"kvtier/tiers/files/filestest"
)

const durableDir = "/data/kvtier"

// ownSyncs is a disk on which Pebble's syncs of the data folder do nothing: what
// is durable there then is so by the store's own doing.
type ownSyncs struct{ *filestest.Disk }

func (d ownSyncs) Pebble() vfs.FS { return ownSyncsPebble{d.Disk.Pebble()} }

type ownSyncsPebble struct{ vfs.FS }

func (p ownSyncsPebble) OpenDir(name string) (vfs.File, error) {
	f, err := p.FS.OpenDir(name)
	if name == durableDir {
		f = unsynced{f}
	}
	return f, err
}

type unsynced struct{ vfs.File }

func (unsynced) Sync() error { return nil }

// openAndClose opens a store and closes it; opened is how many changes the disk
// had seen when it was open.
func openAndClose(t *testing.T, fsys files.FS, disk *filestest.Disk) (opened int) {
	t.Helper()
	s, err := Open(t.Context(), durableDir, Options{RAMBytes: 1 << 20, DiskBytes: 1 << 20, FS: fsys})
	if err != nil {
		t.Fatal(err)
	}
	opened = disk.Ops()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	return opened
}

// What a store made or found in its folder when it was opened is there after a
// power cut, the folder itself included: also what a process left that was
// killed before it had made a name durable.
func TestOpenMakesNamesDurable(t *testing.T) {
	first := filestest.NewDisk()
	openAndClose(t, first, first)
	if err := files.WriteFile(first, durableDir+"/small", []byte("x")); err != nil {
		t.Fatal(err)
	}
	for n := range first.Ops() + 1 {
		disk := first.Kill(n)
		opened := openAndClose(t, disk, disk)
		made, err := disk.List(durableDir)
		if err != nil {
			t.Fatal(err)
		}
		wantDurable(t, disk, opened, made)

		disk = first.Kill(n)
		found, _ := disk.List(durableDir) // there may be no folder yet
		wantDurable(t, disk, openAndClose(t, ownSyncs{disk}, disk), found)
	}
}

// wantDurable cuts power behind the first changes: names must be left.
func wantDurable(t *testing.T, disk *filestest.Disk, changes int, names []string) {
	t.Helper()
	for seed := range uint64(10) {
		cut := disk.PowerCut(changes, rand.New(rand.NewPCG(seed, uint64(changes))))
		left, err := cut.List(durableDir)
		for _, name := range names {
			if !slices.Contains(left, name) && !strings.HasSuffix(name, ".new") { // those are nobody's yet
				err = errors.Join(err, errors.New(name+" is gone"))
			}
		}
		if err != nil {
			t.Fatalf("%v after\n%s", err, disk.Trace(0, changes))
		}
		openAndClose(t, cut, cut)
	}
}
