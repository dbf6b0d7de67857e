package server

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"kvtier/attention"
	"kvtier/compress"
	kvtierv1 "kvtier/proto/kvtier/v1"
	"kvtier/tiers"
	"kvtier/tiers/files"
	"kvtier/tiers/files/filestest"
	"kvtier/tiers/seal"
	"kvtier/tiers/store"
	"kvtier/tiers/taillog"
)

// checkedFolder fills a folder: a book, sealed, with an open tail of two
// records, a fork inside its span, and a sequence of sliding layers. It returns
// the book's id, and the folder as a kill would leave it.
func checkedFolder(t *testing.T, fsys files.FS, dir string, whileOpen func()) (book string) {
	t.Helper()
	srv := openServer(t, dir, Options{FS: fsys, DiskBytes: 4 << 20, ReadAllTokens: -1})
	m := newModel(1, testSpec(), 660)
	s := openSequence(t, srv, &kvtierv1.OpenSequenceRequest{Spec: testSpec(), Name: "book"})
	m.feed(t, s, 0, 600)
	if err := s.flush(t.Context(), true); err != nil {
		t.Fatal(err)
	}
	m.feed(t, s, 600, 630)
	m.feed(t, s, 630, 660)
	openSequence(t, srv, &kvtierv1.OpenSequenceRequest{ForkOf: s.id, ForkAt: 100, Name: "fork"})
	w := openSequence(t, srv, &kvtierv1.OpenSequenceRequest{Spec: slidingSpec(), Profile: exact, Name: "sliding"})
	newModel(2, slidingSpec(), 500).feed(t, w, 0, 500)
	if err := w.flush(t.Context(), true); err != nil {
		t.Fatal(err)
	}
	if whileOpen != nil {
		whileOpen()
	}
	closeServer(t, srv)
	return s.id
}

func check(t *testing.T, fsys files.FS, dir string) *CheckReport {
	t.Helper()
	r, err := Check(t.Context(), CheckOptions{DataDir: dir, FS: fsys})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// digest is of all that can be seen of a folder.
func digestOf(t *testing.T, dir string) string {
	t.Helper()
	h := sha256.New()
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		i, err := e.Info()
		if err != nil {
			return err
		}
		fmt.Fprintln(h, path, i.Mode(), i.ModTime().UnixNano())
		if !e.IsDir() {
			b, err := os.ReadFile(path)
			fmt.Fprintln(h, i.Size(), string(b))
			return err
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("%x", h.Sum(nil))
}

// A folder that was closed, and one that was killed, have nothing wrong, and are
// afterwards as they were, to the nanosecond. One that a daemon uses is refused.
func TestCheckChangesNothing(t *testing.T) {
	t.Parallel()
	closed, killed := t.TempDir(), t.TempDir()
	checkedFolder(t, files.OS, closed, func() {
		if err := os.CopyFS(killed, os.DirFS(closed)); err != nil {
			t.Fatal(err)
		}
		if _, err := Check(t.Context(), CheckOptions{DataDir: closed}); !errors.Is(err, files.ErrLocked) {
			t.Errorf("beside a daemon: %v", err)
		}
	})
	for _, c := range []struct {
		dir    string
		before func() error
	}{
		{closed, func() error { return nil }},
		{killed, func() error { return nil }},
		{killed, func() error { return os.Remove(filepath.Join(killed, "LOCK")) }}, // as in a copy
	} {
		if err := c.before(); err != nil {
			t.Fatal(err)
		}
		was := digestOf(t, c.dir)
		var done, total int64
		r, err := Check(t.Context(), CheckOptions{DataDir: c.dir, Progress: func(d, n int64) { done, total = d, n }})
		if err != nil || len(r.Findings) != 0 {
			t.Errorf("%+v, %v", r, err)
		}
		if digestOf(t, c.dir) != was {
			t.Error("the folder changed")
		}
		if r.Sequences != 3 || r.Spans != 2 || r.Segments != 5 || r.Logs != 3 || done != total || r.Bytes != total || total == 0 || r.FreeBytes == 0 {
			t.Errorf("%+v; %d of %d bytes", r, done, total)
		}
	}
	// A check keeps a daemon out.
	stop := errors.New("stop")
	_, err := Check(t.Context(), CheckOptions{DataDir: closed, Progress: func(int64, int64) {
		if stop != nil {
			_, err := Open(context.Background(), Options{DataDir: closed})
			if err == nil || !strings.Contains(err.Error(), "kvtier check") {
				t.Errorf("a daemon beside a check: %v", err)
			}
			stop = nil
		}
	}})
	if err != nil {
		t.Error(err)
	}
}

func TestCheckRefuses(t *testing.T) {
	t.Parallel()
	empty := t.TempDir()
	for dir, want := range map[string]error{empty: tiers.ErrNotFound, filepath.Join(empty, "none"): tiers.ErrNotFound} {
		if _, err := Check(t.Context(), CheckOptions{DataDir: dir}); !errors.Is(err, want) {
			t.Errorf("%s: %v", dir, err)
		}
	}
	disk := filestest.NewDisk()
	checkedFolder(t, disk, "/d", nil)
	ctx, cancel := context.WithCancel(t.Context())
	_, err := Check(ctx, CheckOptions{DataDir: "/d", FS: disk, Progress: func(int64, int64) { cancel() }})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("interrupted: %v", err)
	}
}

// edit changes a file on a disk.
func edit(t *testing.T, disk *filestest.Disk, name string, change func(b []byte) []byte) {
	t.Helper()
	b, err := files.ReadFile(disk, name)
	if err != nil {
		t.Fatal(err)
	}
	f, err := disk.Open(name, 0)
	if err != nil {
		t.Fatal(err)
	}
	b = change(b)
	if _, err := f.WriteAt(b, 0); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.Truncate(int64(len(b))), f.Close()); err != nil {
		t.Fatal(err)
	}
}

