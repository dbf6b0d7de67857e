//go:build linux

package server

import (
	"testing"

	kvtierv1 "kvtier/proto/kvtier/v1"
)

// With ReadAllInRAM a budget of that much is answered from everything as long as all of it lies in RAM, and as ever where
// it does not, or where the budget is smaller.
func TestReadAllInRAM(t *testing.T) {
	f := newLateFolder(t)
	o := f.options()
	o.ReadAllInRAM = .1
	whole := func(a *answer) bool {
		acc := a.account
		return acc.TokensEstimated == 0 && acc.Mode == kvtierv1.AttendMode_ATTEND_MODE_EXACT
	}
	r, s := f.open(o) // RAM has what every query reads, and nothing else
	if a := f.ask(s, shareBudget(.2)); whole(a) {
		t.Errorf("answered from everything although RAM has a part: %+v", a.account)
	}
	closeServer(t, r.srv)

	srv := openServer(t, t.TempDir(), Options{ReadAllTokens: -1, ReadAllInRAM: .1})
	s = openSequence(t, srv, &kvtierv1.OpenSequenceRequest{Spec: f.spec})
	f.feed(t, s, 0, f.n)
	waitSealed(t, s, 2*segment)
	exact := f.ask(s, budget{mode: kvtierv1.AttendMode_ATTEND_MODE_EXACT})
	a := f.ask(s, shareBudget(.2))
	if !whole(a) {
		t.Errorf("not answered from everything: %+v", a.account)
	}
	sameAnswer(t, "a share of .2, all in RAM", a, exact)
	if a := f.ask(s, shareBudget(.05)); whole(a) {
		t.Errorf("a smaller budget is answered from everything: %+v", a.account)
	}
	if _, err := Open(t.Context(), Options{DataDir: t.TempDir(), ReadAllInRAM: 1.5}); err == nil {
		t.Error("a share of 1.5 is taken")
	}
}
