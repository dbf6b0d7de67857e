package nvme

// FS is the directory of the extents, as the tier uses it. Tests inject faults here.
type FS interface {
	// OpenFile opens a file for reading and writing, with direct I/O if the file
	// system can, and makes it if create is set (it is an error if it exists).
	OpenFile(name string, create bool) (File, error)
	Remove(name string) error
	// List returns the names of the files in dir, making dir if there is none.
	List(dir string) ([]string, error)
}

// File is an extent. Offsets, lengths and the addresses of buffers are
// multiples of tiers.BlockSize.
type File interface {
	ReadAt(b []byte, off int64) (int, error)
	WriteAt(b []byte, off int64) (int, error)
	// Allocate gives an empty file n bytes of room on the disk.
	Allocate(n int64) error
	Size() (int64, error)
	// Direct says whether the page cache is bypassed.
	Direct() bool
	// Sync makes what was written durable.
	Sync() error
	Close() error
}

// descriptor is what a File can offer besides: the number under which the
// kernel knows it. Then, if it is Direct, reads may go around ReadAt. Through
// the page cache the kernel would wait for each where it is submitted.
type descriptor interface {
	Descriptor() uintptr
}