func flipByte(at int) func([]byte) []byte {
	return func(b []byte) []byte { b[at] ^= 4; return b }
}

// Each kind of trouble is named, with its place and what it concerns.
func TestCheckFindings(t *testing.T) {
	t.Parallel()
	made := filestest.NewDisk()
	book := checkedFolder(t, made, "/d", nil)
	bookLog := func(disk *filestest.Disk) string { return nameOf(t, disk, "/d/tails", book) }
	extent := "/d/segments/extent-000001.kv"
	batch := func(change func(b *store.Batch) error) func(*filestest.Disk) error {
		return func(disk *filestest.Disk) error {
			s, err := store.Open(t.Context(), "/d", store.Options{RAMBytes: 1 << 20, DiskBytes: 4 << 20, FS: disk})
			if err != nil {
				return err
			}
			b := s.NewBatch()
			return errors.Join(change(b), b.Commit(t.Context()), b.Close(), s.Close())
		}
	}
	for _, c := range []struct {
		name    string
		spoil   func(disk *filestest.Disk) error
		verdict store.Verdict
		file    string // begins so
		what    string // holds it
		to      []Affected
	}{
		{"a block", func(d *filestest.Disk) error { edit(t, d, extent, flipByte(5000)); return nil },
			store.Damage, "segments/extent-000001.kv", "checksum of block 1 of part 0",
			[]Affected{{book, "book", 0, 0, 320}, {"", "fork", 0, 0, 100}}},
		{"a shorter extent", func(d *filestest.Disk) error {
			edit(t, d, extent, func(b []byte) []byte { return b[:8192] })
			return nil
		},
			store.Damage, "segments/", "which has only 2", nil},
		{"no extent", func(d *filestest.Disk) error { return d.Remove(extent) },
			store.Damage, "segments/", "which is missing", nil},
		{"a torn record", func(d *filestest.Disk) error {
			edit(t, d, bookLog(d), func(b []byte) []byte { return b[:len(b)-3] })
			return nil
		}, store.Note, "tails/" + book, "there are tokens up to 630", []Affected{{book, "book", allLayers, 630, 0}}},
		{"no log", func(d *filestest.Disk) error { return d.Remove(bookLog(d)) },
			store.Damage, "tails/" + book, "tokens from 320 on are lost", []Affected{{book, "book", allLayers, 320, 0}}},
		{"a whole record that does not fit", func(d *filestest.Disk) error {
			name := bookLog(d)
			if err := d.Remove(name); err != nil {
				return err
			}
			l, err := taillog.Create(d, name, strings.TrimSuffix(filepath.Base(name), logSuffix))
			return errors.Join(err, l.Append(logTruncate, make([]byte, 8)), l.Close())
		}, store.Damage, "tails/" + book, "does not fit", []Affected{{book, "book", allLayers, 320, 0}}},
		{"a stray log", func(d *filestest.Disk) error {
			return errors.Join(create(d, "/d/tails/x-1.log"), create(d, "/d/tails/readme"))
		},
			store.Note, "tails/", "nobody reads it", nil},
		{"a stray file", func(d *filestest.Disk) error {
			return errors.Join(create(d, "/d/segments/x"), create(d, "/d/FORMAT.new"))
		},
			store.Note, "FORMAT.new", "a crash left it", nil},
		{"calibration", func(d *filestest.Disk) error { edit(t, d, "/d/calibration.json", flipByte(0)); return nil },
			store.Damage, "calibration.json", "corrupt", nil},
		{"the key", func(d *filestest.Disk) error { edit(t, d, "/d/tenant.key", flipByte(3)); return nil },
			store.Damage, "tenant.key", "damaged", nil},
		{"no key", func(d *filestest.Disk) error { return d.Remove("/d/tenant.key") }, store.Note, "tenant.key", "missing", nil},
		{"no CHANGES", func(d *filestest.Disk) error { return d.Remove("/d/CHANGES") }, store.Note, "CHANGES", "missing", nil},
		{"CHANGES", func(d *filestest.Disk) error { edit(t, d, "/d/CHANGES", flipByte(3)); return nil }, store.Note, "CHANGES", "checksum", nil},
		{"no FORMAT", func(d *filestest.Disk) error { return d.Remove("/d/FORMAT") }, store.Damage, "FORMAT", "missing", nil},
		{"no catalogue", func(d *filestest.Disk) error { return d.Pebble().RemoveAll("/d/catalogue") }, store.Damage, "catalogue", "lost its last", nil},
		{"no catalogue nor CHANGES", func(d *filestest.Disk) error {
			return errors.Join(d.Pebble().RemoveAll("/d/catalogue"), d.Remove("/d/CHANGES"))
		}, store.Damage, "catalogue", "it is missing, and there are extents", nil},
		{"a segment of no span", batch(func(b *store.Batch) error {
			h, parts := sealedRows(7)
			return b.PutSegment(context.Background(), h, parts)
		}), store.Note, "catalogue", "is no span's", nil},
		{"a span of no sequence", batch(func(b *store.Batch) error {
			h, parts := sealedRows(8)
			return errors.Join(b.PutSegment(context.Background(), h, parts), b.Set(store.KindSpan, []byte("s"),
				fmt.Appendf(nil, `{"id":"s","start":0,"tokens":1,"segments":["%x"],"token_ids":[1]}`, h.ID[:])))
		}), store.Note, "catalogue", "is no sequence's", nil},
		{"a span without its segment", batch(func(b *store.Batch) error {
			return b.Set(store.KindSpan, []byte("s"), fmt.Appendf(nil, `{"id":"s","start":0,"tokens":1,"segments":["%064x"],"token_ids":[1]}`, 5))
		}), store.Damage, "catalogue", "has no record", nil},
		{"a span that is none", batch(func(b *store.Batch) error { return b.Set(store.KindSpan, []byte("s"), []byte("{}")) }),
			store.Damage, "catalogue", "span record", nil},
		{"a sequence without its span", batch(func(b *store.Batch) error {
			return b.Set(store.KindSequence, []byte("q"), []byte(`{"id":"q","spec":{"layers":1,"query_heads":1,"kv_heads":1,"head_dim":16,"fingerprint":"YQ=="},"spans":[{"span":"none","limit":1}]}`))
		}), store.Damage, "catalogue", "span none", []Affected{{"q", "", allLayers, 0, 0}}},
		{"a sequence that is none", batch(func(b *store.Batch) error { return b.Set(store.KindSequence, []byte("q"), []byte("x")) }),
			store.Damage, "catalogue", "record of sequence", nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			disk := made.Kill(made.Ops())
			if err := c.spoil(disk); err != nil {
				t.Fatal(err)
			}
			r := check(t, disk, "/d")
			i := slices.IndexFunc(r.Findings, func(f CheckFinding) bool {
				return f.Verdict == c.verdict && strings.HasPrefix(f.File, c.file) && strings.Contains(f.What, c.what)
			})
			if i < 0 {
				t.Fatalf("not found: %+v", r)
			}
			if r.Damage > 0 != (c.verdict == store.Damage) || r.Unread > 0 && r.Damage == 0 {
				t.Errorf("%d damaged, %d unread: %+v", r.Damage, r.Unread, r)
			}
			f := r.Findings[i]
			if f.Advice == "" {
				t.Error("no advice")
			}
			for _, want := range c.to {
				if !slices.ContainsFunc(f.Affected, func(a Affected) bool {
					b := want // whose id may be any
					b.Sequence = cmp.Or(b.Sequence, a.Sequence)
					return a == b
				}) {
					t.Errorf("%+v is not among %+v", want, f.Affected)
				}
			}
		})
	}
}

