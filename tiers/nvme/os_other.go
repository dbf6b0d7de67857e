//go:build !linux

package nvme

import "os"

func openDirect(name string, flags int) (f *os.File, direct bool, err error) {
	f, err = os.OpenFile(name, flags, 0o600)
	return f, false, err
}

func syncData(f *os.File) error { return f.Sync() }

func allocate(f *os.File, n int64) error { return f.Truncate(n) }
