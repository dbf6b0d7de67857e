package server

import (
	"slices"
	"sync"
	"testing"

	"kvtier/server/sparse"
	"kvtier/tiers"
)

// Low planes that go while a call is under way are no failure: it answers as calls do from then on.
func TestLowPlanesGoDuringACall(t *testing.T) {
	const n = 2*segment + recentTokens
	spec := testSpec()
	m := newModel(3, spec, n)
	srv := openServer(t, t.TempDir(), Options{ReadAllTokens: 2 * n})
	s := m.stored(t, srv, balanced)
	st := s.snapshot()
	low := func() (out []*tiers.Header) {
		for _, seg := range srv.segmentsOf(&st, 0, st.sealed()) {
			if srv.store.HasLow(seg.Header.ID) {
				out = append(out, seg.Header)
			}
		}
		return out
	}
	drop := func() {
		b := srv.store.NewBatch()
		defer b.Close()
		for _, h := range low() {
			b.DropLow(h)
		}
		if err := b.Commit(t.Context()); err != nil {
			t.Error(err)
		}
	}
	stale := srv.segmentsOf(&st, 0, st.sealed())
	if len(low()) != len(stale) {
		t.Fatalf("%d of %d segments have low planes before", len(low()), len(stale))
	}
	row := int(spec.QueryHeads * spec.HeadDim)
	q := slices.Clone(m.q[0][(n-1)*row : n*row])
	for i := range q {
		q[i] *= s.spec.scale
	}
	var once sync.Once
	c := &call{seq: s, st: &st, start: n - 1, n: 1, q: q, budget: exactBudget,
		trace: func(int) *sparse.Trace { once.Do(drop); return nil }}
	ps, err := c.answer(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(low()) > 0 {
		t.Fatal("low planes did not go")
	}
	got, want := s.finish(ps), m.ask(t, s, 0, n-1, exactBudget)
	if !slices.Equal(got.out, want.out) || !slices.Equal(got.lse, want.lse) {
		t.Error("the answer is not that of a call made afterwards")
	}
	if a := c.account(0); a.TokensExact != want.account.TokensExact || a.TokensRead != want.account.TokensRead || a.CodecError != want.account.CodecError {
		t.Errorf("account %v, not %v", a, want.account)
	}
	rows, err := s.allRows(t.Context(), stale[0], 0)
	if err != nil || len(rows.K) != segment*s.spec.headDim {
		t.Errorf("rows of a segment as it was: %v", err)
	}
}
