package server

import (
	"fmt"
	"os"
	"sync"
	"testing"

	"google.golang.org/grpc/codes"

	kvtierv1 "kvtier/proto/kvtier/v1"
)

// spillRig has sequences whose tails do not fit into memory together.
type spillRig struct {
	srv    *Server
	models []*model
	seqs   []*sequence
}

const spillTokens = 200

func newSpillRig(t *testing.T, dir string, spec *kvtierv1.ModelSpec, n, fit int) *spillRig {
	t.Helper()
	sp, err := newSpec(spec)
	if err != nil {
		t.Fatal(err)
	}
	r := &spillRig{srv: openServer(t, dir, Options{TailBytes: int64(fit * 2 * spillTokens * sp.tokenBytes())})}
	for i := range n {
		m := newModel(uint64(i+1), spec, 2*spillTokens)
		s := openSequence(t, r.srv, &kvtierv1.OpenSequenceRequest{Spec: spec})
		for lo := 0; lo < spillTokens; lo += 10 { // step by step, as records
			m.feed(t, s, lo, lo+10)
		}
		r.models, r.seqs = append(r.models, m), append(r.seqs, s)
	}
	return r
}

func (r *spillRig) spilled() (n int) {
	for _, s := range r.seqs {
		if st := s.snapshot(); st.spilled {
			n++
		}
	}
	return n
}

// spillNow spills a sequence's tail.
func spillNow(t *testing.T, s *sequence) {
	t.Helper()
	s.write.Lock()
	s.spill()
	s.write.Unlock()
	if st := s.snapshot(); !st.spilled || st.tailBytes(s.spec) != 0 {
		t.Fatalf("spilled %v, %d bytes", st.spilled, st.tailBytes(s.spec))
	}
}

// TestSpill: tails that do not fit are spilled, never over the limit, and
// answer as before; appends go on; after a restart too.
func TestSpill(t *testing.T) {
	for name, spec := range map[string]*kvtierv1.ModelSpec{"full": testSpec(), "sliding": slidingSpec()} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			r := newSpillRig(t, dir, spec, 8, 3)
			if r.spilled() == 0 {
				t.Fatal("nothing was spilled")
			}
			var wg sync.WaitGroup
			for i, s := range r.seqs {
				wg.Go(func() {
					for n := spillTokens; n < spillTokens+20; n++ {
						if err := r.models[i].tryFeed(s, n, n+1); err != nil {
							if e := toError(err); e.Code != codes.ResourceExhausted {
								t.Error(err)
							}
							return
						}
					}
				})
			}
			wg.Wait()
			if n := r.srv.tail.Load(); n > r.srv.opt.TailBytes {
				t.Errorf("tails take %d bytes, more than %d", n, r.srv.opt.TailBytes)
			}
			for i, s := range r.seqs {
				r.models[i].check(t, s, int(s.snapshot().accepted)-1, exactBudget, 1e-5)
			}
			closeServer(t, r.srv)
			r.srv = openServer(t, dir, Options{TailBytes: r.srv.opt.TailBytes})
			if n := r.srv.tail.Load(); n > r.srv.opt.TailBytes {
				t.Errorf("after a restart tails take %d bytes, more than %d", n, r.srv.opt.TailBytes)
			}
			for i, s := range r.seqs {
				again, err := r.srv.sequence(s.id)
				if err != nil {
					t.Fatal(err)
				}
				r.seqs[i] = again
				if a, b := again.snapshot().accepted, s.snapshot().accepted; a != b {
					t.Fatalf("%d tokens, %d before", a, b)
				}
				r.models[i].check(t, again, int(again.snapshot().accepted)-1, exactBudget, 1e-5)
			}
			if r.spilled() == 0 {
				t.Error("nothing was spilled after a restart")
			}
		})
	}
}

// TestSpilledChanges: what changes a sequence works on a spilled tail.
func TestSpilledChanges(t *testing.T) {
	r := newSpillRig(t, t.TempDir(), testSpec(), 1, 10)
	s, m := r.seqs[0], r.models[0]
	spillNow(t, s)
	m.feed(t, s, spillTokens-10, spillTokens) // the same again
	spillNow(t, s)
	if err := s.truncate(t.Context(), spillTokens-50); err != nil {
		t.Fatal(err)
	}
	m.check(t, s, spillTokens-51, exactBudget, 1e-5)
	spillNow(t, s)
	fork := openSequence(t, r.srv, &kvtierv1.OpenSequenceRequest{ForkOf: s.id, ForkAt: 100})
	m.check(t, fork, 99, exactBudget, 1e-5)
	spillNow(t, fork)
	m.feed(t, fork, 100, 120)
	m.check(t, fork, 119, exactBudget, 1e-5)
	spillNow(t, s)
	if _, _, _, err := s.readKV(t.Context(), 0, 0, 150); err != nil {
		t.Fatal(err)
	}
	spillNow(t, s)
	if err := s.flush(t.Context(), true); err != nil { // nothing to seal yet
		t.Fatal(err)
	}
	m.feed(t, s, spillTokens-50, 2*spillTokens)
	spillNow(t, s)
	if err := s.flush(t.Context(), true); err != nil {
		t.Fatal(err)
	}
	if st := s.snapshot(); st.sealed() == 0 {
		t.Error("not sealed")
	}
	m.check(t, s, 2*spillTokens-1, exactBudget, .2)
	spillNow(t, s)
	if err := s.delete(t.Context()); err != nil {
		t.Fatal(err)
	}
	if n := r.srv.tail.Load(); n != fork.mu.tailBytes(fork.spec) {
		t.Errorf("tails take %d bytes, the fork's %d", n, fork.mu.tailBytes(fork.spec))
	}
}

