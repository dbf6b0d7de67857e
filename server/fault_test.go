package server

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"

	kvtierv1 "kvtier/proto/kvtier/v1"
	"kvtier/tiers"
)

const (
	balanced = kvtierv1.Profile_PROFILE_BALANCED
	exact    = kvtierv1.Profile_PROFILE_EXACT
)

// tryFeed appends tokens [lo, hi) and returns the first error.
func (m *model) tryFeed(s *sequence, lo, hi int) error {
	row := int(m.spec.KvHeads * m.spec.HeadDim)
	for l := range int(m.spec.Layers) {
		r := &appendRequest{layer: l, start: uint64(lo), k: bf16Bytes(m.k[l][lo*row : hi*row]), v: bf16Bytes(m.v[l][lo*row : hi*row])}
		if l == 0 {
			r.ids = m.ids[lo:hi]
		}
		if err := s.append(context.Background(), r); err != nil {
			return err
		}
	}
	return nil
}

// eventually waits for a condition.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for range 1000 {
		if ok() {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	t.Fatal("not in time: " + what)
}

// The disk's limit is reached by sequences that are in use: appends are put
// off, nothing is lost, and after a deletion they go on.
func TestDiskFull(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	o := Options{DiskBytes: 600 << 10, TailBytes: 3 << 20, ReadAllTokens: -1}
	srv := openServer(t, dir, o)
	m := newModel(1, testSpec(), 9000)
	a := openSequence(t, srv, &kvtierv1.OpenSequenceRequest{Spec: testSpec()})
	hold(t, a)
	m.feed(t, a, 0, segment+recentTokens)
	waitSealed(t, a, segment)
	b := openSequence(t, srv, &kvtierv1.OpenSequenceRequest{Spec: testSpec(), Profile: exact})
	hold(t, b)
	at := 0
	var err error
	for err == nil && at+250 <= m.n {
		if err = m.tryFeed(b, at, at+250); err == nil {
			at += 250
		}
	}
	if c, _ := code(err); c != codes.ResourceExhausted {
		t.Fatal(err)
	}
	eventually(t, "sealing fails", func() bool { return errors.Is(srv.sealer.lastFailure(), tiers.ErrFull) })
	err = m.tryFeed(b, at, at+250)
	wantCode(t, err, codes.ResourceExhausted, ReasonDiskFull)
	retry := false
	for _, d := range toError(err).GRPCStatus().Details() {
		if r, ok := d.(*errdetails.RetryInfo); ok {
			retry = r.RetryDelay.AsDuration() > 0
		}
	}
	if !retry || !strings.Contains(toError(err).Message, "disk") {
		t.Errorf("no delay to retry after, or no cause: %v", toError(err))
	}
	m.check(t, a, segment+recentTokens-1, exactBudget, .1)
	m.check(t, b, at-1, exactBudget, 1e-5)
	wantCode(t, b.flush(t.Context(), true), codes.ResourceExhausted, ReasonDiskFull)

	closeServer(t, srv)
	srv = openServer(t, dir, o)
	a, b = find(t, srv, a.id), find(t, srv, b.id)
	hold(t, a)
	hold(t, b)
	if n := b.ack().Accepted; n != uint64(at) {
		t.Fatalf("%d tokens after a restart, there were %d", n, at)
	}
	m.check(t, b, at-1, exactBudget, 1e-5)
	if err := a.delete(t.Context()); err != nil {
		t.Fatal(err)
	}
	closeServer(t, srv)
	o.DiskBytes = 8 << 20
	srv = openServer(t, dir, o)
	b = find(t, srv, b.id)
	eventually(t, "appends go on", func() bool { return m.tryFeed(b, at, at+250) == nil })
	m.check(t, b, at+249, exactBudget, 1e-5)
}

