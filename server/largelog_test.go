package server

import (
	"encoding/binary"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"google.golang.org/grpc/codes"

	kvtierv1 "kvtier/proto/kvtier/v1"
	"kvtier/tiers/files"
	"kvtier/tiers/store"
	"kvtier/tiers/taillog"
)

// wideSpec is of a model whose tokens have 256 KiB: 255 of them fill a record.
func wideSpec() *kvtierv1.ModelSpec {
	s := testSpec()
	s.QueryHeads, s.KvHeads, s.HeadDim = 128, 128, 256
	return s
}

// wideRows are rows of tokens [lo, hi) for a layer of wideSpec: each token's is its position, and zeros.
func wideRows(layer, lo, hi int) *appendRequest {
	const row = 128 * 256 * 2
	k := make([]byte, (hi-lo)*row)
	for i := range hi - lo {
		copy(k[i*row:], bf16Bytes([]float32{float32(lo + i)}))
	}
	return &appendRequest{layer: layer, start: uint64(lo), k: k, v: k}
}

// wantWide wants n tokens of wideRows, and what was logged in records that recovery has room for.
func wantWide(t *testing.T, s *sequence, n int) {
	t.Helper()
	if a := s.ack(); a.Accepted != uint64(n) || a.CrashSafe != uint64(n) {
		t.Fatalf("%v, not %d tokens", a, n)
	}
	for _, pos := range []int{0, n / 2, n - 1} {
		k, v, _, err := s.readKV(t.Context(), 1, uint64(pos), 1)
		if err != nil {
			t.Fatal(err)
		}
		if want := wideRows(1, pos, pos+1).k; !slices.Equal(k, want) || !slices.Equal(v, want) {
			t.Errorf("other rows at position %d", pos)
		}
	}
	wantRecords(t, s, n)
}

// wantRecords reads the records of a log: rows of n tokens, one behind the other, of which none is too large.
func wantRecords(t *testing.T, s *sequence, n int) {
	t.Helper()
	at := uint64(0)
	err := s.log.Read(func(k taillog.Kind, body []byte) error {
		if k != logRows {
			return nil
		}
		r, err := parseRows(body, s.spec)
		if err != nil {
			return err
		}
		if r.start != at || len(body) > logChunk+1024 {
			return fmt.Errorf("a record of %d bytes from token %d on, expected %d", len(body), r.start, at)
		}
		at += uint64(r.n)
		return nil
	})
	if err != nil || at != uint64(n) {
		t.Errorf("%d tokens in the log, not %d: %v", at, n, err)
	}
}

// TestLargeAppend: a chunk of a large model's prompt is logged in records that a log takes and recovery has room for, whichever layer completes it.
func TestLargeAppend(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	srv := openServer(t, dir, Options{})
	s := openSequence(t, srv, &kvtierv1.OpenSequenceRequest{Spec: wideSpec()})
	for l := range 2 {
		if err := s.append(t.Context(), wideRows(l, 0, 300)); err != nil {
			t.Fatal(err)
		}
	}
	wantWide(t, s, 300)
	spillNow(t, s)
	wantWide(t, s, 300)
	closeServer(t, srv)
	wantWide(t, find(t, openServer(t, dir, Options{}), s.id), 300)
}

// fullLogs is a file system that takes logs of so many bytes only.
type fullLogs struct {
	files.FS
	most atomic.Int64
}

func (x *fullLogs) Open(name string, how files.Flag) (files.File, error) {
	f, err := x.FS.Open(name, how)
	if err != nil || filepath.Ext(name) != logSuffix {
		return f, err
	}
	return fullLog{f, x}, nil
}

type fullLog struct {
	files.File
	x *fullLogs
}

func (f fullLog) WriteAt(b []byte, off int64) (int, error) {
	if off+int64(len(b)) > f.x.most.Load() {
		return 0, syscall.ENOSPC
	}
	return f.File.WriteAt(b, off)
}

// TestLogFullWithin: where the disk takes some records of an append and no more, those tokens stay, the others are as if they had never
// come, and the same append goes on from there.
func TestLogFullWithin(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	disk := &fullLogs{FS: files.OS}
	disk.most.Store(100 << 20)
	o := Options{FS: disk}
	srv := openServer(t, dir, o)
	s := openSequence(t, srv, &kvtierv1.OpenSequenceRequest{Spec: wideSpec()})
	const n, fit = 450, 255
	first, last := wideRows(0, 0, n), wideRows(1, 0, n)
	last.labels = []*kvtierv1.Span{{Label: "all", End: n}}
	for i := range n {
		last.ids, last.texts = append(last.ids, uint64(i)), append(last.texts, binary.AppendUvarint(nil, uint64(i)))
	}
	if err := s.append(t.Context(), first); err != nil {
		t.Fatal(err)
	}
	wantCode(t, s.append(t.Context(), last), codes.ResourceExhausted, ReasonDiskFull)
	wantWide(t, s, fit)
	if st := s.snapshot(); len(st.ids) != fit || len(st.texts) != fit || len(st.labels) != 0 || st.lens[0] != n {
		t.Fatalf("%d ids, %d texts, %d labels, %d rows of the first layer", len(st.ids), len(st.texts), len(st.labels), st.lens[0])
	}
	s.write.Lock()
	s.spill()
	s.write.Unlock()
	wantWide(t, s, fit)
	wantCode(t, s.append(t.Context(), last), codes.ResourceExhausted, ReasonDiskFull)
	wantWide(t, s, fit)

	disk.most.Store(1 << 40)
	if err := s.append(t.Context(), last); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		wantWide(t, s, n)
		st := s.snapshot()
		if got, _ := binary.Uvarint(st.texts[fit+1]); len(st.labels) != 1 || st.ids[fit+1] != fit+1 || got != fit+1 {
			t.Errorf("%d labels, id %d and text %d", len(st.labels), st.ids[fit+1], got)
		}
		closeServer(t, srv)
		srv = openServer(t, dir, o)
		s = find(t, srv, s.id)
	}
}

