package server

import (
	"fmt"
	"net"
	"os"

	"golang.org/x/sys/unix"
)

// oobBytes holds one read's descriptors. The kernel drops what does not fit.
var oobBytes = unix.CmsgSpace(2 * 4)

// admit says whether the peer may use the daemon: its own user or root.
func admit(conn *net.UnixConn) (pid int32, err error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	if e := raw.Control(func(fd uintptr) {
		cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); e != nil {
		return 0, e
	}
	if err != nil {
		return 0, fmt.Errorf("peer credentials: %w", err)
	}
	if cred.Uid != 0 && int(cred.Uid) != os.Geteuid() {
		return 0, fmt.Errorf("process %d is user %d's, not user %d's or root's", cred.Pid, cred.Uid, os.Geteuid())
	}
	return cred.Pid, nil
}

// hungUp says whether the peer closed its end.
func hungUp(conn *net.UnixConn) (gone bool) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return true
	}
	err = raw.Control(func(fd uintptr) {
		p := []unix.PollFd{{Fd: int32(fd)}}
		n, err := unix.Poll(p, 0)
		gone = err == nil && n > 0 && p[0].Revents&(unix.POLLHUP|unix.POLLERR) != 0
	})
	return gone || err != nil
}

// descriptors returns what came with SCM_RIGHTS.
func descriptors(oob []byte) (fds []int) {
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil
	}
	for i := range msgs {
		if f, err := unix.ParseUnixRights(&msgs[i]); err == nil {
			fds = append(fds, f...)
		}
	}
	return fds
}

func closeDescriptor(fd int) { _ = unix.Close(fd) }

// regionSeals keep a region's size from changing under the daemon.
const regionSeals = unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_SEAL

// mapRegion maps a sealed memfd of exactly size bytes. Seals come first: the
// size of a sealed file stays what it is.
func mapRegion(fd int, size int64) ([]byte, error) {
	seals, err := unix.FcntlInt(uintptr(fd), unix.F_GET_SEALS, 0)
	if err != nil {
		return nil, invalid(ReasonRegion, "the descriptor is no memfd: %v", err)
	}
	if seals&regionSeals != regionSeals {
		return nil, invalid(ReasonRegion, "the memfd has seals %#x: add F_SEAL_SHRINK, F_SEAL_GROW and F_SEAL_SEAL before sending it", seals)
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, invalid(ReasonRegion, "the descriptor's size: %v", err)
	}
	if st.Size != size {
		return nil, invalid(ReasonRegion, "the memfd has %d bytes, not %d", st.Size, size)
	}
	b, err := unix.Mmap(fd, 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, invalid(ReasonRegion, "the memfd cannot be mapped for reading and writing: %v", err)
	}
	return b, nil
}

func unmapRegion(b []byte) error { return unix.Munmap(b) }
