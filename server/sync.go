package server

import (
	"context"
	"errors"
	"maps"
	"slices"
	"sync"
	"time"

	"kvtier/tiers/taillog"
)

// syncer makes logs safe from a power cut, together, every so often: appends
// do not wait for the disk.
type syncer struct {
	srv    *Server
	cancel context.CancelFunc
	done   sync.WaitGroup
	mu     struct {
		sync.Mutex
		dirty map[*sequence]bool
	}
}

func newSyncer(srv *Server, every time.Duration) *syncer {
	ctx, cancel := context.WithCancel(context.Background())
	y := &syncer{srv: srv, cancel: cancel}
	y.mu.dirty = map[*sequence]bool{}
	y.done.Add(1)
	go func() {
		defer y.done.Done()
		t := time.NewTicker(every)
		defer t.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-t.C:
				y.syncAll()
			}
		}
	}()
	return y
}

func (y *syncer) close() {
	y.cancel()
	y.done.Wait()
	y.syncAll()
}

func (y *syncer) dirty(s *sequence) {
	y.mu.Lock()
	y.mu.dirty[s] = true
	y.mu.Unlock()
}

func (y *syncer) syncAll() {
	y.mu.Lock()
	dirty := y.mu.dirty
	y.mu.dirty = map[*sequence]bool{}
	y.mu.Unlock()
	for _, s := range slices.SortedFunc(maps.Keys(dirty), byAge) {
		if err := s.syncLog(); err != nil {
			y.srv.log.Error("sync the log of a tail", "sequence", s.id, "err", err)
			y.dirty(s) // the next round tries again
		}
	}
}

// syncLog makes what the log holds power-safe and says so.
func (s *sequence) syncLog() error {
	s.write.Lock()
	log := s.log
	s.write.Unlock()
	if log == nil {
		return nil
	}
	if err := log.Sync(); err != nil {
		return s.renewLog(log, err)
	}
	_, done := log.Size()
	s.mu.Lock()
	defer s.mu.Unlock()
	keep := s.mu.powerPos[:0]
	for _, p := range s.mu.powerPos {
		if p.log == log && p.bytes <= done {
			s.mu.power = max(s.mu.power, p.tokens)
		} else {
			keep = append(keep, p)
		}
	}
	s.mu.powerPos = keep
	return nil
}

// renewLog puts another log in the place of one that could not be synced: the
// tail is in RAM or, if it was spilled, in what can still be read of it.
func (s *sequence) renewLog(log *taillog.Log, cause error) error {
	s.write.Lock()
	defer s.write.Unlock()
	if s.log != log {
		return nil // sealing or a deletion was faster
	}
	s.srv.log.Warn("a log could not be synced and is written anew", "sequence", s.id, "err", cause)
	st, err := s.wholeLocked()
	if err != nil {
		return errors.Join(cause, err)
	}
	b := s.srv.store.NewBatch()
	defer b.Close()
	if err := s.replaceLog(context.Background(), &st, b); err != nil {
		return errors.Join(cause, err)
	}
	return nil
}
