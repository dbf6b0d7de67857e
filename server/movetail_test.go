package server

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"

	kvtierv1 "kvtier/proto/kvtier/v1"
)

// label appends no tokens, but a labelled span.
func label(t *testing.T, s *sequence, text string, start, end uint64) {
	t.Helper()
	r := &appendRequest{layer: 0, start: end, labels: []*kvtierv1.Span{{Label: text, Start: start, End: end}}}
	if err := s.append(t.Context(), r); err != nil {
		t.Fatal(err)
	}
}

// keptLog makes a sequence of 4,340 tokens, of which 2,048 are sealed, whose log is still the first one: with labels and a truncation
// before the sealing and after it. No more can be sealed.
func keptLog(t *testing.T, dir string, spec *kvtierv1.ModelSpec) (srv *Server, s *sequence, m *model) {
	t.Helper()
	srv = openServer(t, dir, Options{ReadAllTokens: -1})
	m = newModel(3, spec, 12000)
	s = openSequence(t, srv, &kvtierv1.OpenSequenceRequest{Spec: spec, Profile: exact})
	srv.sealer.one.Lock()
	m.feed(t, s, 0, 150)
	label(t, s, "first", 100, 150)
	if err := s.truncate(t.Context(), 90); err != nil { // takes the label back
		t.Fatal(err)
	}
	m.feed(t, s, 90, 1000)
	label(t, s, "second", 50, 800)
	m.feed(t, s, 1000, 4310)
	srv.sealer.one.Unlock()
	waitSealed(t, s, 2048)
	wantMarked(t, s)
	label(t, s, "third", 2000, 4200)
	label(t, s, "fourth", 4305, 4310)
	if err := s.truncate(t.Context(), 4300); err != nil {
		t.Fatal(err)
	}
	m.feed(t, s, 4300, 4340)
	return srv, s, m
}

func wantMarked(t *testing.T, s *sequence) {
	t.Helper()
	s.write.Lock()
	defer s.write.Unlock()
	if s.place.Gen != 1 || s.place.Mark == 0 || s.place.From != 0 {
		t.Fatalf("the tail is at %+v of its log", s.place)
	}
}

// wantTail wants so many tokens, with right answers, and labels of these texts.
func (m *model) wantTail(t *testing.T, s *sequence, tokens int, labels ...string) {
	t.Helper()
	st := s.snapshot()
	var have []string
	for _, l := range st.labels {
		have = append(have, l.Label)
	}
	if st.accepted != uint64(tokens) || !slices.Equal(have, labels) {
		t.Fatalf("%d tokens and labels %v, not %d and %v", st.accepted, have, tokens, labels)
	}
	m.check(t, s, tokens-1, exactBudget, 1e-5)
	if len(m.spec.LayerKinds) == 0 { // no layer forgets
		for _, pos := range []int{100, 1999, 2047} {
			m.check(t, s, pos, exactBudget, 1e-5)
		}
	}
}

// TestLogStays: sealing goes on with a log most of which is still the tail's, and what is recovered from it is what there was.
func TestLogStays(t *testing.T) {
	for name, spec := range map[string]*kvtierv1.ModelSpec{"full": testSpec(), "sliding": slidingSpec()} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			srv, s, m := keptLog(t, dir, spec)
			for range 2 {
				m.wantTail(t, s, 4340, "second", "third")
				spillNow(t, s)
				m.wantTail(t, s, 4340, "second", "third")
				closeServer(t, srv)
				srv = openServer(t, dir, Options{ReadAllTokens: -1})
				s = find(t, srv, s.id)
			}
			wantMarked(t, s)
			m.feed(t, s, 4340, 12000) // sealing keeps some logs and replaces others
			label(t, s, "fifth", 3, 12000)
			waitSealed(t, s, 10240)
			closeServer(t, srv)
			srv = openServer(t, dir, Options{ReadAllTokens: -1})
			m.wantTail(t, find(t, srv, s.id), 12000, "second", "third", "fifth")
		})
	}
}

// A log that stayed may be damaged in what is sealed, at the mark, and behind it, or be lost: the tail is lost from there on, and
// nothing of what is appended then.
func TestDamagedLogThatStayed(t *testing.T) {
	dir := t.TempDir()
	srv, s, m := keptLog(t, dir, testSpec())
	path := s.logPath(1)
	closeServer(t, srv)
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	row := s.spec.tokenBytes()
	for name, c := range map[string]struct {
		at     int // of the byte that is changed; negative: the log is gone
		tokens int
		labels []string
	}{
		"gone":               {-1, 2048, []string{"second"}},
		"in the first rows":  {60 * row, 2048, []string{"second"}},
		"in rows not sealed": {3000 * row, 2048, []string{"second"}},                                     // of the record that begins with sealed ones
		"in the mark":        {bytes.LastIndex(good, []byte("TVLR\x04")) + 40, 4300, []string{"second"}}, // the truncation behind it counts
		"in the last rows":   {len(good) - 10, 4300, []string{"second", "third"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir2 := t.TempDir()
			if err := os.CopyFS(dir2, os.DirFS(dir)); err != nil {
				t.Fatal(err)
			}
			log := filepath.Join(dir2, filepath.Base(filepath.Dir(path)), filepath.Base(path))
			bad := slices.Clone(good)
			if c.at >= 0 {
				bad[c.at] ^= 4
				err = os.WriteFile(log, bad, 0o600)
			} else {
				err = os.Remove(log)
			}
			if err != nil {
				t.Fatal(err)
			}
			for i, feed := range []int{0, 40, 3000, 0} {
				srv := openServer(t, dir2, Options{ReadAllTokens: -1})
				s := find(t, srv, s.id)
				m.wantTail(t, s, c.tokens, c.labels...)
				if feed > 0 {
					m.feed(t, s, c.tokens, c.tokens+feed)
					c.tokens += feed
					label(t, s, fmt.Sprint("later ", i), uint64(c.tokens-30), uint64(c.tokens))
					c.labels = append(c.labels, fmt.Sprint("later ", i))
					m.wantTail(t, s, c.tokens, c.labels...)
				}
				closeServer(t, srv)
			}
		})
	}
}