// Of a large model appends wait while two segments are to be sealed, and go on when they are.
func TestBacklog(t *testing.T) {
	t.Parallel()
	srv := openServer(t, t.TempDir(), Options{ReadAllTokens: -1})
	srv.largeTail = 1
	m := newModel(7, testSpec(), 9000)
	s := openSequence(t, srv, &kvtierv1.OpenSequenceRequest{Spec: testSpec()})
	hold(t, s)
	srv.sealer.one.Lock()
	at := 0
	var err error
	for err == nil && at+500 <= m.n {
		if err = m.tryFeed(s, at, at+500); err == nil {
			at += 500
		}
	}
	srv.sealer.one.Unlock()
	wantCode(t, err, codes.ResourceExhausted, ReasonTailFull)
	if least := mostWaiting*segment + recentTokens; at < least || at >= least+500 {
		t.Errorf("%d tokens were taken before", at)
	}
	m.check(t, s, at-1, exactBudget, .1)
	eventually(t, "appends go on", func() bool { return m.tryFeed(s, at, at+500) == nil })
	m.check(t, s, at+499, exactBudget, .1)
}

// Sequences that nobody holds make way, the one used longest ago first.
func TestEviction(t *testing.T) {
	t.Parallel()
	srv := openServer(t, t.TempDir(), Options{DiskBytes: 900 << 10, ReadAllTokens: -1})
	var models []*model
	var all []*sequence
	for i := range 3 {
		m := newModel(uint64(i), testSpec(), segment+recentTokens)
		s := openSequence(t, srv, &kvtierv1.OpenSequenceRequest{Spec: testSpec()})
		models, all = append(models, m), append(all, s)
		release := hold(t, s)
		if i == 2 {
			models[0].check(t, all[0], 10, exactBudget, .1) // used again, before there is anything to seal
		}
		m.feed(t, s, 0, m.n)
		waitSealed(t, s, segment)
		release()
		eventually(t, "the sealer rests", func() bool { return srv.sealer.pending() == 0 })
	}
	if _, err := srv.sequence(all[1].id); err == nil {
		t.Error("the sequence used longest ago is still there")
	}
	for _, i := range []int{0, 2} {
		models[i].check(t, find(t, srv, all[i].id), segment+recentTokens-1, exactBudget, .1)
	}
}

// Who comes to use a sequence before it is evicted keeps it, and who comes later is told that it is gone: never is a use counted of a sequence that goes.
func TestEvictionOrUse(t *testing.T) {
	t.Parallel()
	srv := openServer(t, t.TempDir(), Options{ReadAllTokens: -1})
	lease := srv.leases.create(0, "test")
	m := newModel(1, testSpec(), segment+recentTokens)
	root := m.stored(t, srv, balanced)
	eventually(t, "the sealer rests", func() bool { return srv.sealer.pending() == 0 })
	uses := map[string]func(s *sequence) error{
		"hold": func(s *sequence) error { _, err := s.hold(); return err },
		"open": func(s *sequence) error {
			_, _, err := srv.open(t.Context(), &kvtierv1.OpenSequenceRequest{SequenceId: s.id})
			return err
		},
		"pin": func(s *sequence) error { _, _, err := srv.pin(s, lease, 0, 0); return err },
	}
	kept, evicted := 0, 0
	for i := range 60 {
		for what, use := range uses {
			s, release, err := srv.open(t.Context(), &kvtierv1.OpenSequenceRequest{ForkOf: root.id})
			if err != nil {
				t.Fatal(err)
			}
			if err := s.evict(t.Context()); !errors.Is(err, errInUse) {
				t.Fatalf("a new fork that its maker holds was evicted: %v", err)
			}
			release()
			if i%3 == 0 { // both at once, and else one after the other
				done := make(chan error)
				go func() { done <- s.evict(t.Context()) }()
				err = use(s)
				if gone := <-done; (gone == nil) == (err == nil) {
					t.Fatalf("%s: %v, evict: %v", what, err, gone)
				}
			} else if i%3 == 1 {
				err = use(s)
				if gone := s.evict(t.Context()); err != nil || !errors.Is(gone, errInUse) {
					t.Fatalf("%s: %v, evicted then: %v", what, err, gone)
				}
			} else {
				gone := s.evict(t.Context())
				if err = use(s); gone != nil || err == nil {
					t.Fatalf("evict: %v, %s then: %v", gone, what, err)
				}
			}
			if err != nil {
				evicted++
				wantCode(t, err, codes.NotFound, ReasonUnknown)
				continue
			}
			kept++
			if _, err := srv.sequence(s.id); err != nil {
				t.Fatal(err)
			}
		}
	}
	if kept < 60 || evicted < 60 {
		t.Errorf("%d were kept, %d evicted", kept, evicted)
	}
	m.check(t, root, m.n-1, exactBudget, .1)
}