// TestSpilledAhead: rows that the log does not hold stay in RAM, and the step
// they belong to can be completed.
func TestSpilledAhead(t *testing.T) {
	for name, spec := range map[string]*kvtierv1.ModelSpec{"full": testSpec(), "sliding": slidingSpec()} {
		t.Run(name, func(t *testing.T) {
			r := newSpillRig(t, t.TempDir(), spec, 1, 10)
			s, m := r.seqs[0], r.models[0]
			row := int(m.spec.KvHeads * m.spec.HeadDim)
			ahead := func(from, to int) *appendRequest {
				return &appendRequest{start: uint64(from), k: bf16Bytes(m.k[0][from*row : to*row]), v: bf16Bytes(m.v[0][from*row : to*row])}
			}
			spillAhead := func(want int64) {
				t.Helper()
				s.write.Lock()
				s.spill()
				s.write.Unlock()
				if st := s.snapshot(); !st.spilled || st.tailBytes(s.spec) != want {
					t.Fatalf("spilled %v, %d bytes, want %d", st.spilled, st.tailBytes(s.spec), want)
				}
			}
			if err := s.append(t.Context(), ahead(spillTokens, spillTokens+3)); err != nil {
				t.Fatal(err)
			}
			spillAhead(3 * 4 * int64(row))
			a := m.ask(t, s, 0, spillTokens+2, exactBudget)
			if e := m.worst(a.out, m.dense(0, spillTokens+2)); !(e < 1e-5) {
				t.Errorf("error %v", e)
			}
			spillAhead(3 * 4 * int64(row))
			m.feed(t, s, spillTokens, spillTokens+10) // the other layers, and more
			m.check(t, s, spillTokens+9, exactBudget, 1e-5)
			if err := s.append(t.Context(), ahead(spillTokens+10, spillTokens+12)); err != nil {
				t.Fatal(err)
			}
			spillAhead(2 * 4 * int64(row))
			hold(t, s)() // the worker goes
			if st := s.snapshot(); st.tailBytes(s.spec) != 0 {
				t.Errorf("%d bytes", st.tailBytes(s.spec))
			}
			m.check(t, s, spillTokens+9, exactBudget, 1e-5)
			if n := r.srv.tail.Load(); n != s.mu.tailBytes(s.spec) {
				t.Errorf("tails take %d bytes, not %d", n, s.mu.tailBytes(s.spec))
			}
		})
	}
}

// TestSpilledDamage: a log that was changed on disk is an error, not other rows.
func TestSpilledDamage(t *testing.T) {
	r := newSpillRig(t, t.TempDir(), testSpec(), 1, 10)
	s := r.seqs[0]
	spillNow(t, s)
	path := s.logPath(s.place.Gen)
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for at := 0; at < len(good); at += len(good)/50 + 1 {
		bad := append([]byte(nil), good...)
		bad[at] ^= 8
		if err := os.WriteFile(path, bad, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := s.whole(); err == nil {
			t.Fatalf("byte %d was changed, and rows came back", at)
		}
	}
	if err := os.WriteFile(path, good, 0o600); err != nil {
		t.Fatal(err)
	}
	r.models[0].check(t, s, spillTokens-1, exactBudget, 1e-5)
}

// TestNoRoomToRead: where other tails fill the memory and cannot be spilled, a
// spilled one is read all the same, and appends to it are put off.
func TestNoRoomToRead(t *testing.T) {
	for name, spec := range map[string]*kvtierv1.ModelSpec{"full": testSpec(), "sliding": slidingSpec()} {
		t.Run(name, func(t *testing.T) {
			r := newSpillRig(t, t.TempDir(), spec, 1, 10)
			s, m := r.seqs[0], r.models[0]
			spillNow(t, s)
			r.srv.tail.Add(r.srv.opt.TailBytes)
			defer r.srv.tail.Add(-r.srv.opt.TailBytes)
			m.check(t, s, spillTokens-1, exactBudget, 1e-5)
			if st := s.snapshot(); !st.spilled {
				t.Error("rows were kept without room for them")
			}
			wantCode(t, m.tryFeed(s, spillTokens, spillTokens+1), codes.ResourceExhausted, ReasonTailFull)
		})
	}
}

// BenchmarkReadBack reads a tail of 1,024 tokens of SmolLM2's geometry (24 MB)
// back from its log, which holds bulk appends or single steps.
func BenchmarkReadBack(b *testing.B) {
	spec := &kvtierv1.ModelSpec{Layers: 30, QueryHeads: 9, KvHeads: 3, HeadDim: 64,
		KvDtype: kvtierv1.ElementType_ELEMENT_TYPE_BF16, Fingerprint: []byte("bench")}
	const tokens = 1024
	for _, step := range []int{512, 1} {
		b.Run(fmt.Sprintf("step=%d", step), func(b *testing.B) {
			srv := openServer(b, b.TempDir(), Options{})
			s := openSequence(b, srv, &kvtierv1.OpenSequenceRequest{Spec: spec})
			for at := 0; at < tokens; at += step {
				for l := range 30 {
					rows := make([]byte, step*s.spec.rowBytes())
					if err := s.append(b.Context(), &appendRequest{layer: l, start: uint64(at), k: rows, v: rows}); err != nil {
						b.Fatal(err)
					}
				}
			}
			b.SetBytes(int64(tokens * s.spec.tokenBytes()))
			for b.Loop() {
				s.write.Lock()
				s.spill()
				s.write.Unlock()
				if _, err := s.whole(); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
