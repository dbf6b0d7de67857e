package nvme

import (
	"errors"
	"os"
	"path/filepath"
)

// osFS is the operating system's file system.
type osFS struct{}

func (osFS) OpenFile(name string, create bool) (File, error) {
	flags := os.O_RDWR
	if create {
		flags |= os.O_CREATE | os.O_EXCL
	}
	f, direct, err := openDirect(name, flags)
	if err != nil {
		return nil, err
	}
	if create {
		if err := syncDir(filepath.Dir(name)); err != nil {
			return nil, errors.Join(err, f.Close(), os.Remove(name))
		}
	}
	return &osFile{f, direct}, nil
}

func (osFS) Remove(name string) error { return os.Remove(name) }

func (osFS) List(dir string) ([]string, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
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

// syncDir makes the names in a directory durable.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

type osFile struct {
	*os.File
	direct bool
}

func (f *osFile) Direct() bool { return f.direct }

func (f *osFile) Descriptor() uintptr { return f.Fd() }

func (f *osFile) Sync() error { return syncData(f.File) }

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
