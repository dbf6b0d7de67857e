package server

import (
	"context"
	"math"
	"math/rand/v2"
	"testing"
	"time"

	"kvtier/compress"
	kvtierv1 "kvtier/proto/kvtier/v1"
	"kvtier/server/sparse"
)

// targetRig is a sealed sequence and a way to ask its layer 1.
func targetRig(t *testing.T, audits float32, profile kvtierv1.Profile) (*Server, *sequence, func(context.Context, *kvtierv1.Budget) *kvtierv1.Account) {
	t.Helper()
	srv := openServer(t, t.TempDir(), Options{ReadAllTokens: -1, AuditShare: audits})
	m := newModel(10, testSpec(), 2*segment+recentTokens)
	s := openSequence(t, srv, &kvtierv1.OpenSequenceRequest{Spec: testSpec(), Profile: profile})
	m.feed(t, s, 0, m.n)
	waitSealed(t, s, 2*segment)
	row := int(m.spec.QueryHeads * m.spec.HeadDim)
	return srv, s, func(ctx context.Context, b *kvtierv1.Budget) *kvtierv1.Account {
		t.Helper()
		checked, err := srv.budgetOf(b)
		if err != nil {
			t.Fatal(err)
		}
		a, err := s.attend(ctx, &query{layer: 1, start: uint64(m.n - 1), q: f32Bytes(m.q[1][(m.n-1)*row : m.n*row]), budget: checked})
		if err != nil {
			t.Fatal(err)
		}
		return a.account
	}
}

func target(e, atMost float32) *kvtierv1.Budget {
	return &kvtierv1.Budget{Mode: kvtierv1.AttendMode_ATTEND_MODE_TARGET, TargetError: e, Share: atMost}
}

// What the codec takes is stated by what is stored and how much attention it gets.
func TestCodecError(t *testing.T) {
	stated := map[kvtierv1.Profile]float32{}
	for _, profile := range []kvtierv1.Profile{kvtierv1.Profile_PROFILE_EXACT, kvtierv1.Profile_PROFILE_NEUTRAL, kvtierv1.Profile_PROFILE_BALANCED} {
		srv := openServer(t, t.TempDir(), Options{ReadAllTokens: -1})
		const n = 2048 + recentTokens
		m := newModel(3, testSpec(), n)
		s := openSequence(t, srv, &kvtierv1.OpenSequenceRequest{Spec: testSpec(), Profile: profile})
		m.feed(t, s, 0, n)
		waitSealed(t, s, 2048)
		stated[profile] = m.ask(t, s, 0, n-1, exactBudget).account.CodecError
		if e := m.ask(t, s, 0, 1000, exactBudget).account.CodecError; profile == kvtierv1.Profile_PROFILE_EXACT && e != 0 {
			t.Errorf("profile exact: %v inside the segment", e)
		}
	}
	e, n, b := stated[kvtierv1.Profile_PROFILE_EXACT], stated[kvtierv1.Profile_PROFILE_NEUTRAL], stated[kvtierv1.Profile_PROFILE_BALANCED]
	if e != 0 || n <= 0 || n > b/8 || b > .5 {
		t.Errorf("stated: exact %v, neutral %v, balanced %v", e, n, b)
	}
}

// A target holds the stated 95th percentile under it, or the account says that it does not.
func TestTargetIsMetOrMissed(t *testing.T) {
	_, _, ask := targetRig(t, -1, balanced)
	met := func(a *kvtierv1.Account, target float64) bool { return float64(a.ErrorP95) <= target }
	narrow := ask(t.Context(), target(.5, 0))
	if narrow.TargetMissed || narrow.TokensEstimated == 0 || !met(narrow, .5) {
		t.Errorf("target .5: %v", narrow)
	}
	// So does a smaller one, for which more is read where what was read does not hold it, too.
	wide := ask(t.Context(), target(.03, 0))
	if wide.TargetMissed || !met(wide, .03) || wide.BytesRam+wide.BytesNvme < narrow.BytesRam+narrow.BytesNvme {
		t.Errorf("target .03: %v", wide)
	}
	_, _, askNeutral := targetRig(t, -1, kvtierv1.Profile_PROFILE_NEUTRAL) // of which the codec takes little
	narrow = askNeutral(t.Context(), target(.5, 0))
	wide = askNeutral(t.Context(), target(.003, 0))
	if wide.TargetMissed || !met(wide, .003) || wide.TokensEstimated == 0 || wide.BytesRam+wide.BytesNvme <= narrow.BytesRam+narrow.BytesNvme {
		t.Errorf("target .003: %v, and .5: %v", wide, narrow)
	}
	// Under what the codec keeps, everything is read, and that is not enough.
	if a := ask(t.Context(), target(1e-6, 0)); !a.TargetMissed || a.TokensEstimated != 0 {
		t.Errorf("target 1e-6: %v", a)
	}
	// A limit on the share stops it before.
	if a := ask(t.Context(), target(.01, .15)); !a.TargetMissed || a.TokensEstimated == 0 || a.BytesRam > a.BytesFull/5 {
		t.Errorf("target .01 of a share of .15: %v", a)
	}
	// So does a deadline that leaves no time to ask again.
	ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
	defer cancel()
	if a := ask(ctx, target(.01, 0)); a.TargetMissed && a.TokensEstimated > 0 {
		t.Errorf("an hour was too short: %v", a)
	}
	if a := ask(t.Context(), &kvtierv1.Budget{Mode: kvtierv1.AttendMode_ATTEND_MODE_BUDGET, Share: .2}); a.TargetMissed || a.ErrorP95 <= a.EstimatedError {
		t.Errorf("share .2: %v", a)
	}
}

