package server

import (
	"context"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	kvtierv1 "kvtier/proto/kvtier/v1"
	"kvtier/tiers/files"
)

// What goes, and what comes meanwhile.

// measuredDisk lets a test say how much is free, which is asked before each commit.
type measuredDisk struct {
	files.FS
	free atomic.Pointer[func() (bytes int64, said bool)]
}

func (d *measuredDisk) Free(dir string) (int64, error) {
	if f := d.free.Load(); f != nil {
		if n, said := (*f)(); said {
			return n, nil
		}
	}
	return d.FS.Free(dir)
}

// set has f asked; nil: the disk.
func (d *measuredDisk) set(f func() (int64, bool)) {
	if f == nil {
		d.free.Store(nil)
		return
	}
	d.free.Store(&f)
}

func fullDisk() (int64, bool) { return 0, true }

// calledFrom says whether a function of that name is under way on this goroutine.
func calledFrom(name string) bool {
	b := make([]byte, 1<<16)
	return strings.Contains(string(b[:runtime.Stack(b, false)]), name)
}

// onDisk is how many bytes segments take there.
func onDisk(srv *Server) int64 {
	_, disk := srv.store.Usage()
	return disk.BytesUsed
}

// A sequence that is deleted while it loses its low planes stays deleted, and takes nothing of others' along.
func TestDeletedWhileLowPlanesGo(t *testing.T) {
	t.Parallel()
	const n = segment + recentTokens
	spec := testSpec()
	m, o := newModel(1, spec, n), newModel(2, spec, n)
	disk := &measuredDisk{FS: files.OS}
	dir := t.TempDir()
	opt := Options{FS: disk, ReadAllTokens: n - 1}
	srv := openServer(t, dir, opt)
	s := openSequence(t, srv, &kvtierv1.OpenSequenceRequest{Spec: spec})
	m.feed(t, s, 0, 1024+recentTokens)
	flushSealed(t, s) // a short span, with low planes
	deleted := make(chan error, 1)
	disk.set(func() (int64, bool) {
		if calledFrom("dropLow") { // its change is made, and not yet committed
			disk.set(nil)
			begun := make(chan struct{})
			go func() {
				close(begun)
				deleted <- s.delete(context.Background())
			}()
			<-begun
			time.Sleep(50 * time.Millisecond) // as far as it gets
		}
		return 0, false
	})
	m.feed(t, s, 1024+recentTokens, n)
	select {
	case err := <-deleted:
		if err != nil {
			t.Fatal(err)
		}
	case <-time.After(20 * time.Second):
		t.Fatal("low planes were not dropped")
	}
	eventually(t, "the sealer rests", func() bool { return srv.sealer.pending() == 0 })
	x := o.stored(t, srv, balanced) // takes the room
	eventually(t, "the sealer rests", func() bool { return srv.sealer.pending() == 0 })
	before := onDisk(srv)
	closeServer(t, srv)
	srv = openServer(t, dir, opt)
	if after := onDisk(srv); after != before || srv.store.AnyDamage() {
		t.Errorf("%d bytes on disk before a restart, %d after; damaged: %v", before, after, srv.store.AnyDamage())
	}
	o.check(t, find(t, srv, x.id), n-1, exactBudget, .1)
}

// A deletion that the disk refuses changes nothing: the sequence can be asked and forked, shares what it has with others, and can be deleted later.
func TestRefusedDeletion(t *testing.T) {
	t.Parallel()
	const n = segment + recentTokens
	m := newModel(1, testSpec(), n)
	disk := &measuredDisk{FS: files.OS}
	srv := openServer(t, t.TempDir(), Options{FS: disk})
	s := m.stored(t, srv, exact)
	for range 2 {
		disk.set(fullDisk)
		if err := s.delete(t.Context()); err == nil {
			t.Fatal("deleted on a full disk")
		}
		if srv.evictOne(nil) {
			t.Fatal("evicted on a full disk")
		}
		disk.set(nil)
		m.check(t, s, n-1, exactBudget, 1e-5)
		fork := openSequence(t, srv, &kvtierv1.OpenSequenceRequest{ForkOf: s.id})
		same := m.stored(t, srv, exact)
		for _, x := range []*sequence{fork, same} {
			if err := x.delete(t.Context()); err != nil {
				t.Fatal(err)
			}
			m.check(t, s, n-1, exactBudget, 1e-5)
		}
	}
	if err := s.delete(t.Context()); err != nil {
		t.Fatal(err)
	}
	if n := onDisk(srv); n != 0 {
		t.Errorf("%d bytes on disk of nothing", n)
	}
}