// A pin that its lease ends while it is made leaves nothing behind.
func TestPinEndsWithItsLease(t *testing.T) {
	t.Parallel()
	srv := openServer(t, t.TempDir(), Options{ReadAllTokens: -1})
	m := newModel(1, testSpec(), segment+recentTokens)
	s := m.stored(t, srv, balanced)
	ended := 0
	for range 200 {
		lease := srv.leases.create(0, "test")
		done := make(chan error)
		go func() { done <- srv.leases.revoke(lease) }()
		if _, _, err := srv.pin(s, lease, 0, 0); err != nil {
			wantCode(t, err, codes.NotFound, ReasonUnknown)
			ended++
		}
		if err := <-done; err != nil {
			t.Fatal(err)
		}
	}
	srv.pins.Lock()
	defer srv.pins.Unlock()
	s.mu.RLock()
	defer s.mu.RUnlock()
	if len(srv.pins.pins) > 0 || len(srv.pins.segments) > 0 || s.mu.pins != 0 {
		t.Errorf("%d pins of %d segments are left, %d of the sequence; %d had ended before they began", len(srv.pins.pins), len(srv.pins.segments), s.mu.pins, ended)
	}
}

// folder makes a closed data folder with one sequence: sealed spans and a tail.
func folder(t *testing.T) (dir, id string, m *model) {
	t.Helper()
	dir = t.TempDir()
	srv := openServer(t, dir, Options{ReadAllTokens: -1})
	m = newModel(1, testSpec(), 800)
	s := openSequence(t, srv, &kvtierv1.OpenSequenceRequest{Spec: testSpec(), Profile: exact})
	m.feed(t, s, 0, 700)
	flushSealed(t, s)
	m.feed(t, s, 700, 710)
	closeServer(t, srv)
	return dir, s.id, m
}

func glob(t *testing.T, dir, pattern string) string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, pattern))
	if err != nil || len(files) == 0 {
		t.Fatalf("no %s: %v", pattern, err)
	}
	return files[len(files)-1]
}

// Folders that are refused, and what is said then.
func TestRefusedFolders(t *testing.T) {
	t.Parallel()
	crc := func(s string) string {
		return fmt.Sprintf("%s, crc32c %08x\n", s, crc32.Checksum([]byte(s), crc32.MakeTable(crc32.Castagnoli)))
	}
	for _, c := range []struct {
		name  string
		spoil func(dir string) error
		is    error
		want  string
	}{
		{"newer version", func(dir string) error {
			return os.WriteFile(filepath.Join(dir, "FORMAT"), []byte(crc("kvtier data folder, format 9")), 0o600)
		}, tiers.ErrVersion, "use the kvtierd that wrote it"},
		{"FORMAT damaged", func(dir string) error {
			return os.WriteFile(filepath.Join(dir, "FORMAT"), []byte("kvtier data folder, format 1, crc32c 00000000\n"), 0o600)
		}, tiers.ErrCorrupt, "restore it"},
		{"FORMAT missing", func(dir string) error { return os.Remove(filepath.Join(dir, "FORMAT")) }, tiers.ErrCorrupt, "restore that file"},
		{"tenant.key half-written", func(dir string) error { return os.Truncate(filepath.Join(dir, "tenant.key"), 7) }, tiers.ErrCorrupt, "restore it, or remove it"},
		{"catalogue gone", func(dir string) error { return os.RemoveAll(filepath.Join(dir, "catalogue")) }, tiers.ErrCorrupt, "restore the data folder"},
		{"catalogue half gone", func(dir string) error { return os.Truncate(glob(t, dir, "catalogue/*.log"), 0) }, tiers.ErrCorrupt, "restore the data folder"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			dir, _, _ := folder(t)
			if err := c.spoil(dir); err != nil {
				t.Fatal(err)
			}
			for range 2 { // the refusal changes nothing
				srv, err := Open(t.Context(), Options{DataDir: dir})
				if err == nil {
					closeServer(t, srv)
					t.Fatal("it was opened")
				}
				if !errors.Is(err, c.is) || !strings.Contains(err.Error(), c.want) {
					t.Errorf("%v; want %v and %q", err, c.is, c.want)
				}
			}
		})
	}
}

