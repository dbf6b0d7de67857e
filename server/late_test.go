//go:build linux

package server

import (
	"context"
	"errors"
	"math"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	kvtierv1 "kvtier/proto/kvtier/v1"
	"kvtier/server/sparse"
	"kvtier/tiers"
	"kvtier/tiers/files"
	"kvtier/tiers/files/filestest"
)

// lateFolder is a closed data folder of which, once it is open again, values and the last bits of keys lie on disk alone.
type lateFolder struct {
	*model
	t       *testing.T
	dir, id string
	disk    *filestest.Sticky
}

const latePosition = 2*segment + recentTokens - 1

func newLateFolder(t *testing.T) *lateFolder {
	f := &lateFolder{model: newModel(5, testSpec(), latePosition+1), t: t, dir: filepath.Join(t.TempDir(), "data")}
	f.disk = &filestest.Sticky{FS: files.OS}
	srv := openServer(t, f.dir, f.options())
	s := openSequence(t, srv, &kvtierv1.OpenSequenceRequest{Spec: f.spec})
	f.feed(t, s, 0, f.n)
	waitSealed(t, s, 2*segment)
	f.id = s.id
	closeServer(t, srv)
	t.Cleanup(f.disk.Unstick) // before servers close
	return f
}

// options leave the NVMe tier room for blocks in memory.
func (f *lateFolder) options() Options {
	return Options{ReadAllTokens: -1, RAMBytes: 256 << 20, DiskBytes: 64 << 20, FS: f.disk}
}

// open opens the folder, and waits until RAM has what every query reads.
func (f *lateFolder) open(o Options) (*rig, *sequence) {
	f.t.Helper()
	r := newRigAt(f.t, f.dir, o)
	s := find(f.t, r.srv, f.id)
	st := s.snapshot()
	eventually(f.t, "means come up", func() bool {
		for _, span := range st.spans {
			for _, h := range span.segments {
				for head := range h.Heads {
					for _, p := range []tiers.Plane{tiers.PlanePages, tiers.PlaneMap, tiers.PlaneSteps, tiers.PlaneK1, tiers.PlaneK2, tiers.PlaneSinks} {
						if _, _, ok := h.Piece(head, p); ok && !r.srv.store.Resident(h.ID, head, p) {
							return false
						}
					}
				}
			}
		}
		return true
	})
	return r, s
}

func (f *lateFolder) query(b budget) *query {
	row := int(f.spec.QueryHeads * f.spec.HeadDim)
	return &query{layer: 1, start: latePosition, q: f32Bytes(f.q[1][latePosition*row : (latePosition+1)*row]), budget: b}
}

// ask answers, or fails the test.
func (f *lateFolder) ask(s *sequence, b budget) *answer {
	f.t.Helper()
	a, err := s.attend(f.t.Context(), f.query(b))
	if err != nil {
		f.t.Fatal(err)
	}
	return a
}

// hurried is a budget by share whose reads may be late.
func hurried(share float32, wait time.Duration) budget {
	b := shareBudget(share)
	b.wait = wait
	return b
}

// alone answers on a server of its own, which has read nothing before, of a disk that is well.
func (f *lateFolder) alone(b budget) *answer {
	f.t.Helper()
	r, s := f.open(f.options())
	a := f.ask(s, b)
	closeServer(f.t, r.srv)
	return a
}

func sameAnswer(t *testing.T, what string, got, want *answer) {
	t.Helper()
	if !slices.Equal(got.out, want.out) || !slices.Equal(got.lse, want.lse) {
		t.Errorf("%s: the answer is another one", what)
	}
}

// withoutPlanes is a store that has what every query reads in time, and nothing else.
type withoutPlanes struct{ sparse.Reader }