// TestManyTexts: tokens whose texts are more than a record's may be come back after a restart, each with its text.
func TestManyTexts(t *testing.T) {
	t.Parallel()
	const n, step = 17000, 3400
	dir := t.TempDir()
	srv := openServer(t, dir, Options{})
	srv.sealer.cancel() // so that all of it lies in the log
	s := openSequence(t, srv, &kvtierv1.OpenSequenceRequest{Spec: testSpec()})
	words := texts(n, maxTokenText)
	for lo := 0; lo < n; lo += step {
		if err := s.append(t.Context(), rowsOf(s, 0, lo, lo+step, words[lo:lo+step])); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.append(t.Context(), rowsOf(s, 1, 0, n, nil)); err != nil {
		t.Fatal(err)
	}
	wantRecords(t, s, n)
	if err := s.renewLog(s.log, errors.New("a sync failed")); err != nil {
		t.Fatal(err)
	}
	wantRecords(t, s, n)
	wantTexts(t, s, words)
	closeServer(t, srv)
	srv = openServer(t, dir, Options{})
	s = find(t, srv, s.id)
	wantTexts(t, s, words) // of the tail, or of what is sealed meanwhile
	if a := s.ack(); a.Accepted != n {
		t.Errorf("%v, not %d tokens", a, n)
	}
}

// rowsOf are rows of zeros for tokens [lo, hi) of a layer, with texts if there are any.
func rowsOf(s *sequence, layer, lo, hi int, texts [][]byte) *appendRequest {
	k := make([]byte, (hi-lo)*s.spec.rowBytes())
	r := &appendRequest{layer: layer, start: uint64(lo), k: k, v: k, texts: texts}
	for i := range texts {
		r.ids = append(r.ids, uint64(lo+i))
	}
	return r
}

func wantTexts(t *testing.T, s *sequence, words [][]byte) {
	t.Helper()
	st := s.snapshot()
	for pos := 0; pos < len(words); pos += 997 {
		e := &kvtierv1.ExplainToken{Position: uint64(pos)}
		if s.label(&st, e); e.TokenId != uint64(pos) || !slices.Equal(e.Text, words[pos]) {
			t.Errorf("token %d has id %d and a text of %d bytes", pos, e.TokenId, len(e.Text))
		}
	}
}

// oversized is a record of token 10, whose text is more than recovery takes, as no append writes it.
func (m *model) oversized(s *sequence) [][]byte {
	row := s.spec.rowBytes() / 2
	r := rowsRecord{start: 10, n: 1, exactUntil: allExact, ids: m.ids[10:11], texts: texts(1, maxTexts+1)}
	for l := range m.k {
		r.k, r.v = append(r.k, bf16Bytes(m.k[l][10*row:11*row])), append(r.v, bf16Bytes(m.v[l][10*row:11*row]))
	}
	return r.marshal()
}

// TestTextsTooLarge: a record whose texts cannot be read, as daemons wrote it that took any, is its sequence's damage: the rows are there.
func TestTextsTooLarge(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	srv := openServer(t, dir, Options{})
	m := newModel(1, testSpec(), 20)
	var all [2]*sequence
	for i := range all {
		all[i] = openSequence(t, srv, &kvtierv1.OpenSequenceRequest{Spec: testSpec()})
		m.feed(t, all[i], 0, 10)
	}
	s := all[0]
	if err := s.log.Append(logRows, m.oversized(s)...); err != nil {
		t.Fatal(err)
	}
	closeServer(t, srv)
	if found := check(t, files.OS, dir).Findings; len(found) != 1 || found[0].Verdict != store.Damage || !strings.Contains(found[0].What, "texts") {
		t.Errorf("a check finds %v", found)
	}
	srv = openServer(t, dir, Options{})
	for i, tokens := range []int{11, 10} {
		s := find(t, srv, all[i].id)
		if a := s.ack(); a.Accepted != uint64(tokens) {
			t.Fatalf("%v, not %d tokens", a, tokens)
		}
		if d := s.mu.damaged; (d != "") != (i == 0) {
			t.Errorf("sequence %d is damaged: %q", i, d)
		}
		m.check(t, s, tokens-1, exactBudget, 1e-5)
		spillNow(t, s)
		m.feed(t, s, tokens, 20)
		m.check(t, s, 19, exactBudget, 1e-5)
	}
}

// Texts that cannot be read are no damage once their tokens are taken back.
func TestTextsTakenBack(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	srv := openServer(t, dir, Options{})
	m := newModel(1, testSpec(), 20)
	s := openSequence(t, srv, &kvtierv1.OpenSequenceRequest{Spec: testSpec()})
	m.feed(t, s, 0, 10)
	back := binary.LittleEndian.AppendUint64(nil, 10)
	if err := errors.Join(s.log.Append(logRows, m.oversized(s)...), s.log.Append(logTruncate, back)); err != nil {
		t.Fatal(err)
	}
	closeServer(t, srv)
	if found := check(t, files.OS, dir).Findings; len(found) > 0 {
		t.Errorf("a check finds %v", found)
	}
	srv = openServer(t, dir, Options{})
	s = find(t, srv, s.id)
	if s.mu.damaged != "" || s.ack().Accepted != 10 {
		t.Errorf("%v, damaged: %q", s.ack(), s.mu.damaged)
	}
}