// sealedRows is a segment of one token.
func sealedRows(seed byte) (*tiers.Header, [tiers.NumParts][]byte) {
	row := bytes.Repeat([]byte{seed, 0x3f}, 16)
	return seal.Segment(&seal.Rows{Heads: 1, HeadDim: 16, Type: compress.BF16, K: row, V: row},
		seal.Options{Profile: tiers.ProfileBalanced, Metrics: []*attention.Metric{attention.NewQuerySum(16).Metric()}})
}

func create(d *filestest.Disk, name string) error {
	f, err := d.Open(name, files.Create)
	return errors.Join(err, f.Close())
}

// nameOf finds the file in a folder that begins with a prefix.
func nameOf(t *testing.T, disk *filestest.Disk, dir, prefix string) string {
	t.Helper()
	names, err := disk.List(dir)
	i := slices.IndexFunc(names, func(n string) bool { return strings.HasPrefix(n, prefix) })
	if err != nil || i < 0 {
		t.Fatalf("no %s in %v: %v", prefix, names, err)
	}
	return filepath.Join(dir, names[i])
}

// A disk that fails is not taken for one that is well, nor for damage; one that
// reads wrong now and then is told from bytes that are wrong.
func TestCheckFaultyDisk(t *testing.T) {
	t.Parallel()
	made := filestest.NewDisk()
	checkedFolder(t, made, "/d", nil)
	for seed := range uint64(40) {
		disk := made.Kill(made.Ops())
		disk.Misbehave(filestest.Faults{Fail: .05}, seed)
		r, err := Check(t.Context(), CheckOptions{DataDir: "/d", FS: disk})
		if err == nil && len(disk.Counts()) > 0 && r.Damage+r.Unread+r.Notes == 0 {
			t.Errorf("seed %d: nothing found, and there were %v", seed, disk.Counts())
		}
		if err == nil && r.Damage > 0 {
			t.Errorf("seed %d: taken for damage: %+v", seed, r.Findings)
		}
		disk = made.Kill(made.Ops())
		disk.Misbehave(filestest.Faults{Flip: .2, Short: .1}, seed)
		r, err = Check(t.Context(), CheckOptions{DataDir: "/d", FS: disk})
		if err != nil {
			continue
		}
		for _, f := range r.Findings {
			if f.Verdict == store.Damage && strings.HasPrefix(f.File, "segments/") {
				t.Errorf("seed %d: taken for damage: %+v", seed, f)
			}
		}
	}
}

