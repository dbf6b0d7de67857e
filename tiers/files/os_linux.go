package files

import (
	"errors"
	"os"

	"golang.org/x/sys/unix"
)

// openDirect opens a file with O_DIRECT, or buffered where there is none.
func openDirect(name string, flags int) (f *os.File, direct bool, err error) {
	f, err = os.OpenFile(name, flags|unix.O_DIRECT, 0o600)
	if errors.Is(err, unix.EINVAL) { // the file may have been made nevertheless
		f, err = os.OpenFile(name, flags&^os.O_EXCL, 0o600)
		return f, false, err
	}
	return f, err == nil, err
}

// syncData is fdatasync: times do not matter, the size does and is included.
func syncData(fd uintptr) error {
	for {
		if err := unix.Fdatasync(int(fd)); err != unix.EINTR {
			return err
		}
	}
}

// allocate gives a file n bytes of room. Where the file system cannot, a full
// disk shows at writing.
func allocate(f *os.File, n int64) error {
	for {
		err := unix.Fallocate(int(f.Fd()), 0, 0, n)
		switch err {
		case unix.EINTR:
		case unix.EOPNOTSUPP:
			return f.Truncate(n)
		default:
			return err
		}
	}
}
