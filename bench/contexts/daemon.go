package contexts

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"kvtier/bench/daemon"
	kvtierv1 "kvtier/proto/kvtier/v1"
)

// start runs kvtierd in a folder and waits until it answers; took is how long that was.
func start(ctx context.Context, o *Options, dir string) (d *daemon.Daemon, took time.Duration, err error) {
	begin := time.Now()
	d, err = daemon.Start(ctx, o.Daemon, dir, "--ram", fmt.Sprint(o.RAM), "--disk", fmt.Sprint(o.Disk), "--tail", fmt.Sprint(o.Tail), "--read-all-in-ram", "0")
	return d, time.Since(begin), err
}

// Sample is what the daemon took at a moment.
type Sample struct {
	Seconds  float64 // since the phase began
	RSS      int64   // bytes resident
	Tails    int64   // bytes of unquantised rows in RAM, as the daemon counts them
	RAM      int64   // bytes of the RAM tier in use
	Disk     int64   // bytes of the NVMe tier in use
	Files    int     // open descriptors
	Threads  int
	Sequence int // sequences held
}

func sample(ctx context.Context, d *daemon.Daemon, since time.Time) (Sample, error) {
	st, err := d.Look.GetStatus(ctx, &kvtierv1.GetStatusRequest{})
	if err != nil {
		return Sample{}, err
	}
	s := Sample{Seconds: time.Since(since).Seconds(), RSS: int64(st.RssBytes), Tails: int64(st.TailBytes), Sequence: int(st.Sequences)}
	for _, t := range st.Tiers {
		if t.Name == "ram" {
			s.RAM = int64(t.BytesUsed)
		} else {
			s.Disk = int64(t.BytesUsed)
		}
	}
	proc := filepath.Join("/proc", strconv.Itoa(d.PID()))
	if files, err := os.ReadDir(filepath.Join(proc, "fd")); err == nil {
		s.Files = len(files)
	}
	if threads, err := os.ReadDir(filepath.Join(proc, "task")); err == nil {
		s.Threads = len(threads)
	}
	return s, nil
}

// diskUsed returns the bytes that the files below a folder take on the disk, in
// all and those of logs of open tails.
func diskUsed(dir string) (all, logs int64, err error) {
	err = filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return ignoreGone(err)
		}
		i, err := e.Info()
		if err != nil {
			return ignoreGone(err)
		}
		if st, ok := i.Sys().(*syscall.Stat_t); ok {
			all += st.Blocks * 512
			if strings.HasSuffix(path, ".log") && filepath.Base(filepath.Dir(path)) == "tails" {
				logs += st.Blocks * 512
			}
		}
		return nil
	})
	return all, logs, err
}

// ignoreGone: the daemon removes files meanwhile.
func ignoreGone(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}
