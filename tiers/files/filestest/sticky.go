package filestest

import (
	"sync"
	"sync/atomic"
	"time"

	"kvtier/tiers/files"
)

// Sticky is a file system of which direct reads, those of segments, can be slow or get stuck. They go through ReadAt: what
// asynchronous I/O would read from the files underneath passes by no test. Safe for concurrent use.
type Sticky struct {
	files.FS
	mu struct {
		sync.Mutex
		freed chan struct{} // nil: not stuck
	}
	slow           atomic.Int64
	waiting, reads atomic.Int64
}

// Stick has reads wait from now on, until Unstick.
func (s *Sticky) Stick() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.mu.freed == nil {
		s.mu.freed = make(chan struct{})
	}
}

// Unstick lets all reads go on. Of a disk that is not stuck it changes nothing.
func (s *Sticky) Unstick() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.mu.freed != nil {
		close(s.mu.freed)
		s.mu.freed = nil
	}
}

// Slow has every read take so much longer.
func (s *Sticky) Slow(by time.Duration) { s.slow.Store(int64(by)) }

// Waiting returns how many reads are stuck.
func (s *Sticky) Waiting() int { return int(s.waiting.Load()) }

// Reads returns how many there were.
func (s *Sticky) Reads() int { return int(s.reads.Load()) }

// Open opens a file, whose reads may get stuck if it is for direct I/O.
func (s *Sticky) Open(name string, how files.Flag) (files.File, error) {
	f, err := s.FS.Open(name, how)
	if err != nil || how&files.Direct == 0 {
		return f, err
	}
	return &stickyFile{f, s}, nil
}

type stickyFile struct {
	files.File
	s *Sticky
}

func (f *stickyFile) ReadAt(b []byte, off int64) (int, error) {
	f.s.reads.Add(1)
	f.s.mu.Lock()
	freed := f.s.mu.freed
	f.s.mu.Unlock()
	if freed != nil {
		f.s.waiting.Add(1)
		<-freed
		f.s.waiting.Add(-1)
	}
	time.Sleep(time.Duration(f.s.slow.Load()))
	return f.File.ReadAt(b, off)
}
