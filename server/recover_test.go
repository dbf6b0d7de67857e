package server

import (
	"context"
	"encoding/json"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	kvtierv1 "kvtier/proto/kvtier/v1"
	"kvtier/tiers/files"
	"kvtier/tiers/store"
	"kvtier/tiers/taillog"
)

// logGate is a file system in which reads of logs wait until so many logs are being read.
type logGate struct {
	files.FS
	together int
	mu       sync.Mutex
	cond     *sync.Cond
	reading  map[string]int
	most     int // logs that were read at the same time
}

func newLogGate(together int) *logGate {
	g := &logGate{FS: files.OS, together: together, reading: map[string]int{}}
	g.cond = sync.NewCond(&g.mu)
	return g
}

func (g *logGate) Open(name string, how files.Flag) (files.File, error) {
	f, err := g.FS.Open(name, how)
	if err != nil || filepath.Ext(name) != logSuffix {
		return f, err
	}
	return &gatedLog{f, g, name}, nil
}

type gatedLog struct {
	files.File
	g    *logGate
	name string
}

func (f *gatedLog) ReadAt(b []byte, off int64) (int, error) {
	g := f.g
	g.mu.Lock()
	g.reading[f.name]++
	g.most = max(g.most, len(g.reading))
	for g.most < g.together {
		g.cond.Wait()
	}
	g.cond.Broadcast()
	g.mu.Unlock()
	defer func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		if g.reading[f.name]--; g.reading[f.name] == 0 {
			delete(g.reading, f.name)
		}
	}()
	return f.File.ReadAt(b, off)
}

// TestRecoverTogether: logs are read at the same time, as many as may be and as large as may be, and what
// comes back is what one after the other would give, in that order.
func TestRecoverTogether(t *testing.T) {
	for name, spec := range map[string]*kvtierv1.ModelSpec{"full": testSpec(), "sliding": slidingSpec()} {
		t.Run(name, func(t *testing.T) {
			const n, tokens = 12, 150
			dir := t.TempDir()
			srv := openServer(t, dir, Options{})
			var models []*model
			var ids []string
			var tail int64
			for i := range n {
				m := newModel(uint64(i+1), spec, 2*tokens)
				s := openSequence(t, srv, &kvtierv1.OpenSequenceRequest{Spec: spec})
				m.feed(t, s, 0, tokens+i)
				if i%3 == 0 {
					if err := s.truncate(t.Context(), uint64(tokens-10*i)); err != nil {
						t.Fatal(err)
					}
				}
				models, ids, tail = append(models, m), append(ids, s.id), tail+int64(s.spec.tokenBytes())*tokens
			}
			closeServer(t, srv)
			for _, c := range []struct {
				atOnce, least, most int
				tail                int64
			}{{1, 1, 1, 4 * tail}, {2, 2, 2, 16 * tail}, {8, 2, 8, 16 * tail}, {8, 1, 8, tail / 3}, {8, 1, 1, tail / 12}} {
				t.Run(fmt.Sprint(c.atOnce, " at once, tails ", c.tail), func(t *testing.T) {
					gate := newLogGate(c.least)
					srv := openServer(t, dir, Options{FS: gate, RecoverAtOnce: c.atOnce, TailBytes: c.tail})
					if gate.most < c.least || gate.most > c.most {
						t.Errorf("%d logs were read at the same time, want %d to %d", gate.most, c.least, c.most)
					}
					if !slices.IsSortedFunc(srv.list(), func(a, b *sequence) int { return strings.Compare(a.id, b.id) }) {
						t.Error("sequences are not in the order of the catalogue")
					}
					var held int64
					spilled := 0
					for i, id := range ids {
						s, err := srv.sequence(id)
						if err != nil {
							t.Fatal(err)
						}
						st := s.snapshot()
						want := tokens + i
						if i%3 == 0 {
							want = tokens - 10*i
						}
						if st.accepted != uint64(want) {
							t.Errorf("sequence %d has %d tokens, want %d", i, st.accepted, want)
						}
						if held += st.tailBytes(s.spec); st.spilled {
							spilled++
						}
					}
					if got := srv.tail.Load(); got != held || got > c.tail {
						t.Errorf("tails take %d bytes, are said to take %d, and may take %d", held, got, c.tail)
					}
					if (spilled > 0) != (c.tail < tail) {
						t.Errorf("%d tails are spilled", spilled)
					}
					for i, id := range ids {
						s, _ := srv.sequence(id)
						models[i].check(t, s, int(s.snapshot().accepted)-1, exactBudget, 1e-5)
					}
					closeServer(t, srv)
				})
			}
		})
	}
}

// TestRecoverNewest: of tails that do not all fit, those used last stay in RAM.
func TestRecoverNewest(t *testing.T) {
	dir := t.TempDir()
	srv := openServer(t, dir, Options{})
	spec := testSpec()
	const n, tokens = 6, 100
	var ids []string
	var one int64
	for i := range n {
		s := openSequence(t, srv, &kvtierv1.OpenSequenceRequest{Spec: spec})
		newModel(uint64(i+1), spec, tokens).feed(t, s, 0, tokens)
		ids, one = append(ids, s.id), s.mu.tailBytes(s.spec)
		setUsed(t, srv, s, time.Unix(int64(1000+(i*5)%n), 0))
	}
	closeServer(t, srv)
	srv = openServer(t, dir, Options{RecoverAtOnce: 1, TailBytes: 4 * one}) // of which 7/8 are taken
	for i, id := range ids {
		s, err := srv.sequence(id)
		if err != nil {
			t.Fatal(err)
		}
		if st := s.snapshot(); st.spilled != ((i*5)%n < 3) {
			t.Errorf("sequence %d, number %d by use: spilled %v", i, (i*5)%n, st.spilled)
		}
	}
}

// setUsed has the catalogue say when a sequence was used.
func setUsed(t *testing.T, srv *Server, s *sequence, at time.Time) {
	t.Helper()
	st := s.snapshot()
	raw, err := s.record(&st, s.place)
	if err != nil {
		t.Fatal(err)
	}
	rec, err := parseSequence([]byte(s.id), raw)
	if err != nil {
		t.Fatal(err)
	}
	rec.Used = at.Unix()
	if raw, err = json.Marshal(rec); err != nil {
		t.Fatal(err)
	}
	b := srv.store.NewBatch()
	defer b.Close()
	if err := b.Set(store.KindSequence, []byte(s.id), raw); err != nil {
		t.Fatal(err)
	}
	if err := b.Commit(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// TestRecoverErrors: of several sequences that cannot be taken up the error is about the first, whichever was read first.
func TestRecoverErrors(t *testing.T) {
	dir := t.TempDir()
	srv := openServer(t, dir, Options{})
	spec := testSpec()
	var bad []string
	for i := range 9 {
		s := openSequence(t, srv, &kvtierv1.OpenSequenceRequest{Spec: spec})
		newModel(uint64(i+1), spec, 50).feed(t, s, 0, 50)
		if i%2 == 0 {
			if err := s.log.Append(taillog.Kind(9), []byte("of a later version")); err != nil {
				t.Fatal(err)
			}
			bad = append(bad, s.id)
		}
	}
	closeServer(t, srv)
	for range 10 {
		srv, err := Open(context.Background(), Options{DataDir: dir})
		if err == nil {
			closeServer(t, srv)
			t.Fatal("opened")
		}
		if want := "recover sequence " + slices.Min(bad) + ":"; !strings.Contains(err.Error(), want) {
			t.Fatalf("%v; want one that says %q", err, want)
		}
	}
}
