package server

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"

	"google.golang.org/grpc/codes"

	"kvtier/compress"
	kvtierv1 "kvtier/proto/kvtier/v1"
	"kvtier/tiers"
)

// grafted is a model whose tokens from at on are another's: what a fork becomes.
func (m *model) grafted(o *model, at int) *model {
	out := &model{spec: m.spec, n: o.n, ids: append(slices.Clone(m.ids[:at]), o.ids[at:]...)}
	for l := range m.k {
		graft := func(a, b []float32) []float32 {
			row := len(a) / m.n
			return append(slices.Clone(a[:at*row]), b[at*row:]...)
		}
		out.k, out.v, out.q = append(out.k, graft(m.k[l], o.k[l])), append(out.v, graft(m.v[l], o.v[l])), append(out.q, graft(m.q[l], o.q[l]))
	}
	return out
}

// code returns the gRPC code and reason of an error.
func code(err error) (codes.Code, string) {
	if err == nil {
		return codes.OK, ""
	}
	e := toError(err)
	return e.Code, e.Reason
}

func wantCode(t *testing.T, err error, c codes.Code, reason string) {
	t.Helper()
	if gotCode, gotReason := code(err); gotCode != c || gotReason != reason {
		t.Fatalf("%v %q, want %v %q: %v", gotCode, gotReason, c, reason, err)
	}
}

func flushSealed(t testing.TB, s *sequence) {
	t.Helper()
	if err := s.flush(context.Background(), true); err != nil {
		t.Fatal(err)
	}
}

const segment = tiers.SegmentTokens

