package filestest

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"path"
	"sync"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"

	"kvtier/tiers/files"
)

// Pebble implements files.FS.
func (d *Disk) Pebble() vfs.FS { return pebbleFS{d} }

// pebbleFS shows a disk as Pebble wants it.
type pebbleFS struct{ d *Disk }

var _ vfs.FS = pebbleFS{}

func (p pebbleFS) open(name string, how files.Flag) (vfs.File, error) {
	p.d.mu.Lock()
	defer p.d.mu.Unlock()
	f, err := p.d.openLocked(name, how)
	if err != nil {
		return nil, err
	}
	f.pebble = true
	return &pebbleFile{File: f, p: p, name: name}, nil
}

func (p pebbleFS) Create(name string, _ vfs.DiskWriteCategory) (vfs.File, error) {
	if err := p.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	return p.open(name, files.Create)
}

func (p pebbleFS) Link(oldname, newname string) error {
	d := p.d
	d.mu.Lock()
	defer d.mu.Unlock()
	child, err := d.findLocked(oldname)
	if err != nil {
		return err
	}
	dir, base, err := d.dirLocked(newname)
	if err != nil {
		return err
	}
	if _, ok := d.mu.live.nodes[dir].names[base]; ok {
		return failure("link", newname, fs.ErrExist)
	}
	d.doLocked(op{kind: opLink, node: dir, name: base, child: child, path: path.Dir(newname)})
	return nil
}

func (p pebbleFS) Open(name string, opts ...vfs.OpenOption) (vfs.File, error) {
	f, err := p.open(name, 0)
	if err == nil {
		for _, o := range opts {
			o.Apply(f)
		}
	}
	return f, err
}

func (p pebbleFS) OpenReadWrite(name string, _ vfs.DiskWriteCategory, opts ...vfs.OpenOption) (vfs.File, error) {
	f, err := p.Open(name, opts...)
	if errors.Is(err, fs.ErrNotExist) {
		return p.open(name, files.Create)
	}
	return f, err
}

func (p pebbleFS) OpenDir(name string) (vfs.File, error) {
	if _, err := p.d.List(name); err != nil {
		return nil, err
	}
	return &pebbleFile{p: p, name: name}, nil
}

func (p pebbleFS) Remove(name string) error {
	p.d.mu.Lock()
	defer p.d.mu.Unlock()
	return p.d.removeLocked(name)
}

func (p pebbleFS) RemoveAll(name string) error {
	if names, err := p.d.List(name); err == nil {
		for _, child := range names {
			if err := p.RemoveAll(path.Join(name, child)); err != nil {
				return err
			}
		}
	}
	if err := p.Remove(name); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

func (p pebbleFS) Rename(oldname, newname string) error {
	p.d.mu.Lock()
	defer p.d.mu.Unlock()
	return p.d.renameLocked(oldname, newname)
}

func (p pebbleFS) ReuseForWrite(oldname, newname string, _ vfs.DiskWriteCategory) (vfs.File, error) {
	if err := p.Rename(oldname, newname); err != nil {
		return nil, err
	}
	return p.open(newname, 0)
}

func (p pebbleFS) MkdirAll(dir string, _ os.FileMode) error {
	p.d.mu.Lock()
	defer p.d.mu.Unlock()
	return p.d.mkdirLocked(dir, true)
}

func (p pebbleFS) Lock(name string) (io.Closer, error) { return p.d.Lock(name) }

func (p pebbleFS) List(dir string) ([]string, error) { return p.d.List(dir) }

func (p pebbleFS) Stat(name string) (vfs.FileInfo, error) {
	p.d.mu.Lock()
	defer p.d.mu.Unlock()
	id, err := p.d.findLocked(name)
	if err != nil {
		return nil, err
	}
	n := p.d.mu.live.nodes[id]
	return info{path.Base(name), int64(len(n.data)), n.names != nil}, nil
}

func (pebbleFS) PathBase(name string) string    { return path.Base(name) }
func (pebbleFS) PathJoin(elem ...string) string { return path.Join(elem...) }
func (pebbleFS) PathDir(name string) string     { return path.Dir(name) }
func (pebbleFS) Unwrap() vfs.FS                 { return nil }
func (pebbleFS) GetDiskUsage(string) (vfs.DiskUsage, error) {
	return vfs.DiskUsage{AvailBytes: 1 << 40, TotalBytes: 1 << 40}, nil
}

// pebbleFile is a file or, without a File, a directory that is opened to sync it.
type pebbleFile struct {
	files.File
	p    pebbleFS
	name string
	mu   struct {
		sync.Mutex
		at int64 // where Read and Write go on
	}
}

func (f *pebbleFile) Read(b []byte) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	n, err := f.ReadAt(b, f.mu.at)
	f.mu.at += int64(n)
	if n > 0 && errors.Is(err, io.EOF) {
		err = nil
	}
	return n, err
}

func (f *pebbleFile) Write(b []byte) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	n, err := f.WriteAt(b, f.mu.at)
	f.mu.at += int64(n)
	return n, err
}

func (f *pebbleFile) Sync() error {
	if f.File != nil {
		return f.File.Sync()
	}
	d := f.p.d
	d.mu.Lock()
	defer d.mu.Unlock()
	id, err := d.findLocked(f.name)
	if err != nil {
		return err
	}
	d.doLocked(op{kind: opSync, node: id, path: f.name})
	return nil
}

func (f *pebbleFile) SyncData() error { return f.Sync() }

// SyncTo promises nothing.
func (f *pebbleFile) SyncTo(int64) (fullSync bool, err error) { return false, nil }

func (f *pebbleFile) Close() error {
	if f.File == nil {
		return nil
	}
	return f.File.Close()
}

func (f *pebbleFile) Stat() (vfs.FileInfo, error) {
	if f.File == nil {
		return info{path.Base(f.name), 0, true}, nil
	}
	n, err := f.Size()
	return info{path.Base(f.name), n, false}, err
}

func (*pebbleFile) Preallocate(int64, int64) error { return nil }
func (*pebbleFile) Prefetch(int64, int64) error    { return nil }
func (*pebbleFile) Fd() uintptr                    { return vfs.InvalidFd }

type info struct {
	name string
	size int64
	dir  bool
}

func (i info) Name() string         { return i.name }
func (i info) Size() int64          { return i.size }
func (i info) IsDir() bool          { return i.dir }
func (info) ModTime() time.Time     { return time.Time{} }
func (info) Sys() any               { return nil }
func (info) DeviceID() vfs.DeviceID { return vfs.DeviceID{} }
func (i info) Mode() fs.FileMode {
	if i.dir {
		return fs.ModeDir | 0o700
	}
	return 0o600
}
