package kernels

import "golang.org/x/sys/unix"

// mayUseTiles asks the kernel for the tile registers, which it gives to whoever asks for them
// (arch_prctl(2), ARCH_REQ_XCOMP_PERM of XTILEDATA), and says whether it did.
func mayUseTiles() bool {
	const (
		request  = 0x1023
		tileData = 18
	)
	_, _, errno := unix.RawSyscall(unix.SYS_ARCH_PRCTL, request, tileData, 0)
	return errno == 0
}
