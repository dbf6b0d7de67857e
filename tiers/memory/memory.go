//go:build unix

// Package memory maps memory outside the Go heap, for what is large and lives long: the collector neither scans nor
// moves it, and huge pages spare the reader TLB misses.
package memory

import "golang.org/x/sys/unix"

// Map returns so many zeroed bytes, a multiple of a page's.
func Map(size int) ([]byte, error) {
	b, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err == nil {
		adviseHuge(b)
	}
	return b, err
}

// Unmap gives back what Map returned.
func Unmap(b []byte) error { return unix.Munmap(b) }
