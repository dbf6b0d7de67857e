package memory

import "golang.org/x/sys/unix"

// adviseHuge asks for huge pages. A kernel without them says no, and reading is slower.
func adviseHuge(b []byte) { _ = unix.Madvise(b, unix.MADV_HUGEPAGE) }
