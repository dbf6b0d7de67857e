//go:build !linux

package files

import (
	"os"

	"golang.org/x/sys/unix"
)

func openDirect(name string, flags int) (f *os.File, direct bool, err error) {
	f, err = os.OpenFile(name, flags, 0o600)
	return f, false, err
}

func syncData(fd uintptr) error { return unix.Fsync(int(fd)) }

func allocate(f *os.File, n int64) error { return f.Truncate(n) }
