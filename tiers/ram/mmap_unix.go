//go:build unix

package ram

import "golang.org/x/sys/unix"

// mapMemory maps zeroed memory outside the Go heap: the collector neither
// scans nor moves it, and huge pages spare the reader TLB misses.
func mapMemory(size int) ([]byte, error) {
	b, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err == nil {
		adviseHuge(b)
	}
	return b, err
}

func unmapMemory(b []byte) error { return unix.Munmap(b) }
