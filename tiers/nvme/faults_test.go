package nvme

import (
	"errors"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"kvtier/tiers/files"
)

// faults is the system's file system with faults that tests turn on.
type faults struct {
	files.FS
	full      atomic.Int64 // Allocate beyond this many bytes is ENOSPC; 0: never
	free      atomic.Int64 // Free says so; 0: the system's, less than 0: an error
	writeFull atomic.Bool  // WriteAt is ENOSPC
	failRead  atomic.Bool  // ReadAt is EIO
	failWrite atomic.Bool  // WriteAt is EIO
	failSync  atomic.Bool
	stays     atomic.Pointer[string] // files whose names begin so cannot be removed
	failClose atomic.Bool
	short     atomic.Bool // reads and writes stop half way
	flip      atomic.Bool // a bit of what is read is wrong
	slow      atomic.Int64
	reading   atomic.Int64 // reads under way, and the most there were
	most      atomic.Int64
	reads     atomic.Int64
	syncs     atomic.Int64
	gate      atomic.Pointer[gate]   // reads wait for it
	writing   atomic.Pointer[func()] // called once, before a write
}

// gate keeps reads of a place back until it is opened.
type gate struct {
	shut func(off int64) bool // nil: all
	open chan struct{}
}

// close shuts a gate, and returns what opens it.
func (s *faults) close(shut func(off int64) bool) (open func()) {
	g := &gate{shut, make(chan struct{})}
	s.gate.Store(g)
	return func() {
		s.gate.Store(nil)
		close(g.open)
	}
}

func (s *faults) Open(name string, how files.Flag) (files.File, error) {
	f, err := s.FS.Open(name, how)
	if err != nil {
		return nil, err
	}
	return &faultyFile{f, s}, nil
}

func (s *faults) Remove(name string) error {
	if stays := s.stays.Load(); stays != nil && strings.HasPrefix(filepath.Base(name), *stays) {
		return syscall.EBUSY
	}
	return s.FS.Remove(name)
}

func (s *faults) Free(dir string) (int64, error) {
	switch free := s.free.Load(); {
	case free < 0:
		return 0, errors.New("nobody knows")
	case free > 0:
		return free, nil
	}
	return s.FS.Free(dir)
}

type faultyFile struct {
	files.File
	s *faults
}

func (f *faultyFile) Allocate(n int64) error {
	if full := f.s.full.Load(); full > 0 && n > full {
		return syscall.ENOSPC
	}
	return f.File.Allocate(n)
}

func (f *faultyFile) ReadAt(b []byte, off int64) (int, error) {
	n := f.s.reading.Add(1)
	defer f.s.reading.Add(-1)
	for m := f.s.most.Load(); n > m && !f.s.most.CompareAndSwap(m, n); m = f.s.most.Load() {
	}
	f.s.reads.Add(1)
	time.Sleep(time.Duration(f.s.slow.Load()))
	if g := f.s.gate.Load(); g != nil && (g.shut == nil || g.shut(off)) {
		<-g.open
	}
	switch {
	case f.s.failRead.Load():
		return 0, syscall.EIO
	case f.s.short.Load():
		return f.File.ReadAt(b[:len(b)/2/4096*4096], off)
	}
	got, err := f.File.ReadAt(b, off)
	if f.s.flip.Load() && got > 0 {
		b[got-1] ^= 1
	}
	return got, err
}

func (f *faultyFile) WriteAt(b []byte, off int64) (int, error) {
	if before := f.s.writing.Swap(nil); before != nil {
		(*before)()
	}
	switch {
	case f.s.writeFull.Load():
		return 0, syscall.ENOSPC
	case f.s.failWrite.Load():
		return 0, syscall.EIO
	case f.s.short.Load():
		return f.File.WriteAt(b[:len(b)/2/4096*4096], off)
	}
	return f.File.WriteAt(b, off)
}

func (f *faultyFile) Close() error {
	err := f.File.Close()
	if f.s.failClose.Load() {
		return syscall.EIO
	}
	return err
}

func (f *faultyFile) Sync() error {
	f.s.syncs.Add(1)
	if f.s.failSync.Load() {
		return errors.New("sync failed")
	}
	return f.File.Sync()
}
