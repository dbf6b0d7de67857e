package server

import (
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"kvtier/tiers"
	"kvtier/tiers/files"

	kvtierv1 "kvtier/proto/kvtier/v1"
)

// syncedLogs remembers which logs were synced, in their order.
type syncedLogs struct {
	files.FS
	mu    sync.Mutex
	names []string
}

func (x *syncedLogs) Open(name string, how files.Flag) (files.File, error) {
	f, err := x.FS.Open(name, how)
	if err != nil || filepath.Ext(name) != logSuffix {
		return f, err
	}
	return &syncedLog{f, x, filepath.Base(name)}, nil
}

type syncedLog struct {
	files.File
	all  *syncedLogs
	name string
}

func (f *syncedLog) Sync() error {
	f.all.mu.Lock()
	f.all.names = append(f.all.names, f.name)
	f.all.mu.Unlock()
	return f.File.Sync()
}

// TestSealInTurns: sequences that wait are sealed one segment each, in turns: one with many does not go first with all of them.
func TestSealInTurns(t *testing.T) {
	spec := testSpec()
	synced := &syncedLogs{FS: files.OS}
	srv := openServer(t, t.TempDir(), Options{FS: synced})
	srv.sealer.one.Lock() // nothing is sealed until all wait
	const many = 4
	var ids []string
	var seqs []*sequence
	for i, n := range []int{many, 1, 2} {
		tokens := n*tiers.SegmentTokens + recentTokens
		s := openSequence(t, srv, &kvtierv1.OpenSequenceRequest{Spec: spec})
		newModel(uint64(i+1), spec, tokens).feed(t, s, 0, tokens)
		ids, seqs = append(ids, s.id), append(seqs, s)
	}
	for _, s := range seqs {
		eventually(t, "all is power-safe", func() bool { a := s.ack(); return a.PowerSafe == a.Accepted })
	}
	synced.mu.Lock()
	before := len(synced.names)
	synced.mu.Unlock()
	srv.sealer.one.Unlock()
	for i, n := range []uint64{many, 1, 2} {
		waitSealed(t, seqs[i], n*tiers.SegmentTokens)
	}
	synced.mu.Lock()
	defer synced.mu.Unlock()
	var order []int
	for _, name := range synced.names[before:] { // once with each segment
		order = append(order, slices.Index(ids, name[:strings.IndexByte(name, '-')]))
	}
	if want := []int{0, 1, 2, 0, 2, 0, 0}; !slices.Equal(order, want) {
		t.Errorf("sealed in the order %v, want %v", order, want)
	}
}
