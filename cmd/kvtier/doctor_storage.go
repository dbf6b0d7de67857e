package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"kvtier/cmd/internal/size"
	kvtierv1 "kvtier/proto/kvtier/v1"
)

// directBlock is what O_DIRECT wants addresses, offsets and lengths to be multiples of.
const directBlock = 4096

// checkStorage checks the data folder and the file system it is on.
func checkStorage(dir string, s *kvtierv1.GetStatusResponse) []finding {
	info, err := os.Stat(dir)
	if errors.Is(err, os.ErrNotExist) {
		return []finding{skip("data folder", "%s does not exist yet: kvtierd makes it", dir)}
	}
	if err != nil {
		return []finding{fail("data folder", "run as the user who runs kvtierd", "%v", err)}
	}
	if !info.IsDir() {
		return []finding{fail("data folder", "choose another with kvtierd --data", "%s is no folder", dir)}
	}
	probe, err := openProbe(dir)
	if err != nil {
		return []finding{fail("data folder", "it must be writable by the user who runs kvtierd", "%v", err)}
	}
	defer probe.Close()
	return []finding{
		checkDirMode(dir, info), checkFileSystem(dir), checkFree(dir, s), checkSync(probe), checkDirect(probe),
	}
}

// openProbe makes a file without a name in dir, so that nothing stays even after a crash.
func openProbe(dir string) (*os.File, error) {
	fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err == nil {
		return os.NewFile(uintptr(fd), filepath.Join(dir, "(probe)")), nil
	}
	// Not every file system has nameless files.
	f, err := os.CreateTemp(dir, ".doctor-*")
	if err != nil {
		return nil, err
	}
	return f, os.Remove(f.Name())
}

func checkDirMode(dir string, info os.FileInfo) finding {
	if perm := info.Mode().Perm(); perm&0o077 != 0 {
		return warn("data folder", "chmod 700 it, or others can read all contexts", "%s is writable, mode %04o", dir, perm)
	}
	return ok("data folder", "%s is writable, mode %04o", dir, info.Mode().Perm())
}

// fileSystems names the statfs types a data folder is likely to be on.
var fileSystems = map[int64]string{
	unix.EXT4_SUPER_MAGIC: "ext4", unix.XFS_SUPER_MAGIC: "xfs", unix.BTRFS_SUPER_MAGIC: "btrfs",
	unix.F2FS_SUPER_MAGIC: "f2fs", 0x2fc12fc1: "zfs", unix.TMPFS_MAGIC: "tmpfs",
	unix.OVERLAYFS_SUPER_MAGIC: "overlay", unix.NFS_SUPER_MAGIC: "nfs", unix.FUSE_SUPER_MAGIC: "fuse",
	unix.CIFS_SUPER_MAGIC: "cifs", unix.V9FS_MAGIC: "9p", unix.RAMFS_MAGIC: "ramfs",
}

func checkFileSystem(dir string) finding {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return fail("file system", "", "%v", err)
	}
	name := fileSystems[int64(st.Type)]
	switch name {
	case "":
		return warn("file system", "ext4 and xfs are what kvtier is tried on", "unknown type %#x", st.Type)
	case "tmpfs", "ramfs":
		return warn("file system", "nothing survives a restart of the machine; choose a folder on NVMe", "%s lies in memory", name)
	case "nfs", "cifs", "9p", "fuse":
		return warn("file system", "choose a folder on a local NVMe disk", "%s is not a local disk: slow, and its locks and syncs may promise less", name)
	case "overlay":
		return warn("file system", "mount a volume for the data folder", "overlay: a container's own layer, which ends with it")
	}
	return ok("file system", "%s", name)
}

// checkDirect writes and reads one block past the page cache, as the NVMe tier does. It changes the
// probe to direct I/O, so it comes last.
func checkDirect(probe *os.File) finding {
	const hint = "choose a folder on ext4 or xfs"
	fd := int(probe.Fd())
	if _, err := unix.FcntlInt(probe.Fd(), unix.F_SETFL, unix.O_RDWR|unix.O_DIRECT); err != nil {
		return warn("direct I/O", hint, "O_DIRECT is refused: %v", err)
	}
	out, in := alignedBlock(), alignedBlock()
	for i := range out {
		out[i] = byte(i * 7)
	}
	if _, err := unix.Pwrite(fd, out, 0); err != nil {
		return warn("direct I/O", hint, "a direct write failed: %v", err)
	}
	if n, err := unix.Pread(fd, in, 0); err != nil || n != len(in) {
		return warn("direct I/O", hint, "a direct read gave %d bytes: %v", n, err)
	}
	if !bytes.Equal(in, out) {
		return fail("direct I/O", "the disk or its driver is broken", "a block came back with other bytes")
	}
	return ok("direct I/O", "a block was written and read back past the page cache")
}

func alignedBlock() []byte {
	b := make([]byte, 2*directBlock)
	skip := -uintptr(unsafe.Pointer(&b[0])) % directBlock
	return b[skip : skip+directBlock : skip+directBlock]
}

// checkSync measures fdatasync, which bounds how soon an append is safe from a power cut.
func checkSync(probe *os.File) finding {
	const rounds = 9
	took := make([]time.Duration, 0, rounds)
	block := make([]byte, directBlock)
	for i := range rounds {
		if _, err := probe.WriteAt(block, int64(i)*directBlock); err != nil {
			return fail("sync", "is the disk full?", "%v", err)
		}
		start := time.Now()
		if err := unix.Fdatasync(int(probe.Fd())); err != nil {
			return fail("sync", "check the disk", "fdatasync: %v", err)
		}
		took = append(took, time.Since(start))
	}
	slices.Sort(took)
	median := took[rounds/2].Round(10 * time.Microsecond)
	if median > 50*time.Millisecond {
		return warn("sync", "appends will wait; choose a faster disk", "fdatasync takes %v (median of %d)", median, rounds)
	}
	return ok("sync", "fdatasync takes %v (median of %d)", median, rounds)
}

// checkFree compares what the disk has left with what the NVMe tier may still take.
func checkFree(dir string, s *kvtierv1.GetStatusResponse) finding {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return fail("free disk", "", "%v", err)
	}
	free := st.Bavail * uint64(st.Bsize)
	var wanted uint64
	for _, t := range s.GetTiers() {
		if t.GetName() == "nvme" && t.GetBytesLimit() > t.GetBytesUsed() {
			wanted = t.GetBytesLimit() - t.GetBytesUsed()
		}
	}
	text := fmt.Sprintf("%s free", size.Format(free))
	switch {
	case free < 256<<20:
		return fail("free disk", "free some space", "%s", text)
	case free < wanted:
		return warn("free disk", "lower kvtierd --disk or free some space", "%s, but the NVMe tier may still take %s", text, size.Format(wanted))
	}
	return ok("free disk", "%s", text)
}
