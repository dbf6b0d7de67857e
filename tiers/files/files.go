// Package files is the file system as the daemon uses it. Whatever is to
// outlive the daemon is written through an FS: extents, logs of open tails,
// small files and the catalogue. Tests put a disk in its place that fails, lies
// and loses power (package filestest).
package files

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path/filepath"

	"github.com/cockroachdb/pebble/v2/vfs"
)

// Flag says how a file is opened.
type Flag uint8

const (
	// Create makes the file; it is an error if it exists. The name is durable
	// after SyncDir.
	Create Flag = 1 << iota
	// Direct bypasses the page cache if the file system can. Offsets, lengths and
	// the addresses of buffers are then multiples of tiers.BlockSize.
	Direct
	// Read opens it for reading only, also where nothing can be written. Writing fails.
	Read
)

// FS is a file system. Errors are those of package os: fs.ErrExist,
// fs.ErrNotExist, ENOSPC.
type FS interface {
	// Open opens a file for reading and writing, unless Read is given.
	Open(name string, how Flag) (File, error)
	Remove(name string) error
	// Rename replaces newname in one step. It is durable after SyncDir.
	Rename(oldname, newname string) error
	// MkdirAll makes a directory and its parents, and makes them durable.
	MkdirAll(dir string) error
	// List returns the names in a directory.
	List(dir string) ([]string, error)
	// SyncDir makes the names in a directory durable.
	SyncDir(dir string) error
	// Free returns how many bytes may still be written.
	Free(dir string) (int64, error)
	// Lock makes a file and takes its lock until it is closed; ErrLocked if
	// somebody has it.
	Lock(name string) (io.Closer, error)
	// Share takes part in the lock of a file that exists, and changes nothing:
	// others may share it, but nobody gets it; ErrLocked if somebody has it.
	Share(name string) (io.Closer, error)
	// Pebble returns the same file system as Pebble wants it.
	Pebble() vfs.FS
}

// ErrLocked says that somebody else has the lock.
var ErrLocked = errors.New("the file is locked")

// File is an open file. Safe for concurrent use.
type File interface {
	io.ReaderAt
	io.WriterAt
	io.Closer
	Truncate(size int64) error
	// Allocate gives an empty file size bytes of room on the disk, durably.
	Allocate(size int64) error
	Size() (int64, error)
	// Direct says whether the page cache is bypassed.
	Direct() bool
	// Sync makes what was written durable. After an error nobody knows what of it
	// is, and a later Sync that succeeds does not mean that it is.
	Sync() error
}

// ReadFile returns the content of a small file.
func ReadFile(fsys FS, name string) (b []byte, err error) {
	f, err := fsys.Open(name, Read)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	n, err := f.Size()
	if err != nil {
		return nil, err
	}
	b = make([]byte, n)
	if n, err := f.ReadAt(b, 0); n < len(b) {
		return nil, fmt.Errorf("read %s: %d of %d bytes: %w", name, n, len(b), err)
	}
	return b, nil
}

// WriteFile writes a small file so that after a crash it is there as it was
// before, or whole. Not for concurrent use on one name.
func WriteFile(fsys FS, name string, b []byte) error {
	fresh := name + ".new"
	if err := fsys.Remove(fresh); err != nil && !errors.Is(err, fs.ErrNotExist) { // left by a crash
		return err
	}
	f, err := fsys.Open(fresh, Create)
	if err != nil {
		return err
	}
	n, err := f.WriteAt(b, 0)
	if err == nil && n < len(b) {
		err = io.ErrShortWrite
	}
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = fsys.Rename(fresh, name)
	}
	if err != nil {
		return errors.Join(err, fsys.Remove(fresh))
	}
	return fsys.SyncDir(filepath.Dir(name))
}
