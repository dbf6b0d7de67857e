package store

import (
	"io"
	"path"
	"strings"
	"sync"

	"github.com/cockroachdb/pebble/v2/vfs"
)

// readOnce reads Pebble's logs and manifests once and remembers them. Pebble
// takes the first record that does not check for the end of such a file, and
// what it opens for writing it then writes anew without the rest: a read that
// went wrong would cost what was committed. So the catalogue is opened for
// reading and checked first, and opened for writing from the same bytes.
type readOnce struct {
	vfs.FS
	mu struct {
		sync.Mutex
		files map[string][]byte // nil once nothing is to be remembered
	}
}

func newReadOnce(fs vfs.FS) *readOnce {
	r := &readOnce{FS: fs}
	r.mu.files = map[string][]byte{}
	return r
}

// forget ends it.
func (r *readOnce) forget() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.mu.files = nil
}

// Open opens a file for reading.
func (r *readOnce) Open(name string, opts ...vfs.OpenOption) (vfs.File, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.mu.files == nil || path.Ext(name) != ".log" && !strings.HasPrefix(path.Base(name), "MANIFEST-") {
		return r.FS.Open(name, opts...)
	}
	b, ok := r.mu.files[name]
	if !ok {
		f, err := r.FS.Open(name, opts...)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		st, err := f.Stat()
		if err != nil {
			return nil, err
		}
		b = make([]byte, st.Size())
		if _, err := io.ReadFull(f, b); err != nil {
			return nil, err
		}
		r.mu.files[name] = b
	}
	return vfs.NewMemFile(b), nil // read only: the bytes stay as they are
}
