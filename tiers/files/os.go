package files

import (
	"errors"
	"io"
	"os"
	"path/filepath"

	"github.com/cockroachdb/pebble/v2/vfs"
	"golang.org/x/sys/unix"
)

// OS is the operating system's file system.
var OS FS = osFS{}

type osFS struct{}

func (osFS) Open(name string, how Flag) (File, error) {
	flags := os.O_RDWR
	if how&Read != 0 {
		flags = os.O_RDONLY
	}
	if how&Create != 0 {
		flags |= os.O_CREATE | os.O_EXCL
	}
	if how&Direct != 0 {
		f, direct, err := openDirect(name, flags)
		if err != nil {
			return nil, err
		}
		return &osFile{f, direct}, nil
	}
	f, err := os.OpenFile(name, flags, 0o600)
	if err != nil {
		return nil, err
	}
	return &osFile{File: f}, nil
}

func (osFS) Remove(name string) error { return os.Remove(name) }

func (osFS) Rename(oldname, newname string) error { return os.Rename(oldname, newname) }

func (o osFS) MkdirAll(dir string) error {
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		return os.MkdirAll(dir, 0o700) // a file in its place is an error
	}
	parent := filepath.Dir(dir)
	if err := o.MkdirAll(parent); err != nil {
		return err
	}
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	return o.SyncDir(parent)
}

func (osFS) List(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	names := make([]string, len(entries))
	for i, e := range entries {
		names[i] = e.Name()
	}
	return names, nil
}

func (osFS) SyncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

func (osFS) Free(dir string) (int64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return 0, err
	}
	return int64(st.Bavail) * int64(st.Bsize), nil
}

func (osFS) Lock(name string) (io.Closer, error) {
	return flock(name, os.O_CREATE|os.O_RDWR, unix.LOCK_EX)
}

func (osFS) Share(name string) (io.Closer, error) { return flock(name, os.O_RDONLY, unix.LOCK_SH) }

func flock(name string, flags, how int) (io.Closer, error) {
	f, err := os.OpenFile(name, flags, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), how|unix.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			err = ErrLocked
		}
		return nil, err
	}
	return f, nil
}

func (osFS) Pebble() vfs.FS { return vfs.Default }

type osFile struct {
	*os.File
	direct bool
}

func (f *osFile) Direct() bool { return f.direct }

// Descriptor is the number under which the kernel knows the file.
func (f *osFile) Descriptor() uintptr { return f.Fd() }

// Sync holds on to the file's descriptor: the file may be closed meanwhile,
// and its number be another file's.
func (f *osFile) Sync() error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	if e := raw.Control(func(fd uintptr) { err = syncData(fd) }); e != nil {
		return e
	}
	return err
}

func (f *osFile) Size() (int64, error) {
	i, err := f.Stat()
	if err != nil {
		return 0, err
	}
	return i.Size(), nil
}

func (f *osFile) Allocate(n int64) error {
	if err := allocate(f.File, n); err != nil {
		return err
	}
	return f.Sync()
}