func TestTwoServersOnOneFolder(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	srv := openServer(t, dir, Options{})
	if _, err := Open(t.Context(), Options{DataDir: dir}); err == nil || !strings.Contains(err.Error(), "another daemon") {
		t.Errorf("the second server: %v", err)
	}
	m := newModel(1, testSpec(), 10)
	s := openSequence(t, srv, &kvtierv1.OpenSequenceRequest{Spec: testSpec()})
	m.feed(t, s, 0, 10)
	m.check(t, s, 9, exactBudget, 1e-5)
}

// Damage that concerns a part: the rest is served, and the part can be
// appended again.
func TestDamagedFolders(t *testing.T) {
	t.Parallel()
	overwrite := func(path string) error {
		st, err := os.Stat(path)
		if err != nil {
			return err
		}
		return os.WriteFile(path, bytes.Repeat([]byte{0x5a}, int(st.Size())), 0o600)
	}
	for _, c := range []struct {
		name   string
		spoil  func(dir string) error
		tokens uint64 // that are there then
		sealed bool   // whether those sealed can be asked
	}{
		{"extent missing", func(dir string) error { return os.Remove(glob(t, dir, "segments/*")) }, 710, false},
		{"extent cut", func(dir string) error { return os.Truncate(glob(t, dir, "segments/*"), 4096) }, 710, false},
		{"extent overwritten", func(dir string) error { return overwrite(glob(t, dir, "segments/*")) }, 710, false},
		{"log missing", func(dir string) error { return os.Remove(glob(t, dir, "tails/*")) }, 384, true},
		{"log empty", func(dir string) error { return os.Truncate(glob(t, dir, "tails/*"), 0) }, 384, true},
		{"log half-written", func(dir string) error {
			path := glob(t, dir, "tails/*")
			st, err := os.Stat(path)
			return errors.Join(err, os.Truncate(path, st.Size()-5))
		}, 700, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			dir, id, m := folder(t)
			if err := c.spoil(dir); err != nil {
				t.Fatal(err)
			}
			srv := openServer(t, dir, Options{DiskBytes: 64 << 20, ReadAllTokens: -1})
			s := find(t, srv, id)
			if n := s.ack().Accepted; n != c.tokens {
				t.Fatalf("%d tokens, want %d", n, c.tokens)
			}
			if c.sealed {
				m.check(t, s, int(c.tokens)-1, exactBudget, 1e-5)
				m.feed(t, s, int(c.tokens), 800)
				m.check(t, s, 799, exactBudget, 1e-5)
				return
			}
			_, err := s.attend(t.Context(), &query{layer: 0, start: 709, q: floatBytes(m.q[0][709*128 : 710*128]), budget: exactBudget})
			wantCode(t, err, codes.DataLoss, ReasonCorrupt)
			if !strings.Contains(err.Error()+toError(err).Message, "kvtier verify") {
				t.Errorf("it does not say what to do: %v", toError(err))
			}
			if _, _, _, err := s.readKV(t.Context(), 0, 390, 300); err != nil {
				t.Errorf("the tail cannot be read: %v", err)
			}
			info := (&inspectionService{srv: srv}).info(s)
			if info.Damage == "" {
				t.Error("no damage is shown")
			}
			if n, _ := match(t, srv, m, 700, exact, true); n != 0 {
				t.Errorf("%d damaged tokens match", n)
			}
			// The same tokens again, before the damaged ones are deleted: they would be
			// the same segments, so they stay in the tail until then.
			again := openSequence(t, srv, &kvtierv1.OpenSequenceRequest{Spec: testSpec(), Profile: exact})
			m.feed(t, again, 0, 700)
			wantCode(t, again.flush(t.Context(), true), codes.DataLoss, ReasonCorrupt)
			m.check(t, again, 699, exactBudget, 1e-5)
			if err := s.delete(t.Context()); err != nil {
				t.Fatal(err)
			}
			flushSealed(t, again)
			m.check(t, again, 699, exactBudget, 1e-5)
			closeServer(t, srv)
			srv = openServer(t, dir, Options{DiskBytes: 64 << 20, ReadAllTokens: -1})
			m.check(t, find(t, srv, again.id), 699, exactBudget, 1e-5)
		})
	}
}