// Forks at every kind of point; both sides then go on differently and stay right.
func TestForkPoints(t *testing.T) {
	t.Parallel()
	const n = segment + 700
	for _, c := range []struct {
		spec   *kvtierv1.ModelSpec
		at     int
		refuse bool
	}{
		{testSpec(), n, false}, {testSpec(), n - 1, false}, {testSpec(), n - 100, false}, // in the tail
		{testSpec(), segment, false}, {testSpec(), segment + 64, false}, // where spans end
		{testSpec(), segment - 1, false}, {testSpec(), 1000, false}, {testSpec(), 10, false}, {testSpec(), 1, false}, // inside
		{slidingSpec(), n, false}, {slidingSpec(), segment, false}, {slidingSpec(), segment + 1, true}, {slidingSpec(), 1000, true},
	} {
		t.Run(fmt.Sprintf("%d layers at %d", c.spec.Layers, c.at), func(t *testing.T) {
			dir := t.TempDir()
			srv := openServer(t, dir, Options{RAMBytes: 1 << 20, ReadAllTokens: -1})
			m, o := newModel(1, c.spec, n+80), newModel(2, c.spec, n+80)
			parent := openSequence(t, srv, &kvtierv1.OpenSequenceRequest{Spec: c.spec, Profile: kvtierv1.Profile_PROFILE_EXACT})
			m.feed(t, parent, 0, n)
			waitSealed(t, parent, segment)
			flushSealed(t, parent)
			child, release, err := srv.open(t.Context(), &kvtierv1.OpenSequenceRequest{ForkOf: parent.id, ForkAt: uint64(c.at), Name: "child"})
			if c.refuse {
				wantCode(t, err, codes.FailedPrecondition, ReasonForkPoint)
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			release()
			g := m.grafted(o, c.at)
			if c.at > 0 {
				g.check(t, child, c.at-1, exactBudget, 1e-5)
			}
			m.feed(t, parent, n, n+80)
			g.feed(t, child, c.at, c.at+80)
			both := func(parent, child *sequence) {
				t.Helper()
				m.check(t, parent, n+79, exactBudget, 1e-5)
				g.check(t, child, c.at+79, exactBudget, 1e-5)
				g.check(t, child, c.at+20, exactBudget, 1e-5)
				if c.at > 100 {
					m.check(t, parent, n+79, shareBudget(.4), .4)
					g.check(t, child, c.at+79, shareBudget(.4), .4)
				}
			}
			both(parent, child)
			closeServer(t, srv)
			srv = openServer(t, dir, Options{RAMBytes: 1 << 20, ReadAllTokens: -1})
			parent, child = find(t, srv, parent.id), find(t, srv, child.id)
			both(parent, child)
			if child.parent != parent.id || child.name != "child" {
				t.Errorf("child of %q, named %q", child.parent, child.name)
			}
			// The parent goes; the child keeps what it needs.
			if err := parent.delete(t.Context()); err != nil {
				t.Fatal(err)
			}
			g.check(t, child, c.at+79, exactBudget, 1e-5)
			flushSealed(t, child)
			g.check(t, child, c.at+79, exactBudget, 1e-5)
		})
	}
}

func find(t testing.TB, srv *Server, id string) *sequence {
	t.Helper()
	s, err := srv.sequence(id)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestForkRefusals(t *testing.T) {
	t.Parallel()
	srv := openServer(t, t.TempDir(), Options{})
	m := newModel(1, testSpec(), 100)
	s := openSequence(t, srv, &kvtierv1.OpenSequenceRequest{Spec: testSpec()})
	m.feed(t, s, 0, 100)
	_, _, err := srv.open(t.Context(), &kvtierv1.OpenSequenceRequest{ForkOf: s.id, ForkAt: 101})
	wantCode(t, err, codes.OutOfRange, ReasonPastEnd)
	_, _, err = srv.open(t.Context(), &kvtierv1.OpenSequenceRequest{ForkOf: "none"})
	wantCode(t, err, codes.NotFound, ReasonUnknown)
	_, _, err = srv.open(t.Context(), &kvtierv1.OpenSequenceRequest{ForkOf: s.id, Spec: slidingSpec()})
	wantCode(t, err, codes.FailedPrecondition, ReasonSpecDiffers)
	_, _, err = srv.open(t.Context(), &kvtierv1.OpenSequenceRequest{ForkOf: s.id, Profile: kvtierv1.Profile_PROFILE_EXACT})
	wantCode(t, err, codes.FailedPrecondition, ReasonSpecDiffers)
	// All of it, without saying how much.
	all := openSequence(t, srv, &kvtierv1.OpenSequenceRequest{ForkOf: s.id})
	if a := all.ack(); a.Accepted != 100 || a.CrashSafe != 100 {
		t.Errorf("a fork of all: %v", a)
	}
}

func match(t testing.TB, srv *Server, m *model, n int, p kvtierv1.Profile, sparse bool) (uint64, *sequence) {
	t.Helper()
	matched, s, err := srv.matchPrefix(&kvtierv1.MatchPrefixRequest{Spec: m.spec, Profile: p, TokenIds: m.ids[:n], AllowSparse: sparse})
	if err != nil {
		t.Fatal(err)
	}
	return matched.GetTokens(), s
}

func TestMatchPrefix(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	srv := openServer(t, dir, Options{ReadAllTokens: -1})
	const balanced, exact = kvtierv1.Profile_PROFILE_BALANCED, kvtierv1.Profile_PROFILE_EXACT
	m := newModel(1, testSpec(), 1000)
	s := openSequence(t, srv, &kvtierv1.OpenSequenceRequest{Spec: testSpec(), Profile: balanced})
	m.feed(t, s, 0, 700)
	want := func(what string, n int, p kvtierv1.Profile, sparse bool, length uint64) {
		t.Helper()
		if got, _ := match(t, srv, m, n, p, sparse); got != length {
			t.Errorf("%s: %d tokens match, want %d", what, got, length)
		}
	}
	always := func(when string) {
		t.Helper()
		want(when+": all", 700, balanced, false, 640)
		want(when+": more", 1000, balanced, false, 640)
		want(when+": fewer", 130, balanced, false, 128)
		want(when+": too few", 63, balanced, false, 0)
		want(when+": another profile", 700, exact, false, 0)
		other := *m
		other.spec = testSpec()
		other.spec.Fingerprint = []byte("another")
		if got, _ := match(t, srv, &other, 700, balanced, true); got != 0 {
			t.Errorf("%s: another model's tokens match: %d", when, got)
		}
		other.spec, other.ids = m.spec, slices.Clone(m.ids)
		other.ids[200]++
		if got, _ := match(t, srv, &other, 700, balanced, true); got != 192 {
			t.Errorf("%s: with another token at 200, %d match, not 192", when, got)
		}
	}
	always("in the tail")
	flushSealed(t, s)
	always("sealed")
	closeServer(t, srv)
	srv = openServer(t, dir, Options{ReadAllTokens: -1})
	always("after a restart")

	// Tokens of sparse provenance: a match stops there, unless it may be sparse.
	s = find(t, srv, s.id)
	row := int(m.spec.KvHeads * m.spec.HeadDim)
	for l := range 2 {
		r := &appendRequest{layer: l, start: 700, k: bf16Bytes(m.k[l][700*row : 900*row]), v: bf16Bytes(m.v[l][700*row : 900*row]), sparse: true}
		if l == 0 {
			r.ids = m.ids[700:900]
		}
		if err := s.append(t.Context(), r); err != nil {
			t.Fatal(err)
		}
	}
	provenance := func(when string) {
		t.Helper()
		want(when+": exact", 1000, balanced, false, 640)
		want(when+": sparse", 1000, balanced, true, 896)
	}
	provenance("appended")
	flushSealed(t, s)
	provenance("sealed")
	closeServer(t, srv)
	srv = openServer(t, dir, Options{ReadAllTokens: -1})
	provenance("after a restart")

	// A truncation forgets, and what follows is exact again.
	s = find(t, srv, s.id)
	if err := s.truncate(t.Context(), 300); err != nil {
		t.Fatal(err)
	}
	want("truncated", 1000, balanced, true, 256)
	m.feed(t, s, 300, 1000)
	want("appended again", 1000, balanced, false, 960)
	if err := s.delete(t.Context()); err != nil {
		t.Fatal(err)
	}
	want("deleted", 1000, balanced, true, 0)
}

// A sequence with a longer exact part does not hide a longer match that is sparse.
func TestMatchPrefixFollowsEveryChain(t *testing.T) {
	t.Parallel()
	srv := openServer(t, t.TempDir(), Options{})
	m := newModel(1, testSpec(), 640)
	row := int(m.spec.KvHeads * m.spec.HeadDim)
	appendTo := func(s *sequence, lo, hi int, sparse bool) {
		for l := range 2 {
			if err := s.append(t.Context(), &appendRequest{layer: l, start: uint64(lo), k: bf16Bytes(m.k[l][lo*row : hi*row]), v: bf16Bytes(m.v[l][lo*row : hi*row]), ids: m.ids[lo:hi], sparse: sparse}); err != nil {
				t.Fatal(err)
			}
		}
	}
	exact := openSequence(t, srv, &kvtierv1.OpenSequenceRequest{Spec: testSpec()})
	appendTo(exact, 0, 320, false)
	long := openSequence(t, srv, &kvtierv1.OpenSequenceRequest{Spec: testSpec()})
	appendTo(long, 0, 128, false)
	appendTo(long, 128, 640, true)
	if n, s := match(t, srv, m, 640, 0, true); n != 640 || s != long {
		t.Errorf("%d tokens match, want 640", n)
	}
	if n, s := match(t, srv, m, 640, 0, false); n != 320 || s != exact {
		t.Errorf("%d exact tokens match, want 320", n)
	}
}

// A match of a sliding-window model is a point from which every layer can go on.
func TestMatchPrefixSliding(t *testing.T) {
	t.Parallel()
	srv := openServer(t, t.TempDir(), Options{ReadAllTokens: -1})
	m := newModel(1, slidingSpec(), segment+700)
	s := openSequence(t, srv, &kvtierv1.OpenSequenceRequest{Spec: slidingSpec()})
	m.feed(t, s, 0, segment+600)
	waitSealed(t, s, segment)
	for _, c := range []struct{ ids, want int }{{segment + 700, (segment + 600) / 64 * 64}, {segment, segment}, {segment - 1, 0}, {segment + 63, segment}} {
		got, from := match(t, srv, m, c.ids, 0, false)
		if got != uint64(c.want) {
			t.Errorf("of %d ids %d match, want %d", c.ids, got, c.want)
		}
		if got > 0 {
			f := openSequence(t, srv, &kvtierv1.OpenSequenceRequest{ForkOf: from.id, ForkAt: got})
			m.feed(t, f, int(got), int(got)+10)
			m.check(t, f, int(got)+9, exactBudget, .1)
		}
	}
}

// Spans that are sealed twice under one name are stored once, in the bytes
// that were committed first.
func TestSpansAreShared(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	srv := openServer(t, dir, Options{ReadAllTokens: -1})
	m := newModel(1, testSpec(), 1000)
	used := func() int64 { _, nvme := srv.store.Usage(); return nvme.BytesUsed }
	a := openSequence(t, srv, &kvtierv1.OpenSequenceRequest{Spec: testSpec()})
	m.feed(t, a, 0, 1000)
	flushSealed(t, a)
	once := used()
	b := openSequence(t, srv, &kvtierv1.OpenSequenceRequest{Spec: testSpec()})
	m.feed(t, b, 0, 1000)
	flushSealed(t, b)
	if used() != once {
		t.Errorf("%d bytes, with the second copy %d", once, used())
	}
	references := func(s *sequence) uint32 {
		x := &inspectionService{srv: srv}
		d, err := x.DescribeSequence(t.Context(), &kvtierv1.DescribeSequenceRequest{SequenceId: s.id})
		if err != nil {
			t.Fatal(err)
		}
		return d.Sealed[0].References
	}
	if n := references(a); n != 2 {
		t.Errorf("%d references, want 2", n)
	}
	m.check(t, b, 999, exactBudget, .1)
	closeServer(t, srv)
	srv = openServer(t, dir, Options{ReadAllTokens: -1})
	a, b = find(t, srv, a.id), find(t, srv, b.id)
	if n := references(b); n != 2 {
		t.Errorf("%d references after a restart, want 2", n)
	}
	if err := a.delete(t.Context()); err != nil {
		t.Fatal(err)
	}
	if n := references(b); n != 1 || used() != once {
		t.Errorf("%d references, %d bytes, after one was deleted", n, used())
	}
	m.check(t, b, 999, exactBudget, .1)
	if err := b.delete(t.Context()); err != nil {
		t.Fatal(err)
	}
	// A promotion to RAM may hold on to a segment for a moment.
	eventually(t, "no bytes after both were deleted", func() bool { return used() == 0 })
}

func TestTruncate(t *testing.T) {
	t.Parallel()
	for _, spec := range []*kvtierv1.ModelSpec{testSpec(), slidingSpec()} {
		for _, at := range []int{segment + 650, segment + 100, segment, 1000, 0} {
			t.Run(fmt.Sprintf("%d layers to %d", spec.Layers, at), func(t *testing.T) {
				dir := t.TempDir()
				o := Options{RAMBytes: 1 << 20, ReadAllTokens: -1}
				srv := openServer(t, dir, o)
				m, other := newModel(1, spec, segment+700), newModel(2, spec, segment+700)
				s := openSequence(t, srv, &kvtierv1.OpenSequenceRequest{Spec: spec, Profile: kvtierv1.Profile_PROFILE_EXACT})
				m.feed(t, s, 0, segment+700)
				waitSealed(t, s, segment)
				err := s.truncate(t.Context(), uint64(at))
				if spec.Layers == 3 && at == 1000 {
					wantCode(t, err, codes.FailedPrecondition, ReasonForkPoint)
					m.check(t, s, segment+699, exactBudget, 1e-5) // nothing changed
					return
				}
				if err != nil {
					t.Fatal(err)
				}
				if a := s.ack(); a.Accepted != uint64(at) || a.CrashSafe != uint64(at) || a.PowerSafe > a.Accepted || a.Sealed > a.Accepted {
					t.Fatalf("truncated to %d: %v", at, a)
				}
				g := m.grafted(other, at)
				end := min(at+600, segment+700)
				g.feed(t, s, at, end)
				g.check(t, s, end-1, exactBudget, 1e-5)
				closeServer(t, srv)
				srv = openServer(t, dir, o)
				s = find(t, srv, s.id)
				g.check(t, s, end-1, exactBudget, 1e-5)
				flushSealed(t, s)
				g.check(t, s, end-1, exactBudget, 1e-5)
				wantCode(t, s.truncate(t.Context(), uint64(end)+1), codes.OutOfRange, ReasonPastEnd)
			})
		}
	}
}

// A segment is sealed while the sequence is truncated and goes on differently:
// what was sealed of the old tokens must not come back.
func TestSealingIsStaleAfterTruncation(t *testing.T) {
	t.Parallel()
	srv := openServer(t, t.TempDir(), Options{ReadAllTokens: -1})
	const n = 700
	m, o := newModel(1, testSpec(), n), newModel(2, testSpec(), n)
	s := openSequence(t, srv, &kvtierv1.OpenSequenceRequest{Spec: testSpec(), Profile: kvtierv1.Profile_PROFILE_EXACT})
	m.feed(t, s, 0, n)
	st := s.snapshot()
	if err := s.truncate(t.Context(), 200); err != nil {
		t.Fatal(err)
	}
	g := m.grafted(o, 200)
	g.feed(t, s, 200, n)
	if err := srv.sealer.trySeal(t.Context(), s, &st, 384); !errors.Is(err, errStale) {
		t.Errorf("sealing of truncated tokens: %v, want %v", err, errStale)
	}
	g.check(t, s, n-1, exactBudget, 1e-5)
	g.check(t, s, 380, exactBudget, 1e-5)
}

func TestAppendIsIdempotent(t *testing.T) {
	t.Parallel()
	srv := openServer(t, t.TempDir(), Options{ReadAllTokens: -1})
	m, o := newModel(1, testSpec(), 700), newModel(2, testSpec(), 700)
	s := openSequence(t, srv, &kvtierv1.OpenSequenceRequest{Spec: testSpec(), Profile: kvtierv1.Profile_PROFILE_EXACT})
	m.feed(t, s, 0, 100)
	m.feed(t, s, 0, 100)
	m.feed(t, s, 50, 150) // in part
	row := int(m.spec.KvHeads * m.spec.HeadDim)
	req := func(m *model, lo, hi int) *appendRequest {
		return &appendRequest{layer: 0, start: uint64(lo), k: bf16Bytes(m.k[0][lo*row : hi*row]), v: bf16Bytes(m.v[0][lo*row : hi*row])}
	}
	keysOf := func(st state) []byte {
		k, _ := st.rows[0].slice(s.spec, 0, st.lens[0])
		return k
	}
	before := s.snapshot()
	wantCode(t, s.append(t.Context(), req(o, 100, 160)), codes.AlreadyExists, ReasonExists)
	wantCode(t, s.append(t.Context(), req(m, 151, 160)), codes.OutOfRange, ReasonGap)
	after := s.snapshot()
	if !slices.Equal(before.lens, after.lens) || !bytes.Equal(keysOf(before), keysOf(after)) {
		t.Error("what was refused changed something")
	}
	m.feed(t, s, 150, 700)
	flushSealed(t, s)
	wantCode(t, s.append(t.Context(), req(m, 10, 20)), codes.AlreadyExists, ReasonSealed)
	m.check(t, s, 699, exactBudget, 1e-5)
}

// One trace under much RAM, under hardly any, and with a restart in the
// middle: bit-identical answers. Tiers change latency, never values.
func TestMetamorphic(t *testing.T) {
	t.Parallel()
	for _, p := range []kvtierv1.Profile{kvtierv1.Profile_PROFILE_EXACT, kvtierv1.Profile_PROFILE_NEUTRAL, kvtierv1.Profile_PROFILE_BALANCED} {
		t.Run(p.String(), func(t *testing.T) {
			t.Parallel()
			want := trace(t, p, Options{RAMBytes: 64 << 20, ReadAllTokens: -1}, false)
			for name, got := range map[string][]byte{
				"tiny RAM":        trace(t, p, Options{RAMBytes: 64 << 10, ReadAllTokens: -1}, false),
				"restarts":        trace(t, p, Options{RAMBytes: 64 << 20, ReadAllTokens: -1}, true),
				"tiny RAM, twice": trace(t, p, Options{RAMBytes: 64 << 10, ReadAllTokens: -1}, true),
			} {
				if !bytes.Equal(got, want) {
					t.Errorf("%s changes answers", name)
				}
			}
		})
	}
}

// trace runs one script and returns all its answers. Where it restarts, all
// that queries taught is in sealed segments already.
func trace(t *testing.T, p kvtierv1.Profile, o Options, restart bool) (answers []byte) {
	dir := t.TempDir()
	m := newModel(4, slidingSpec(), segment+1200)
	srv := openServer(t, dir, o)
	s := openSequence(t, srv, &kvtierv1.OpenSequenceRequest{Spec: m.spec, Profile: p})
	ask := func(s *sequence, pos int) {
		for l := range int(m.spec.Layers) {
			for _, b := range []budget{exactBudget, shareBudget(.3), {mode: kvtierv1.AttendMode_ATTEND_MODE_TARGET, target: .2}} {
				a := m.ask(t, s, l, pos, b)
				buf := make([]byte, 4*(len(a.out)+len(a.lse)))
				compress.FromFloat32(buf, append(slices.Clone(a.out), a.lse...), compress.F32)
				answers = append(answers, buf...)
			}
		}
	}
	again := func(ss ...**sequence) {
		if !restart {
			return
		}
		closeServer(t, srv)
		srv = openServer(t, dir, o)
		for _, s := range ss {
			*s = find(t, srv, (*s).id)
		}
	}
	m.feed(t, s, 0, segment+700)
	waitSealed(t, s, segment)
	again(&s)
	ask(s, segment+699)
	ask(s, segment+300)
	m.feed(t, s, segment+700, segment+900)
	ask(s, segment+899)
	f := openSequence(t, srv, &kvtierv1.OpenSequenceRequest{ForkOf: s.id, ForkAt: segment})
	again(&s, &f)
	m.feed(t, f, segment, segment+50)
	ask(f, segment+49)
	for range 30 { // what is asked often comes up into RAM
		ask(s, segment+899)
	}
	if err := s.truncate(context.Background(), segment+10); err != nil {
		t.Fatal(err)
	}
	again(&s, &f)
	ask(s, segment+9)
	ask(f, segment+49)
	return answers
}