// Garbage in place of any file, or a part of it, is no panic, and is not passed
// over where bytes are in use.
func TestCheckGarbage(t *testing.T) {
	t.Parallel()
	made := filestest.NewDisk()
	checkedFolder(t, made, "/d", nil)
	var names []string
	if err := made.Walk(func(name string, b []byte) error {
		if len(b) > 0 && !strings.Contains(name, "OPTIONS") {
			names = append(names, name)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	for seed := range uint64(200) {
		rng := rand.New(rand.NewPCG(seed, 3))
		disk := made.Kill(made.Ops())
		name := names[rng.IntN(len(names))]
		same := false
		edit(t, disk, name, func(b []byte) []byte {
			was := bytes.Clone(b)
			defer func() { same = bytes.Equal(was, b) }()
			if rng.IntN(2) == 0 {
				b = b[:rng.IntN(len(b))]
			}
			from := rng.IntN(2) * rng.IntN(len(b)+1)
			if strings.HasSuffix(name, ".kv") {
				from = 0 // the segments lie in front
			}
			for i := from; i < len(b); i++ {
				b[i] = byte(rng.Uint32())
			}
			return b
		})
		r, err := Check(t.Context(), CheckOptions{DataDir: "/d", FS: disk})
		if err == nil && len(r.Findings) == 0 && !same {
			t.Errorf("seed %d: %s: nothing found", seed, name)
		}
	}
}
