package server

import (
	"context"
	"testing"

	kvtierv1 "kvtier/proto/kvtier/v1"
)

// A flush that seals while the background does must not take the background's
// spans from the sequence: deleting a fork would then delete them.
func TestFlushBesideSealing(t *testing.T) {
	for seed := range uint64(5) {
		dir := t.TempDir()
		m := newModel(seed, testSpec(), 6400)
		o := Options{ReadAllTokens: -1}
		srv := openServer(t, dir, o)
		s := openSequence(t, srv, &kvtierv1.OpenSequenceRequest{Spec: m.spec})
		for at := 0; at < 6400; at += 512 {
			m.feed(t, s, at, min(at+512, 6400))
		}
		if err := s.flush(context.Background(), true); err != nil {
			t.Fatal(err)
		}
		f := openSequence(t, srv, &kvtierv1.OpenSequenceRequest{ForkOf: s.id, ForkAt: 6400})
		st := s.snapshot()
		for _, r := range st.spans {
			if n := srv.spans.references(r.span); n != 2 {
				t.Fatalf("span at %d has %d references, not 2", r.Start, n)
			}
		}
		if err := f.delete(context.Background()); err != nil {
			t.Fatal(err)
		}
		closeServer(t, srv)
		srv = openServer(t, dir, o)
		s, err := srv.sequence(s.id)
		if err != nil {
			t.Fatal(err)
		}
		m.check(t, s, 6399, exactBudget, .1)
	}
}