func (w withoutPlanes) Pin(ctx context.Context, reqs []tiers.Request) ([]tiers.Pin, tiers.Moved, error) {
	pins, moved, err := w.Reader.Pin(ctx, reqs)
	for i := range pins {
		if reqs[i].Plane != tiers.PlaneSteps && reqs[i].Plane != tiers.PlaneK1 && reqs[i].Plane != tiers.PlaneK2 {
			for j, x := range reqs[i].Ranges {
				pins[i].Ranges[j] = nil
				pins[i].Late += x.Len
			}
		}
	}
	return pins, moved, err
}

// A disk is stuck: a call with a budget answers nevertheless, as if it had not chosen what is late, and says so. When
// the disk is well again the late blocks are in memory, and answers are those that a disk that was never stuck gives. Calls
// with a target and exact ones wait, and lose nothing.
func TestLateReads(t *testing.T) {
	t.Parallel()
	f := newLateFolder(t)
	waited := f.alone(shareBudget(.3))
	target := budget{mode: kvtierv1.AttendMode_ATTEND_MODE_TARGET, target: .05, wait: time.Microsecond}
	aimed := f.alone(target)
	everything := f.alone(exactBudget)
	sameAnswer(t, "a wait that is long enough", f.alone(hurried(.3, time.Hour)), waited)

	// What unread tokens stand for.
	r, s := f.open(f.options())
	st := s.snapshot()
	q, _, err := s.checkQuery(f.query(shareBudget(.3)))
	if err != nil {
		t.Fatal(err)
	}
	for i := range q {
		q[i] *= s.spec.scale
	}
	oracle := &call{seq: s, st: &st, layer: 1, start: latePosition, n: 1, q: q, budget: shareBudget(.3), hasty: withoutPlanes{r.srv.store}}
	ps, err := oracle.answer(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	unread := s.finish(ps)
	closeServer(t, r.srv)

	o := f.options()
	o.AuditShare = 1
	r, s = f.open(o)
	f.disk.Stick()
	for range 3 {
		late := f.ask(s, hurried(.3, 20*time.Millisecond)) // the disk stays stuck until it has come
		a := late.account
		sameAnswer(t, "late", late, unread)
		if a.TokensLate == 0 || a.BytesLate == 0 || a.BytesNvme != 0 || a.Mode != kvtierv1.AttendMode_ATTEND_MODE_BUDGET || a.TokensRead != 0 ||
			a.EstimatedError <= waited.account.EstimatedError || a.ErrorP95 <= a.EstimatedError {
			t.Errorf("late: %v\nin time: %v", a, waited.account)
		}
		if int64(a.TokensLate) != oracle.acc.Late || int64(a.BytesLate) != oracle.acc.LateBytes {
			t.Errorf("%d tokens and %d bytes are late, not %d and %d", a.TokensLate, a.BytesLate, oracle.acc.Late, oracle.acc.LateBytes)
		}
	}
	if len(r.srv.auditor.jobs) > 0 || r.srv.auditor.stats().n > 0 || len(r.srv.calibration.layers()) > 0 || len(s.steering.mu.heads) > 0 {
		t.Error("late answers taught something")
	}
	st2, err := (&inspectionService{srv: r.srv}).GetStatus(t.Context(), &kvtierv1.GetStatusRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for _, tier := range st2.Tiers {
		if (tier.LateReads > 0) != (tier.Name == "nvme") {
			t.Errorf("status: %v", tier)
		}
	}
	if n := counted(t, r.srv, "kvtier_attends_late_total"); n != 3 {
		t.Errorf("%v late answers counted", n)
	}
	// Who waits does.
	answers := make(chan *answer)
	for _, b := range []budget{target, exactBudget} {
		go func() {
			a, err := s.attend(context.Background(), f.query(b))
			if err != nil {
				t.Error(err)
			}
			answers <- a
		}()
		select {
		case <-answers:
			t.Errorf("mode %v: answered without its bytes", b.mode)
		case <-time.After(20 * time.Millisecond):
		}
	}
	f.disk.Unstick()
	for range 2 {
		switch a := <-answers; {
		case a.account.TokensLate > 0:
			t.Errorf("late in mode %v", a.account.Mode)
		case a.account.Mode == kvtierv1.AttendMode_ATTEND_MODE_EXACT && a.account.TokensEstimated == 0 && slices.Equal(a.out, everything.out):
		default:
			sameAnswer(t, "target", a, aimed)
		}
	}
	eventually(t, "late blocks are in memory", func() bool {
		f.disk.Stick()
		defer f.disk.Unstick()
		a := f.ask(s, hurried(.3, time.Microsecond))
		if a.account.TokensLate > 0 {
			return false
		}
		sameAnswer(t, "from memory", a, waited)
		return true
	})
	eventually(t, "calls in time are audited", func() bool { return r.srv.auditor.stats().n > 0 })
}

// counted returns a counter of /metrics.
func counted(t *testing.T, srv *Server, name string) (n float64) {
	t.Helper()
	families, err := srv.Metrics().Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() == name {
			for _, m := range f.Metric {
				n += m.GetCounter().GetValue()
			}
		}
	}
	return n
}

// However a call comes, it can say how long it waits, and hears what was late. The daemon's own wait is that of calls that name
// none; a call may wait nevertheless.
func TestLateOverPaths(t *testing.T) {
	t.Parallel()
	f := newLateFolder(t)
	for _, kind := range paths {
		t.Run(kind, func(t *testing.T) {
			for _, byDefault := range []bool{false, true} {
				o := f.options()
				us := uint32(2000)
				if byDefault {
					o.ReadWait, us = 2*time.Millisecond, 0
				}
				r, _ := f.open(o)
				w := &worker{model: f.model, t: t, r: r, p: r.path(t, kind), id: f.id}
				f.disk.Stick()
				b := &kvtierv1.Budget{Mode: kvtierv1.AttendMode_ATTEND_MODE_BUDGET, Share: .3, ReadWaitUs: us}
				a := w.attend(request(1, b, w.queries(latePosition, latePosition+1, 1)))[0].Account
				if a.TokensLate == 0 || a.BytesLate == 0 {
					t.Errorf("by default %v: %v", byDefault, a)
				}
				if byDefault {
					a = w.attend(request(1, nil, w.queries(latePosition, latePosition+1, 1)))[0].Account
					if a.TokensLate == 0 {
						t.Errorf("without a budget: %v", a)
					}
				}
				done := make(chan *kvtierv1.Account)
				go func() {
					b := &kvtierv1.Budget{Mode: kvtierv1.AttendMode_ATTEND_MODE_BUDGET, Share: .31, ReadWaitUs: waitForever}
					res, err := w.p.attend(context.Background(), w.spec, request(1, b, w.queries(latePosition, latePosition+1, 1)))
					if err != nil {
						t.Error(err)
					}
					done <- res.GetResults()[0].GetAccount()
				}()
				select {
				case <-done:
					t.Error("a call that waits did not")
				case <-time.After(10 * time.Millisecond):
				}
				f.disk.Unstick()
				if a := <-done; a.TokensLate != 0 {
					t.Errorf("waited: %v", a)
				}
				w.p.close()
				closeServer(t, r.srv)
			}
		})
	}
}

// Means are waited for, as long as the call lasts: there is nothing to estimate from, and no answer.
func TestLateMeans(t *testing.T) {
	t.Parallel()
	f := newLateFolder(t)
	f.disk.Stick()
	srv := openServer(t, f.dir, f.options())
	s := find(t, srv, f.id)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Millisecond)
	defer cancel()
	if a, err := s.attend(ctx, f.query(hurried(.3, time.Microsecond))); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("answer %v, error %v", a, err)
	}
	f.disk.Unstick()
	if a := f.ask(s, hurried(.3, time.Hour)).account; a.TokensLate != 0 {
		t.Errorf("a disk that is well: %v", a)
	}
}

