package contexts

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"

	kvtierv1 "kvtier/proto/kvtier/v1"
)

// maxMessage holds a bulk append and a dense answer.
const maxMessage = 64 << 20

// daemon is one run of kvtierd.
type daemon struct {
	cmd  *exec.Cmd
	log  *bytes.Buffer // read it once done is closed
	done chan struct{}
	conn *grpc.ClientConn
	seq  kvtierv1.SequenceServiceClient
	look kvtierv1.InspectionServiceClient
}

// start runs kvtierd in a folder and waits until it answers; took is how long that was.
func start(ctx context.Context, o *Options, dir string) (d *daemon, took time.Duration, err error) {
	begin := time.Now()
	socket := filepath.Join(dir, "s")
	if len(socket) > 100 {
		return nil, 0, fmt.Errorf("%s: the path is too long for a socket: choose another folder", dir)
	}
	d = &daemon{log: &bytes.Buffer{}, done: make(chan struct{})}
	d.cmd = exec.Command(o.Daemon, "--data", filepath.Join(dir, "data"), "--socket", socket, "--fast-socket", "", "--listen", "", "--metrics", "",
		"--ram", fmt.Sprint(o.RAM), "--disk", fmt.Sprint(o.Disk), "--tail", fmt.Sprint(o.Tail))
	d.cmd.Stdout, d.cmd.Stderr = d.log, d.log
	d.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := d.cmd.Start(); err != nil {
		return nil, 0, err
	}
	go func() {
		_ = d.cmd.Wait() // its state says more
		close(d.done)
	}()
	d.conn, err = grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage), grpc.MaxCallSendMsgSize(maxMessage)),
		grpc.WithConnectParams(grpc.ConnectParams{MinConnectTimeout: time.Second,
			Backoff: backoff.Config{BaseDelay: 5 * time.Millisecond, Multiplier: 1.2, MaxDelay: 50 * time.Millisecond}}))
	if err != nil {
		d.kill()
		return nil, 0, err
	}
	d.seq, d.look = kvtierv1.NewSequenceServiceClient(d.conn), kvtierv1.NewInspectionServiceClient(d.conn)
	if err := d.ready(ctx); err != nil {
		d.kill()
		return nil, 0, fmt.Errorf("%w\n%s", err, d.log)
	}
	return d, time.Since(begin), nil
}

// ready waits until the daemon answers, or is gone.
func (d *daemon) ready(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	go func() {
		select {
		case <-d.done:
			cancel(fmt.Errorf("%s ended: %v", d.cmd.Path, d.cmd.ProcessState))
		case <-ctx.Done():
		}
	}()
	_, err := d.look.GetStatus(ctx, &kvtierv1.GetStatusRequest{}, grpc.WaitForReady(true))
	return errors.Join(err, context.Cause(ctx))
}

// kill ends the process as a crash does.
func (d *daemon) kill() {
	_ = d.cmd.Process.Kill() // it may be gone
	<-d.done
	if d.conn != nil {
		_ = d.conn.Close()
	}
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

func (d *daemon) sample(ctx context.Context, since time.Time) (Sample, error) {
	st, err := d.look.GetStatus(ctx, &kvtierv1.GetStatusRequest{})
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
	proc := filepath.Join("/proc", strconv.Itoa(d.cmd.Process.Pid))
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
