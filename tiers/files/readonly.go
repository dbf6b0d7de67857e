package files

import (
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/cockroachdb/pebble/v2/vfs"
)

// ErrReadOnly says that a change was refused.
var ErrReadOnly = errors.New("nothing may be written here")

// ReadOnly returns fsys as one that cannot be written: what would change it
// fails with ErrReadOnly, and locks are shared. So what reads a folder through
// it leaves no trace, whatever code does the reading.
func ReadOnly(fsys FS) FS { return readOnly{fsys} }

type readOnly struct{ FS }

func refuse(what, name string) error { return fmt.Errorf("%s %s: %w", what, name, ErrReadOnly) }

func (r readOnly) Open(name string, how Flag) (File, error) {
	if how&Create != 0 {
		return nil, refuse("create", name)
	}
	return r.FS.Open(name, how|Read)
}

func (readOnly) Remove(name string) error       { return refuse("remove", name) }
func (readOnly) Rename(name, _ string) error    { return refuse("rename", name) }
func (readOnly) SyncDir(string) error           { return nil } // there is nothing to sync
func (r readOnly) Pebble() vfs.FS               { return readOnlyPebble{r.FS.Pebble()} }
func (readOnly) Free(string) (n int64, _ error) { return 0, nil }

func (r readOnly) MkdirAll(dir string) error {
	if _, err := r.List(dir); err != nil {
		return refuse("make", dir)
	}
	return nil
}

func (r readOnly) Lock(name string) (io.Closer, error) { return r.Share(name) }

// readOnlyPebble is the same for Pebble.
type readOnlyPebble struct{ vfs.FS }

func (readOnlyPebble) Create(name string, _ vfs.DiskWriteCategory) (vfs.File, error) {
	return nil, refuse("create", name)
}

func (readOnlyPebble) OpenReadWrite(name string, _ vfs.DiskWriteCategory, _ ...vfs.OpenOption) (vfs.File, error) {
	return nil, refuse("write", name)
}

func (readOnlyPebble) ReuseForWrite(name, _ string, _ vfs.DiskWriteCategory) (vfs.File, error) {
	return nil, refuse("write", name)
}

func (readOnlyPebble) Link(_, name string) error                 { return refuse("link", name) }
func (readOnlyPebble) Remove(name string) error                  { return refuse("remove", name) }
func (readOnlyPebble) RemoveAll(name string) error               { return refuse("remove", name) }
func (readOnlyPebble) Rename(name, _ string) error               { return refuse("rename", name) }
func (readOnlyPebble) MkdirAll(name string, _ os.FileMode) error { return refuse("make", name) }
func (readOnlyPebble) Unwrap() vfs.FS                            { return nil }

// Lock takes no lock of Pebble's own, which would make a file: who opens a
// database through this has the lock of what is around it.
func (readOnlyPebble) Lock(string) (io.Closer, error) { return io.NopCloser(nil), nil }