// A daemon that closes while reads are stuck waits for those that are under way, and leaves nothing behind.
func TestLateClose(t *testing.T) {
	t.Parallel()
	f := newLateFolder(t)
	r, s := f.open(f.options())
	f.disk.Stick()
	if a := f.ask(s, hurried(.3, time.Millisecond)).account; a.TokensLate == 0 {
		t.Fatalf("nothing is late: %v", a)
	}
	closed := make(chan error)
	go func() { closed <- r.srv.Close(context.Background()) }()
	select {
	case <-closed:
		t.Fatal("closed over reads under way")
	case <-time.After(20 * time.Millisecond):
	}
	f.disk.Unstick()
	if err := <-closed; err != nil {
		t.Fatal(err)
	}
	sameAnswer(t, "opened again", f.alone(shareBudget(.3)), f.alone(shareBudget(.3)))
}

// Many callers of a disk that is slow, stuck and well by turns: every answer is sound, and in the end the right one.
func TestLateCallers(t *testing.T) {
	t.Parallel()
	f := newLateFolder(t)
	waited := f.alone(shareBudget(.3))
	everything := f.alone(exactBudget)
	r, s := f.open(f.options())
	var callers, turns sync.WaitGroup
	stop := make(chan struct{})
	turns.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			case <-time.After(time.Millisecond):
			}
			f.disk.Slow(time.Duration(i%3) * time.Millisecond)
			if i%2 == 0 {
				f.disk.Stick()
			} else {
				f.disk.Unstick()
			}
		}
	})
	for c := range 8 {
		callers.Go(func() {
			for i := range 25 {
				b := hurried(.3, time.Duration(100*(i+1))*time.Microsecond)
				if (c+i)%8 == 0 {
					b = exactBudget
				}
				a, err := s.attend(t.Context(), f.query(b))
				switch {
				case err != nil:
					t.Error(err)
					return
				case b.wait == 0 && !slices.Equal(a.out, everything.out):
					t.Error("an exact answer differs")
				case b.wait > 0 && a.account.TokensLate == 0 && !slices.Equal(a.out, waited.out):
					t.Error("an answer of which nothing is late differs")
				}
				for _, x := range a.out {
					if math.IsNaN(float64(x)) || math.IsInf(float64(x), 0) {
						t.Error("an output is no number")
						return
					}
				}
			}
		})
	}
	callers.Wait()
	close(stop)
	turns.Wait()
	f.disk.Unstick()
	f.disk.Slow(0)
	t.Logf("%v late answers, %d reads", counted(t, r.srv, "kvtier_attends_late_total"), f.disk.Reads())
	sameAnswer(t, "at last", f.ask(s, shareBudget(.3)), waited)
}

func TestReadWaitIsChecked(t *testing.T) {
	t.Parallel()
	if _, err := Open(t.Context(), Options{DataDir: t.TempDir(), ReadWait: -1}); err == nil || !strings.Contains(err.Error(), "wait") {
		t.Errorf("error %v", err)
	}
	srv := openServer(t, t.TempDir(), Options{ReadWait: time.Second})
	for us, want := range map[uint32]time.Duration{0: time.Second, 1: time.Microsecond, waitForever - 1: (waitForever - 1) * time.Microsecond, waitForever: 0} {
		for _, b := range []*kvtierv1.Budget{{ReadWaitUs: us}, {ReadWaitUs: us, Mode: kvtierv1.AttendMode_ATTEND_MODE_BUDGET, Tokens: 7}} {
			got, err := srv.budgetOf(b)
			if err != nil || got.wait != want {
				t.Errorf("%v: %v, %v", b, got.wait, err)
			}
			if again, err := srv.budgetOf(got.proto()); err != nil || again != got {
				t.Errorf("%v comes back as %v, %v", got, again, err)
			}
		}
	}
}