// What is refused changes nothing.
func TestBadInput(t *testing.T) {
	t.Parallel()
	srv := openServer(t, t.TempDir(), Options{})
	m := newModel(1, testSpec(), 20)
	s := openSequence(t, srv, &kvtierv1.OpenSequenceRequest{Spec: testSpec()})
	m.feed(t, s, 0, 10)
	row := bf16Bytes(m.k[0][:64])
	with := func(x float32) []byte {
		f := append([]float32(nil), m.k[0][:64]...)
		f[63] = x
		return bf16Bytes(f)
	}
	nan, inf := float32(math.NaN()), float32(math.Inf(1))
	q := floatBytes(m.q[0][9*128 : 10*128])
	for name, c := range map[string]struct {
		err    error
		code   codes.Code
		reason string
	}{
		"NaN in k":         {s.append(t.Context(), &appendRequest{start: 10, k: with(nan), v: row}), codes.InvalidArgument, ReasonValue},
		"infinity in v":    {s.append(t.Context(), &appendRequest{start: 10, k: row, v: with(inf)}), codes.InvalidArgument, ReasonValue},
		"overflowing k":    {s.append(t.Context(), &appendRequest{start: 10, k: with(-0x1p57), v: row}), codes.InvalidArgument, ReasonValue},
		"half a row":       {s.append(t.Context(), &appendRequest{start: 10, k: row[:64], v: row[:64]}), codes.InvalidArgument, ReasonShape},
		"k without v":      {s.append(t.Context(), &appendRequest{start: 10, k: row}), codes.InvalidArgument, ReasonShape},
		"no such layer":    {s.append(t.Context(), &appendRequest{layer: 2, start: 10, k: row, v: row}), codes.InvalidArgument, ReasonShape},
		"negative layer":   {s.append(t.Context(), &appendRequest{layer: -1, start: 10, k: row, v: row}), codes.InvalidArgument, ReasonShape},
		"gap":              {s.append(t.Context(), &appendRequest{start: 11, k: row, v: row}), codes.OutOfRange, ReasonGap},
		"far away":         {s.append(t.Context(), &appendRequest{start: 1 << 62, k: row, v: row}), codes.InvalidArgument, ReasonArgument},
		"ids for others":   {s.append(t.Context(), &appendRequest{start: 10, k: row, v: row, ids: []uint64{1, 2}}), codes.InvalidArgument, ReasonShape},
		"dtype":            {s.append(t.Context(), &appendRequest{start: 10, k: row, v: row, typ: 77}), codes.InvalidArgument, ReasonShape},
		"long text":        {s.append(t.Context(), &appendRequest{start: 10, k: row, v: row, ids: []uint64{1}, texts: texts(1, maxTokenText+1)}), codes.InvalidArgument, ReasonArgument},
		"much text":        {s.append(t.Context(), &appendRequest{ids: make([]uint64, 5000), texts: texts(5000, maxTokenText)}), codes.InvalidArgument, ReasonArgument},
		"label past end":   {s.append(t.Context(), &appendRequest{start: 10, k: row, v: row, labels: []*kvtierv1.Span{{Start: 1, End: 99}}}), codes.InvalidArgument, ReasonArgument},
		"query past end":   {attendErr(s, &query{start: 10, q: q}), codes.OutOfRange, ReasonPastEnd},
		"query far away":   {attendErr(s, &query{start: 1 << 63, q: q}), codes.InvalidArgument, ReasonArgument},
		"half a query":     {attendErr(s, &query{start: 9, q: q[:100]}), codes.InvalidArgument, ReasonShape},
		"no query":         {attendErr(s, &query{start: 9}), codes.InvalidArgument, ReasonShape},
		"partial":          {attendErr(s, &query{start: 9, q: q, partial: &workerPartial{out: q}}), codes.InvalidArgument, ReasonShape},
		"NaN query":        {attendErr(s, &query{start: 9, q: floatBytes(append([]float32{nan}, m.q[0][1:128]...))}), codes.InvalidArgument, ReasonValue},
		"huge query":       {attendErr(s, &query{start: 9, q: floatBytes(append([]float32{0x1p100}, m.q[0][1:128]...)), append: &appendRequest{k: row, v: row}}), codes.InvalidArgument, ReasonValue},
		"truncate past":    {s.truncate(t.Context(), 11), codes.OutOfRange, ReasonPastEnd},
		"read past":        {readErr(s, 5, 6), codes.OutOfRange, ReasonPastEnd},
		"read overflowing": {readErr(s, math.MaxUint64, 2), codes.OutOfRange, ReasonPastEnd},
		"read too much":    {readErr(s, 0, math.MaxUint64), codes.OutOfRange, ReasonPastEnd},
	} {
		t.Run(name, func(t *testing.T) { wantCode(t, c.err, c.code, c.reason) })
	}
	for name, r := range map[string]*kvtierv1.OpenSequenceRequest{
		"another model":   {SequenceId: s.id, Spec: slidingSpec()},
		"another profile": {SequenceId: s.id, Profile: exact},
	} {
		t.Run(name, func(t *testing.T) {
			_, _, err := srv.open(t.Context(), r)
			wantCode(t, err, codes.FailedPrecondition, ReasonSpecDiffers)
		})
	}
	if a := s.ack(); a.Accepted != 10 {
		t.Errorf("after all that: %v", a)
	}
	m.feed(t, s, 10, 20)
	m.check(t, s, 19, exactBudget, 1e-5)
}