// A span that was adopted and is not used goes with the last sequence that did.
func TestAdoptedAndNotUsed(t *testing.T) {
	t.Parallel()
	const n = segment + recentTokens
	m := newModel(1, testSpec(), n)
	srv := openServer(t, t.TempDir(), Options{})
	s := m.stored(t, srv, balanced)
	x := openSequence(t, srv, &kvtierv1.OpenSequenceRequest{Spec: testSpec()})
	m.feed(t, x, 0, n-1)
	st := x.snapshot()
	sp := srv.spans.adopt(x, st.names[segment/blockTokens-1], 0, segment) // as sealing does
	if sp == nil {
		t.Fatal("not adopted")
	}
	for _, y := range []*sequence{s, x} {
		if err := y.delete(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if onDisk(srv) == 0 {
		t.Error("what is adopted went")
	}
	srv.forget(t.Context(), x, sp)
	if n := onDisk(srv); n != 0 {
		t.Errorf("%d bytes on disk of nobody", n)
	}
}

// Rows that are sent again and said to be sparse stay exact, as the first ones were, and nobody adopts a span that is gone.
func TestSentAgainAsSparse(t *testing.T) {
	t.Parallel()
	const n = segment + recentTokens
	m := newModel(1, testSpec(), n)
	srv := openServer(t, t.TempDir(), Options{})
	s := openSequence(t, srv, &kvtierv1.OpenSequenceRequest{Spec: testSpec()})
	m.feed(t, s, 0, n-100)
	row := int(m.spec.KvHeads * m.spec.HeadDim)
	again := &appendRequest{layer: 0, start: 900, k: bf16Bytes(m.k[0][900*row : 1000*row]), v: bf16Bytes(m.v[0][900*row : 1000*row]), sparse: true}
	if err := s.append(t.Context(), again); err != nil {
		t.Fatal(err)
	}
	if st := s.snapshot(); st.exactUntil != allExact {
		t.Errorf("exact until %d", st.exactUntil)
	}
	m.feed(t, s, n-100, n)
	waitSealed(t, s, segment)
	fork := openSequence(t, srv, &kvtierv1.OpenSequenceRequest{ForkOf: s.id})
	// Under whatever names a span was known, it is known under none once it is gone.
	sp := s.snapshot().spans[0].span
	first := sp.end
	srv.spans.setEnd(sp, name{1})
	for _, x := range []*sequence{s, fork} {
		if err := x.delete(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	for _, end := range []name{first, {1}} {
		if srv.spans.adopt(s, end, 0, segment) != nil {
			t.Error("a span that is gone was adopted")
		}
	}
	x := m.stored(t, srv, balanced)
	m.check(t, x, n-1, exactBudget, .1)
}

// Tokens of the same ids that were computed from sparse answers have rows of their own.
func TestSparseRowsAreNotAdopted(t *testing.T) {
	t.Parallel()
	const n = segment + recentTokens
	spec := testSpec()
	m, o := newModel(1, spec, n), newModel(2, spec, n)
	o.ids = m.ids
	srv := openServer(t, t.TempDir(), Options{})
	row := int(spec.KvHeads * spec.HeadDim)
	for _, m := range []*model{m, o} {
		s := openSequence(t, srv, &kvtierv1.OpenSequenceRequest{Spec: spec, Profile: exact})
		for l := range int(spec.Layers) {
			r := &appendRequest{layer: l, k: bf16Bytes(m.k[l][:n*row]), v: bf16Bytes(m.v[l][:n*row]), sparse: true}
			if l == 0 {
				r.ids = m.ids
			}
			if err := s.append(t.Context(), r); err != nil {
				t.Fatal(err)
			}
		}
		waitSealed(t, s, segment)
		k, _, same, err := s.readKV(t.Context(), 0, 100, 1)
		if err != nil || !same || string(k) != string(bf16Bytes(m.k[0][100*row:101*row])) {
			t.Errorf("a row is not read as it was appended, which is said of it: %v, %v", same, err)
		}
		m.check(t, s, n-1, exactBudget, 1e-5)
	}
}

// A sequence that was changed since it was matched is not forked as what it was.
func TestForkOfWhatWasMatched(t *testing.T) {
	t.Parallel()
	m, o := newModel(1, testSpec(), 600), newModel(2, testSpec(), 600)
	srv := openServer(t, t.TempDir(), Options{})
	s := openSequence(t, srv, &kvtierv1.OpenSequenceRequest{Spec: testSpec()})
	m.feed(t, s, 0, 600)
	find := func() (*kvtierv1.Prefix, *sequence) {
		t.Helper()
		p, from, err := srv.matchPrefix(&kvtierv1.MatchPrefixRequest{Spec: testSpec(), TokenIds: m.ids})
		if err != nil {
			t.Fatal(err)
		}
		return p, from
	}
	p, from := find()
	if from != s || p.GetTokens() != 576 {
		t.Fatalf("matched %v", p)
	}
	fork := func(at uint64, p *kvtierv1.Prefix) (*sequence, error) {
		f, release, err := srv.open(t.Context(), &kvtierv1.OpenSequenceRequest{ForkOf: s.id, ForkAt: at, ForkPrefix: p})
		if err == nil {
			release()
		}
		return f, err
	}
	for _, at := range []uint64{576, 500, 64} {
		f, err := fork(at, p)
		if err != nil {
			t.Fatal(err)
		}
		m.check(t, f, int(at)-1, exactBudget, .1)
		if err := f.delete(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	for _, bad := range []*kvtierv1.Prefix{{}, {Tokens: 64}, {Tokens: 65, Name: p.Name}, {Name: p.Name}, {Tokens: 1 << 62, Name: p.Name[1:]}} {
		_, err := fork(64, bad)
		wantCode(t, err, codes.InvalidArgument, ReasonArgument)
	}
	_, err := fork(64, &kvtierv1.Prefix{Tokens: 1 << 62, Name: p.Name})
	wantCode(t, err, codes.NotFound, ReasonPrefixGone)
	if err := s.truncate(t.Context(), 0); err != nil {
		t.Fatal(err)
	}
	o.feed(t, s, 0, 600)
	_, err = fork(p.Tokens, p)
	wantCode(t, err, codes.NotFound, ReasonPrefixGone)
	if p, from := find(); from != nil {
		t.Errorf("matched %v", p)
	}
}

// What a worker left incomplete is gone before the next one appends, whose rows stay.
func TestNextHolderKeepsItsRows(t *testing.T) {
	t.Parallel()
	m := newModel(1, testSpec(), 4)
	srv := openServer(t, t.TempDir(), Options{})
	row := int(m.spec.KvHeads * m.spec.HeadDim)
	add := func(s *sequence, layer, at int) {
		t.Helper()
		r := &appendRequest{layer: layer, start: uint64(at), k: bf16Bytes(m.k[layer][at*row : (at+1)*row]), v: bf16Bytes(m.v[layer][at*row : (at+1)*row])}
		if err := s.append(t.Context(), r); err != nil {
			t.Fatal(err)
		}
	}
	for range 20 {
		s := openSequence(t, srv, &kvtierv1.OpenSequenceRequest{Spec: testSpec()})
		m.feed(t, s, 0, 2)
		release := hold(t, s)
		add(s, 0, 2)
		s.write.Lock() // as what commits does
		gone, held := make(chan struct{}), make(chan func())
		go func() { release(); close(gone) }()
		eventually(t, "the first goes", func() bool { s.mu.RLock(); defer s.mu.RUnlock(); return s.mu.holders == 0 })
		go func() {
			release, err := s.hold()
			if err != nil {
				t.Error(err)
			}
			held <- release
		}()
		eventually(t, "the second comes", func() bool { s.mu.RLock(); defer s.mu.RUnlock(); return s.mu.holders == 1 })
		s.write.Unlock()
		second := <-held
		if st := s.snapshot(); st.lens[0] != 2 {
			t.Fatalf("the second finds %d tokens of layer 0, 2 are whole", st.lens[0])
		}
		add(s, 0, 2)
		<-gone
		for l := 1; l < int(m.spec.Layers); l++ {
			add(s, l, 2)
		}
		if st := s.snapshot(); st.accepted != 3 {
			t.Fatalf("%d tokens, of 3 that were accepted", st.accepted)
		}
		second()
	}
}

// A panic while a segment is sealed is that segment's error alone.
func TestSealerOutlivesAPanic(t *testing.T) {
	t.Parallel()
	const n = segment + recentTokens
	m := newModel(1, testSpec(), n+1)
	disk := &measuredDisk{FS: files.OS}
	srv := openServer(t, t.TempDir(), Options{FS: disk})
	disk.set(func() (int64, bool) {
		if calledFrom("sealNext") {
			disk.set(nil)
			panic("made up")
		}
		return 0, false
	})
	s := openSequence(t, srv, &kvtierv1.OpenSequenceRequest{Spec: testSpec()})
	m.feed(t, s, 0, n)
	eventually(t, "a panic is an error", func() bool { return srv.sealer.lastFailure() != nil })
	if st := s.snapshot(); st.sealed() != 0 {
		t.Errorf("%d tokens are sealed", st.sealed())
	}
	m.feed(t, s, n, n+1)
	waitSealed(t, s, segment)
	m.check(t, s, n, exactBudget, .1)
}
