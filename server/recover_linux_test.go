package server

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	kvtierv1 "kvtier/proto/kvtier/v1"
)

// BenchmarkRecover opens a folder of a thousand sequences, whose logs hold 1.5 GB: from the page cache, or after that was
// told to forget them.
func BenchmarkRecover(b *testing.B) {
	spec := smolSpec()
	spec.Layers = 2
	const sequences, tokens, step = 1000, 1000, 250
	o := Options{TailBytes: 256 << 20}
	dir := b.TempDir()
	srv := openServer(b, dir, o)
	for range sequences {
		s := openSequence(b, srv, &kvtierv1.OpenSequenceRequest{Spec: spec})
		for at := 0; at < tokens; at += step {
			for l := range int(spec.Layers) {
				rows := make([]byte, step*s.spec.rowBytes())
				if err := s.append(b.Context(), &appendRequest{layer: l, start: uint64(at), k: rows, v: rows}); err != nil {
					b.Fatal(err)
				}
			}
		}
	}
	closeServer(b, srv)
	for _, cold := range []bool{false, true} {
		b.Run(map[bool]string{false: "warm", true: "cold"}[cold], func(b *testing.B) {
			for b.Loop() {
				b.StopTimer()
				if cold {
					forget(b, filepath.Join(dir, tailsDir))
				}
				b.StartTimer()
				srv := openServer(b, dir, o)
				b.StopTimer()
				if n := srv.Sequences(); n != sequences {
					b.Fatalf("%d sequences", n)
				}
				closeServer(b, srv)
				b.StartTimer()
			}
		})
	}
}

// forget has the page cache drop the files of a folder.
func forget(b *testing.B, dir string) {
	names, err := os.ReadDir(dir)
	if err != nil {
		b.Fatal(err)
	}
	for _, e := range names {
		f, err := os.Open(filepath.Join(dir, e.Name()))
		if err != nil {
			b.Fatal(err)
		}
		if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
			b.Fatal(err)
		}
		f.Close()
	}
}
