package store

import (
	"errors"
	"sync/atomic"
	"syscall"
	"testing"

	"kvtier/tiers"
	"kvtier/tiers/files"
)

// smallDisk is a file system of which extents take what is left.
type smallDisk struct {
	files.FS
	left atomic.Int64
}

func (d *smallDisk) Free(string) (int64, error) { return d.left.Load(), nil }

func (d *smallDisk) Open(name string, how files.Flag) (files.File, error) {
	f, err := d.FS.Open(name, how)
	if err != nil {
		return nil, err
	}
	return &smallDiskFile{f, d}, nil
}

type smallDiskFile struct {
	files.File
	d *smallDisk
}

func (f *smallDiskFile) Allocate(n int64) error {
	if n > f.d.left.Load() {
		return syscall.ENOSPC
	}
	f.d.left.Add(-n)
	return f.File.Allocate(n)
}

// On a file system with less room than the tier may take, what is stored can be
// removed when it is full, and then there is room again.
func TestFullFileSystem(t *testing.T) {
	d := &smallDisk{FS: files.OS}
	d.left.Store(20<<20 + 512<<10)
	s, err := Open(t.Context(), t.TempDir(), Options{RAMBytes: 32 << 20, DiskBytes: 64 << 20, FS: d})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	put := func(seed uint64) (tiers.ID, error) {
		h, parts := sealed(seed)
		b := s.NewBatch()
		defer b.Close()
		err := b.PutSegment(t.Context(), h, parts)
		if err == nil {
			err = b.Commit(t.Context())
		}
		return h.ID, err
	}
	var ids []tiers.ID
	for err == nil {
		var id tiers.ID
		if id, err = put(uint64(len(ids))); err == nil {
			ids = append(ids, id)
		}
	}
	if !errors.Is(err, tiers.ErrFull) || len(ids) == 0 {
		t.Fatalf("after %d segments: %v", len(ids), err)
	}
	b := s.NewBatch()
	defer b.Close()
	for _, id := range ids {
		if err := b.DropSegment(id); err != nil {
			t.Fatal(err)
		}
	}
	if err := b.Commit(t.Context()); err != nil {
		t.Fatalf("%d bytes are left: %v", d.left.Load(), err)
	}
	if _, err := put(uint64(len(ids))); err != nil {
		t.Error(err)
	}
}