// texts returns texts of n tokens, of so many bytes each.
func texts(n, size int) (all [][]byte) {
	for i := range n {
		all = append(all, bytes.Repeat([]byte{byte(i), byte(i >> 8)}, size)[:size])
	}
	return all
}

func attendErr(s *sequence, q *query) error {
	q.budget = exactBudget
	_, err := s.attend(context.Background(), q)
	return err
}

func readErr(s *sequence, start, count uint64) error {
	_, _, _, err := s.readKV(context.Background(), 0, start, count)
	return err
}

// A worker that is gone gives back pins, and tokens that it did not finish.
func TestLeasesExpire(t *testing.T) {
	t.Parallel()
	srv := openServer(t, t.TempDir(), Options{ReadAllTokens: -1})
	m := newModel(1, testSpec(), 710)
	s := openSequence(t, srv, &kvtierv1.OpenSequenceRequest{Spec: testSpec()})
	m.feed(t, s, 0, 700)
	flushSealed(t, s)
	lease := srv.leases.create(100*time.Millisecond, "worker")
	if _, err := srv.leases.attach(lease, hold(t, s)); err != nil {
		t.Fatal(err)
	}
	id, _, err := srv.pin(s, lease, 0, 0)
	if err != nil {
		t.Fatal(err)
	}
	row := int(m.spec.KvHeads * m.spec.HeadDim)
	if err := s.append(t.Context(), &appendRequest{start: 700, k: bf16Bytes(m.k[0][700*row : 705*row]), v: bf16Bytes(m.v[0][700*row : 705*row])}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the lease ends", func() bool { return srv.leases.count() == 0 })
	eventually(t, "what it held is released", func() bool {
		st := s.snapshot()
		s.mu.RLock()
		defer s.mu.RUnlock()
		return s.mu.holders == 0 && s.mu.pins == 0 && st.lens[0] == 700
	})
	wantCode(t, srv.unpin(id), codes.NotFound, ReasonUnknown)
	_, err = srv.leases.renew(lease)
	wantCode(t, err, codes.NotFound, ReasonUnknown)
	m.feed(t, s, 700, 710)
	m.check(t, s, 709, exactBudget, .1)
}

// Not parallel: it looks at all goroutines.
func TestCloseLeavesNothing(t *testing.T) {
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	dir := t.TempDir()
	for range 2 {
		srv, err := Open(context.Background(), Options{DataDir: dir, ReadAllTokens: -1, AuditShare: 1, RAMBytes: 1 << 20})
		if err != nil {
			t.Fatal(err)
		}
		m := newModel(1, testSpec(), segment+recentTokens)
		s := openSequence(t, srv, &kvtierv1.OpenSequenceRequest{Spec: testSpec()})
		m.feed(t, s, 0, m.n) // being sealed when the server closes
		m.ask(t, s, 0, m.n-1, shareBudget(.2))
		closeServer(t, srv)
		closeServer(t, srv) // again
	}
}

// A server that closes under load answers every call, or refuses it clearly,
// and loses nothing that it acknowledged.
func TestCloseDuringLoad(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	srv := openServer(t, dir, Options{ReadAllTokens: -1})
	m := newModel(1, testSpec(), 6000)
	x := &sequenceService{srv: srv}
	var wg sync.WaitGroup
	acked := make([]uint64, 3)
	ids := make([]string, 3)
	for i := range acked {
		s := openSequence(t, srv, &kvtierv1.OpenSequenceRequest{Spec: testSpec(), Profile: exact})
		ids[i] = s.id
		wg.Go(func() {
			row := int(m.spec.KvHeads * m.spec.HeadDim)
			for at := 0; at+50 <= m.n; at += 50 {
				for l := range 2 {
					r, err := x.Append(context.Background(), &kvtierv1.AppendRequest{SequenceId: s.id, Layer: uint32(l), Start: uint64(at),
						K: bf16Bytes(m.k[l][at*row : (at+50)*row]), V: bf16Bytes(m.v[l][at*row : (at+50)*row])})
					if err != nil {
						if c, _ := code(err); c != codes.Unavailable {
							t.Errorf("append while closing: %v", err)
						}
						return
					}
					acked[i] = r.Ack.CrashSafe
				}
				for _, err := range []error{
					discard(x.Flush(context.Background(), &kvtierv1.FlushRequest{SequenceId: s.id, Seal: true})),
					discard(x.OpenSequence(context.Background(), &kvtierv1.OpenSequenceRequest{ForkOf: s.id})),
				} {
					if c, _ := code(err); c != codes.OK && c != codes.Unavailable {
						t.Errorf("a call while closing: %v", err)
					}
				}
			}
		})
	}
	time.Sleep(150 * time.Millisecond)
	closeServer(t, srv)
	wg.Wait()
	srv = openServer(t, dir, Options{ReadAllTokens: -1})
	for i, id := range ids {
		s := find(t, srv, id)
		if n := s.ack().Accepted; n < acked[i] {
			t.Errorf("%d tokens, acknowledged were %d", n, acked[i])
		} else if n > 0 {
			m.check(t, s, int(n)-1, exactBudget, 1e-5)
		}
	}
}

func discard[T any](_ T, err error) error { return err }

func TestAudit(t *testing.T) {
	t.Parallel()
	srv := openServer(t, t.TempDir(), Options{ReadAllTokens: -1, AuditShare: 1})
	m := newModel(1, testSpec(), segment+recentTokens)
	s := openSequence(t, srv, &kvtierv1.OpenSequenceRequest{Spec: testSpec()})
	m.feed(t, s, 0, m.n)
	waitSealed(t, s, segment)
	for range 5 {
		m.ask(t, s, 0, m.n-1, shareBudget(.1))
	}
	eventually(t, "audits", func() bool { return srv.auditor.stats().n > 0 })
	if s := srv.auditor.stats(); !(s.mean > 0 && s.mean < .5 && s.p95 >= s.mean/2 && s.p95 < 1) {
		t.Errorf("%d audits: mean error %v, p95 %v", s.n, s.mean, s.p95)
	}
	all, err := srv.Metrics().Gather()
	if err != nil {
		t.Fatal(err)
	}
	seen := uint64(0)
	for _, f := range all {
		if strings.Contains(f.GetName(), "audit") {
			for _, x := range f.GetMetric() {
				seen += x.GetHistogram().GetSampleCount() + x.GetSummary().GetSampleCount()
			}
		}
	}
	if seen == 0 {
		t.Error("the metrics show no audit")
	}
}

// Appends, queries, forks, truncations, seals and deletions at once, on few
// sequences. Every answer is right for the tokens that were there.
func TestConcurrency(t *testing.T) {
	t.Parallel()
	const shared = 900
	srv := openServer(t, t.TempDir(), Options{RAMBytes: 256 << 10, ReadAllTokens: 1200, AuditShare: .2, SyncInterval: time.Millisecond})
	spec := testSpec()
	models := make([]*model, 3)
	base := newModel(1, spec, 3200)
	for i := range models {
		models[i] = base.grafted(newModel(uint64(i)+10, spec, 3200), shared)
	}
	root := openSequence(t, srv, &kvtierv1.OpenSequenceRequest{Spec: spec, Profile: exact})
	base.feed(t, root, 0, shared)
	stop := time.Now().Add(2 * time.Second)
	var wg sync.WaitGroup
	for i, m := range models {
		wg.Go(func() { live(t, srv, root, m, shared, uint64(i), stop) })
	}
	wg.Go(func() { // the root is sealed, asked and read meanwhile
		rng := rand.New(rand.NewPCG(9, 9))
		for time.Now().Before(stop) {
			if err := root.flush(context.Background(), rng.IntN(4) == 0); err != nil {
				t.Errorf("flush: %v", err)
			}
			if !right(t, base, root, rng.IntN(shared)) {
				return
			}
		}
	})
	wg.Wait()
}

// live forks the root again and again and works with the fork; another
// goroutine asks it at the same time.
func live(t *testing.T, srv *Server, root *sequence, m *model, shared int, seed uint64, stop time.Time) {
	rng := rand.New(rand.NewPCG(seed, 1))
	ctx := context.Background()
	for time.Now().Before(stop) {
		at := 1 + rng.IntN(shared)
		s, release, err := srv.open(ctx, &kvtierv1.OpenSequenceRequest{ForkOf: root.id, ForkAt: uint64(at)})
		if err != nil {
			t.Errorf("fork: %v", err)
			return
		}
		release()
		done := make(chan struct{})
		go func() { // positions before at never change
			defer close(done)
			for range 20 {
				if _, err := srv.sequence(s.id); err != nil || !right(t, m, s, at-1) {
					return
				}
			}
		}()
		for range 1 + rng.IntN(6) {
			next := min(at+1+rng.IntN(800), m.n)
			err := m.tryFeed(s, at, next)
			if err == nil && rng.IntN(2) == 0 {
				err = s.flush(ctx, true)
			}
			if err == nil && !right(t, m, s, next-1) {
				return
			}
			if err == nil && rng.IntN(3) == 0 {
				err = s.truncate(ctx, uint64(at))
				next = at
			}
			if err != nil {
				t.Errorf("worker %d: %v", seed, err)
				return
			}
			if next > at {
				if err := s.truncate(ctx, uint64(at)); err != nil {
					t.Errorf("truncate: %v", err)
					return
				}
			}
		}
		if err := s.delete(ctx); err != nil {
			t.Errorf("delete: %v", err)
			return
		}
		<-done
	}
}

// right asks a position exactly; the sequence may go meanwhile.
func right(t *testing.T, m *model, s *sequence, pos int) bool {
	row := int(m.spec.QueryHeads * m.spec.HeadDim)
	a, err := s.attend(context.Background(), &query{layer: pos % 2, start: uint64(pos), q: floatBytes(m.q[pos%2][pos*row : (pos+1)*row]), budget: exactBudget})
	if err != nil {
		if c, _ := code(err); c != codes.NotFound {
			t.Errorf("attend at %d: %v", pos, err)
		}
		return false
	}
	if e := m.worst(a.out, m.dense(pos%2, pos)); !(e <= 1e-5) {
		t.Errorf("position %d: error %v", pos, e)
		return false
	}
	return true
}
