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

// madeLogs remembers which logs were made, in their order.
type madeLogs struct {
	files.FS
	mu    sync.Mutex
	names []string
}

func (m *madeLogs) Open(name string, how files.Flag) (files.File, error) {
	if how&files.Create != 0 && filepath.Ext(name) == logSuffix {
		m.mu.Lock()
		m.names = append(m.names, filepath.Base(name))
		m.mu.Unlock()
	}
	return m.FS.Open(name, how)
}

// TestSealInTurns: sequences that wait are sealed one segment each, in turns: one with many does not go first with all of them.
func TestSealInTurns(t *testing.T) {
	spec := testSpec()
	made := &madeLogs{FS: files.OS}
	srv := openServer(t, t.TempDir(), Options{FS: made})
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
	opened := len(made.names)
	srv.sealer.one.Unlock()
	for i, n := range []uint64{many, 1, 2} {
		waitSealed(t, seqs[i], n*tiers.SegmentTokens)
	}
	made.mu.Lock()
	defer made.mu.Unlock()
	var order []int
	for _, name := range made.names[opened:] { // a new log with each segment
		order = append(order, slices.Index(ids, name[:strings.IndexByte(name, '-')]))
	}
	if want := []int{0, 1, 2, 0, 2, 0, 0}; !slices.Equal(order, want) {
		t.Errorf("sealed in the order %v, want %v", order, want)
	}
}