// A deadline that is too near for another answer ends the widening.
func TestTargetDeadline(t *testing.T) {
	_, s, ask := targetRig(t, -1, balanced)
	ask(t.Context(), &kvtierv1.Budget{Mode: kvtierv1.AttendMode_ATTEND_MODE_BUDGET, Share: .2})
	c := &call{seq: s, heads: make([]headResult, 2)}
	for h := range c.heads {
		c.heads[h].share = .2
		c.heads[h].acc.NsScan = int64(time.Second)
	}
	near, cancel := context.WithTimeout(t.Context(), 3*time.Second)
	defer cancel()
	if c.timeFor(near, map[int]float32{0: .4, 1: .4}) {
		t.Error("4 s of work fit into 3 s")
	}
	if !c.timeFor(near, map[int]float32{0: .2}) || !c.timeFor(t.Context(), map[int]float32{0: 1, 1: 1}) {
		t.Error("1 s of work does not fit into 3 s, or any into no deadline")
	}
}

// A target's first answer begins with the shares at which the heads' errors
// were as small as it asks before; the difficult head gets more.
func TestTargetBeginsWithWhatIsKnown(t *testing.T) {
	srv, s, _ := targetRig(t, -1, balanced)
	c := &call{seq: s, st: ptr(s.snapshot()), layer: 1, start: 2*segment + recentTokens - 1, n: 1,
		budget: budget{mode: kvtierv1.AttendMode_ATTEND_MODE_TARGET, target: .1}, heads: make([]headResult, 2)}
	difficulties := []float32{.001, .004}
	errorAt := func(d, share float32) float32 { return d / float32(math.Pow(float64(share), falls)) }
	for range memory {
		for h, share := range []float32{.2, .3} {
			c.heads[h] = headResult{share: share, acc: sparse.Account{Estimated: 1, Read: 1, Error: errorAt(difficulties[h], share)}}
		}
		s.steering.learn(c)
	}
	shares := c.firstShares()
	f, _ := srv.calibration.factors(s.key(), 1, c.kind())
	stated := f.p95 * (errorAt(difficulties[0], shares[0]) + errorAt(difficulties[1], shares[1])) / 2
	if room := float32(c.room()); math.Abs(float64(stated/room-firstAim)) > .01 {
		t.Errorf("shares %v: %v would be stated, of %v", shares, stated, room)
	}
	if r := shares[1] / shares[0]; math.Abs(float64(r)-math.Pow(4, 1/(1+falls))) > .01 {
		t.Errorf("a head 4 times as difficult gets %v times as much", r)
	}
}

// Audits change what is stated, and can be listed.
func TestAuditsFeedCalibration(t *testing.T) {
	srv, s, ask := targetRig(t, 1, balanced)
	b := &kvtierv1.Budget{Mode: kvtierv1.AttendMode_ATTEND_MODE_BUDGET, Share: .2}
	first := ask(t.Context(), b)
	if first.CalibrationAudits != 0 || first.ErrorP95 <= 0 {
		t.Fatalf("before any audit: %v", first)
	}
	const n = 60
	for range n {
		ask(t.Context(), b)
		eventually(t, "an audit", func() bool { return len(srv.auditor.jobs) == 0 })
	}
	eventually(t, "audits", func() bool { return srv.auditor.stats().n == n+1 })
	x := &inspectionService{srv: srv}
	r, err := x.ListAudits(t.Context(), &kvtierv1.ListAuditsRequest{SequenceId: s.id, After: 1, Limit: 10})
	if err != nil || len(r.Audits) != 10 || r.Audits[9].Number != n+1 {
		t.Fatalf("%v, %d audits: %v", err, len(r.Audits), r)
	}
	truth := r.Audits[9].TrueError
	if !(truth > 0) || len(r.Audits[9].HeadErrors) != 2 || r.Audits[9].ErrorP95 <= 0 {
		t.Fatalf("an audit: %v", r.Audits[9])
	}
	// The same question again and again: what is stated closes in on the truth.
	last := ask(t.Context(), b)
	if last.CalibrationAudits != n+1 || math.Abs(float64(last.EstimatedError/truth-1)) > .05 {
		t.Errorf("stated %v after %d audits, true %v", last.EstimatedError, last.CalibrationAudits, truth)
	}
	if len(r.Layers) != 1 || r.Layers[0].Layer != 1 || r.Layers[0].Audits != n+1 {
		t.Errorf("layers: %v", r.Layers)
	}
	if s := srv.auditor.stats(); s.coverage < .9 {
		t.Errorf("coverage %v", s.coverage)
	}
}

