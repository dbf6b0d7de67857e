package server

import (
	"errors"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"google.golang.org/grpc/codes"

	kvtierv1 "kvtier/proto/kvtier/v1"
)

// A file system that is really full: appends are refused, what was
// acknowledged stays, and after room is made they go on.
func TestFileSystemFull(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=48m"); err != nil {
		t.Skipf("a small file system cannot be mounted here: %v", err)
	}
	t.Cleanup(func() { _ = syscall.Unmount(dir, syscall.MNT_DETACH) })
	ballast := filepath.Join(dir, "ballast")
	srv := openServer(t, filepath.Join(dir, "data"), Options{DiskBytes: 4 << 20, ReadAllTokens: -1})
	m := newModel(1, testSpec(), 9000)
	s := openSequence(t, srv, &kvtierv1.OpenSequenceRequest{Spec: testSpec(), Profile: exact})
	hold(t, s)
	m.feed(t, s, 0, 500)
	f, err := os.Create(ballast)
	if err != nil {
		t.Fatal(err)
	}
	for err == nil {
		_, err = f.Write(make([]byte, 4096))
	}
	_ = f.Close()
	if !errors.Is(err, syscall.ENOSPC) {
		t.Fatal(err)
	}
	at := 500
	for at+250 <= m.n {
		if err = m.tryFeed(s, at, at+250); err != nil {
			break
		}
		at += 250
	}
	wantCode(t, err, codes.ResourceExhausted, ReasonDiskFull)
	m.check(t, s, at-1, exactBudget, 1e-5)
	_, _, err = srv.open(t.Context(), &kvtierv1.OpenSequenceRequest{Spec: testSpec()})
	wantCode(t, err, codes.ResourceExhausted, ReasonDiskFull)
	wantCode(t, s.flush(t.Context(), true), codes.ResourceExhausted, ReasonDiskFull)
	m.check(t, s, at-1, exactBudget, 1e-5)
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	m.feed(t, s, at, at+250)
	if err := s.flush(t.Context(), true); err != nil {
		t.Fatal(err)
	}
	m.check(t, s, at+249, exactBudget, 1e-5)
	closeServer(t, srv)
	srv = openServer(t, filepath.Join(dir, "data"), Options{DiskBytes: 4 << 20, ReadAllTokens: -1})
	m.check(t, find(t, srv, s.id), at+249, exactBudget, 1e-5)
	closeServer(t, srv)
}
