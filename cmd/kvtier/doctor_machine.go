package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/cpu"
	"golang.org/x/sys/unix"

	"kvtier/attention/kernels"
	"kvtier/cmd/internal/size"
	kvtierv1 "kvtier/proto/kvtier/v1"
)

func checkMachine(s *kvtierv1.GetStatusResponse) []finding {
	memInfo, _ := os.ReadFile("/proc/meminfo")
	cgroupLimit, _ := os.ReadFile("/sys/fs/cgroup/memory.max")
	hugePages, _ := os.ReadFile("/sys/kernel/mm/transparent_hugepage/enabled")
	clockSource, _ := os.ReadFile("/sys/devices/system/clocksource/clocksource0/current_clocksource")
	return []finding{
		checkMemory(memInfo, cgroupLimit, s), checkNoFile(), checkMemLock(), checkHugePages(string(hugePages)),
		checkCPU(), checkMemfd(), checkClock(strings.TrimSpace(string(clockSource)), time.Now()),
	}
}

// checkMemory compares the machine's memory, or the container's, with the daemon's limits.
func checkMemory(memInfo, cgroupLimit []byte, s *kvtierv1.GetStatusResponse) finding {
	total := memInfoBytes(memInfo, "MemTotal:")
	if n, err := strconv.ParseUint(strings.TrimSpace(string(cgroupLimit)), 10, 64); err == nil && n < total {
		total = n
	}
	if total == 0 {
		return skip("memory", "/proc/meminfo cannot be read")
	}
	limits := s.GetTailBytesLimit()
	for _, t := range s.GetTiers() {
		if t.GetName() == "ram" {
			limits += t.GetBytesLimit()
		}
	}
	text := fmt.Sprintf("%s, %s available", size.Format(total), size.Format(memInfoBytes(memInfo, "MemAvailable:")))
	if limits > total/10*9 {
		return warn("memory", "lower kvtierd --ram and --tail", "%s, but the daemon's limits add up to %s", text, size.Format(limits))
	}
	return ok("memory", "%s", text)
}

// memInfoBytes reads one field of /proc/meminfo, which counts in KiB.
func memInfoBytes(memInfo []byte, field string) uint64 {
	lines := bufio.NewScanner(bytes.NewReader(memInfo))
	for lines.Scan() {
		if f := strings.Fields(lines.Text()); len(f) >= 2 && f[0] == field {
			n, _ := strconv.ParseUint(f[1], 10, 64)
			return n << 10
		}
	}
	return 0
}

func checkNoFile() finding {
	var r unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &r); err != nil {
		return skip("open files", "%v", err)
	}
	// Go raises the soft limit to the hard one by itself, so only the hard one matters.
	if r.Max < 4096 {
		return warn("open files", "raise it: ulimit -Hn, or LimitNOFILE= in a unit", "limit %s", limitText(r.Max))
	}
	return ok("open files", "limit %s (of this shell; the daemon's may differ)", limitText(r.Max))
}

func checkMemLock() finding {
	var r unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_MEMLOCK, &r); err != nil {
		return skip("locked memory", "%v", err)
	}
	if r.Cur < 64<<10 {
		return warn("locked memory", "raise it: ulimit -l, or LimitMEMLOCK= in a unit", "limit %d bytes", r.Cur)
	}
	text := "unlimited"
	if r.Cur != unix.RLIM_INFINITY {
		text = size.Format(r.Cur)
	}
	return ok("locked memory", "limit %s (of this shell; the daemon's may differ)", text)
}

func limitText(n uint64) string {
	if n == unix.RLIM_INFINITY {
		return "unlimited"
	}
	return count(n)
}

// checkHugePages reads a line such as "always [madvise] never".
func checkHugePages(enabled string) finding {
	_, rest, found := strings.Cut(enabled, "[")
	mode, _, _ := strings.Cut(rest, "]")
	switch {
	case !found:
		return warn("huge pages", "the RAM tier works without them, more slowly", "this kernel has no transparent huge pages")
	case mode == "never":
		return warn("huge pages", "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled", "transparent huge pages are off")
	}
	return ok("huge pages", "transparent, %s", mode)
}

// checkCPU says which kernels this program would use; the daemon says at its start which it does.
func checkCPU() finding {
	features := cpuFeatures()
	loops, err := kernels.Active()
	text := fmt.Sprintf("%d cores, %s, kernels %v, %s", runtime.NumCPU(), runtime.GOARCH, loops, strings.Join(features, " "))
	switch {
	case err != nil:
		return warn("processor", "unset "+kernels.EnvVar, "%v", err)
	case loops == kernels.Go:
		return warn("processor", "attention works, slowly", "%s", text)
	}
	return ok("processor", "%s", text)
}

func cpuFeatures() []string {
	var names []string
	for _, f := range []struct {
		has  bool
		name string
	}{
		{cpu.X86.HasAVX2, "avx2"}, {cpu.X86.HasFMA, "fma"}, {cpu.X86.HasAVX512F, "avx512f"},
		{cpu.X86.HasAVX512BW, "avx512bw"}, {cpu.X86.HasAVX512VNNI, "avx512vnni"}, {cpu.X86.HasAVX512BF16, "avx512bf16"},
		{cpu.X86.HasAMXInt8, "amx-int8"}, {cpu.ARM64.HasASIMD, "asimd"}, {cpu.ARM64.HasASIMDDP, "dotprod"}, {cpu.ARM64.HasSVE, "sve"},
	} {
		if f.has {
			names = append(names, f.name)
		}
	}
	return names
}

// checkMemfd makes a region as the fast path wants it and tries to shrink it, which must fail.
func checkMemfd() finding {
	const hint = "workers can still use gRPC; a newer kernel or another sandbox is needed for the fast path"
	fd, err := unix.MemfdCreate("kvtier-doctor", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return warn("sealed memory", hint, "memfd_create: %v", err)
	}
	defer unix.Close(fd)
	if err := unix.Ftruncate(fd, 1<<16); err != nil {
		return warn("sealed memory", hint, "ftruncate: %v", err)
	}
	const seals = unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_SEAL
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, seals); err != nil {
		return warn("sealed memory", hint, "F_ADD_SEALS: %v", err)
	}
	if err := unix.Ftruncate(fd, 0); !errors.Is(err, unix.EPERM) {
		return fail("sealed memory", "do not use the fast path on this kernel", "a sealed memfd could be shrunk (%v)", err)
	}
	return ok("sealed memory", "a memfd can be sealed, and then no longer shrunk")
}

// checkClock looks at what timestamps, leases and deadlines rest on.
func checkClock(source string, now time.Time) finding {
	if now.Year() < 2025 {
		return warn("clock", "set the date; ages and times will be wrong", "it is %s", now.Format(time.DateOnly))
	}
	if source == "hpet" || source == "acpi_pm" {
		return warn("clock", "reading it is slow; see the kernel's log for why the TSC was refused", "source %s", source)
	}
	var tx unix.Timex
	state, err := unix.Adjtimex(&tx)
	if err == nil && state == unix.TIME_ERROR {
		return ok("clock", "source %s; not kept by NTP", orDash(source))
	}
	return ok("clock", "source %s", orDash(source))
}