func ptr[T any](x T) *T { return &x }

func f32Bytes(x []float32) []byte {
	b := make([]byte, 4*len(x))
	compress.FromFloat32(b, x, compress.F32)
	return b
}

// What is divided is what was asked for, in bounds, and difficult heads get more.
func TestDivide(t *testing.T) {
	rng := rand.New(rand.NewPCG(9, 9))
	for range 200 {
		difficulties := make([]float64, 1+rng.IntN(90))
		for i := range difficulties {
			difficulties[i] = .01 * math.Exp(2*rng.NormFloat64())
		}
		share := .02 + .9*rng.Float64()
		shares := divide(difficulties, share)
		mean := 0.
		for i, s := range shares {
			mean += s / float64(len(shares))
			if s > min(1, mostMoved*share)+1e-9 || s < min(share, max(leastShare, share/mostMoved))-1e-9 {
				t.Fatalf("share %v of %v", s, share)
			}
			for j := range i {
				if difficulties[i] > difficulties[j] && s < shares[j] {
					t.Fatalf("difficulty %v gets %v, and %v gets %v", difficulties[i], s, difficulties[j], shares[j])
				}
			}
		}
		if mean > share*(1+1e-6) || mean < .99*share {
			t.Fatalf("mean %v of %v heads, asked for %v", mean, len(shares), share)
		}
	}
}

// Over a step's layers no more is read than was asked for, and answers of a
// sequence depend on what it was asked before, not on chance.
func TestDividedBudgets(t *testing.T) {
	const n = 2*segment + recentTokens
	m := newModel(5, testSpec(), n)
	row := int(m.spec.QueryHeads * m.spec.HeadDim)
	b := budget{mode: kvtierv1.AttendMode_ATTEND_MODE_BUDGET, share: .3}
	steps := func(srv *Server) (shares [][]float32, out []float32) {
		s := openSequence(t, srv, &kvtierv1.OpenSequenceRequest{Spec: testSpec()})
		m.feed(t, s, 0, n)
		waitSealed(t, s, 2*segment)
		for step := range 4 {
			pos := n - 4 + step
			for l := range 2 {
				a, err := s.attend(t.Context(), &query{layer: l, start: uint64(pos), q: f32Bytes(m.q[l][pos*row : (pos+1)*row]), budget: b})
				if err != nil {
					t.Fatal(err)
				}
				shares, out = append(shares, s.mu.last[l].shares), append(out, a.out...)
			}
		}
		return shares, out
	}
	srv := openServer(t, t.TempDir(), Options{ReadAllTokens: -1, Steer: true})
	shares, out := steps(srv)
	again, out2 := steps(srv)
	for i := range out {
		if out[i] != out2[i] {
			t.Fatal("the same questions were answered otherwise")
		}
	}
	for step := range 4 {
		var mean float32
		for l := range 2 {
			for h, s := range shares[2*step+l] {
				mean += s / 4
				if s != again[2*step+l][h] {
					t.Fatalf("step %d: shares %v and %v", step, shares, again)
				}
			}
		}
		if mean > .3*(1+1e-5) {
			t.Errorf("step %d: a mean share of %v", step, mean)
		}
	}
	for step, heads := range shares {
		if moved := heads[0] != .3; moved != (step > 1) {
			t.Errorf("step %d: shares %v; nothing is known in the first step only", step/2, heads)
		}
	}
	equal, _ := steps(openServer(t, t.TempDir(), Options{ReadAllTokens: -1}))
	for _, shares := range equal {
		for _, s := range shares {
			if s != .3 {
				t.Fatalf("equal budgets: %v", equal)
			}
		}
	}
}
