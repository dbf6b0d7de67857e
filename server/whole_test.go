//go:build linux

package server

import (
	"testing"

	kvtierv1 "kvtier/proto/kvtier/v1"
)

// By page three times the bytes are read, whether they come from RAM or not. Where everything lies in RAM, budgets that are not small are answered from all
// of it.
func TestByPage(t *testing.T) {
	f := newLateFolder(t)
	var lines, pages *answer
	for _, by := range []bool{false, true} {
		o := f.options()
		o.ByPage = by
		r, s := f.open(o) // RAM has what every query reads, and nothing else
		a := f.ask(s, shareBudget(.1))
		if by {
			pages = a
		} else {
			lines = a
		}
		closeServer(t, r.srv)
	}
	if pages.account.TokensRead <= 2*lines.account.TokensRead {
		t.Errorf("by page: %+v; by line: %+v", pages.account, lines.account)
	}
	srv := openServer(t, t.TempDir(), Options{ReadAllTokens: -1, ReadAllInRAM: .2, ByPage: true})
	s := openSequence(t, srv, &kvtierv1.OpenSequenceRequest{Spec: f.spec})
	f.feed(t, s, 0, f.n)
	waitSealed(t, s, 2*segment)
	a := f.ask(s, shareBudget(.1))
	sameAnswer(t, "all in RAM", a, pages)
	acc := a.account
	moved := float64(acc.BytesRam) / float64(acc.BytesFull)
	if acc.Mode != kvtierv1.AttendMode_ATTEND_MODE_BUDGET || acc.TokensEstimated == 0 || moved <= .1 || moved > .3 || acc.ErrorP95 == 0 {
		t.Errorf("moved %v of the bytes: %+v", moved, acc)
	}
	if a := f.ask(s, shareBudget(.2)); a.account.TokensEstimated > 0 {
		t.Errorf("a share of .2 is not answered from everything: %+v", a.account)
	}
	f.ask(s, budget{mode: kvtierv1.AttendMode_ATTEND_MODE_TARGET, target: .05})
	if l := s.mu.last[f.query(budget{}).layer]; l.budget.target == 0 || l.way != byLine {
		t.Errorf("a target is answered in way %d", l.way)
	}
}

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
