package taillog

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"kvtier/tiers"
	"kvtier/tiers/files"
	"kvtier/tiers/files/filestest"
)

type record struct {
	kind Kind
	body string
}

func replay(t *testing.T, path, name string) (got []record, damaged int64) {
	t.Helper()
	l, damaged, err := Replay(files.OS, path, name, Reader{Record: func(k Kind, body []byte) error {
		got = append(got, record{k, string(body)})
		return nil
	}})
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	return got, damaged
}

func write(t *testing.T, path string, n int) []record {
	t.Helper()
	l, err := Create(files.OS, path, "log")
	if err != nil {
		t.Fatal(err)
	}
	var want []record
	for i := range n {
		body := bytes.Repeat([]byte{byte(i)}, i*7)
		if err := l.Append(Kind(i%3), body[:i], body[i:]); err != nil {
			t.Fatal(err)
		}
		want = append(want, record{Kind(i % 3), string(body)})
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	return want
}

func TestRoundTrip(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a.log")
	want := write(t, path, 20)
	got, damaged := replay(t, path, "log")
	if damaged != 0 || fmt.Sprint(got) != fmt.Sprint(want) {
		t.Fatalf("damaged %d, got %d records of %d", damaged, len(got), len(want))
	}
	if got, _ := replay(t, path, "another log's name"); len(got) != 0 {
		t.Fatal("records of one log passed for another's")
	}
}

func TestCreateDoesNotOverwrite(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a.log")
	write(t, path, 3)
	if _, err := Create(files.OS, path, "log"); !errors.Is(err, os.ErrExist) {
		t.Fatalf("got %v", err)
	}
}

// Every cut and every flipped byte leaves a prefix of whole records.
func TestDamageLeavesAPrefix(t *testing.T) {
	dir := t.TempDir()
	want := write(t, filepath.Join(dir, "a.log"), 6)
	whole, err := os.ReadFile(filepath.Join(dir, "a.log"))
	if err != nil {
		t.Fatal(err)
	}
	check := func(what string, b []byte, mayBeAll bool) {
		path := filepath.Join(dir, "b.log")
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		got, _ := replay(t, path, "log")
		if len(got) > len(want) || !mayBeAll && len(got) == len(want) {
			t.Fatalf("%s: %d records", what, len(got))
		}
		if fmt.Sprint(got) != fmt.Sprint(want[:len(got)]) {
			t.Fatalf("%s: records are not a prefix", what)
		}
		if again, damaged := replay(t, path, "log"); damaged != 0 || len(again) != len(got) {
			t.Fatalf("%s: the log was not cut", what)
		}
	}
	for n := range whole {
		check(fmt.Sprintf("cut at %d", n), whole[:n], false)
		flipped := bytes.Clone(whole)
		flipped[n] ^= 1 << (n % 8)
		check(fmt.Sprintf("flip at %d", n), flipped, false)
	}
}

func FuzzReplay(f *testing.F) {
	dir := f.TempDir()
	l, err := Create(files.OS, filepath.Join(dir, "seed.log"), "log")
	if err != nil {
		f.Fatal(err)
	}
	for i := range 3 {
		if err := l.Append(Kind(i), []byte("body")); err != nil {
			f.Fatal(err)
		}
	}
	l.Close()
	b, err := os.ReadFile(filepath.Join(dir, "seed.log"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	// Replay syncs the file; on a disk that bounds how much is tried.
	scratch := dir
	if st, err := os.Stat("/dev/shm"); err == nil && st.IsDir() {
		if scratch, err = os.MkdirTemp("/dev/shm", "kvtier-fuzz-"); err != nil {
			f.Fatal(err)
		}
		f.Cleanup(func() { os.RemoveAll(scratch) })
	}
	path := filepath.Join(scratch, "f.log")
	f.Fuzz(func(t *testing.T, b []byte) {
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		l, _, err := Replay(files.OS, path, "log", Reader{Record: func(Kind, []byte) error { return nil }})
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		if err := l.Append(1, []byte("more")); err != nil {
			t.Fatal(err)
		}
	})
}

// A log may be closed or removed while the background syncs it.
func TestSyncBesideClose(t *testing.T) {
	for i := range 200 {
		l, err := Create(files.OS, filepath.Join(t.TempDir(), "log"), "log")
		if err != nil {
			t.Fatal(err)
		}
		if err := l.Append(1, []byte("record")); err != nil {
			t.Fatal(err)
		}
		synced := make(chan error, 1)
		go func() { synced <- l.Sync() }()
		end := l.Close
		if i%2 == 0 {
			end = l.Remove
		}
		if err := errors.Join(end(), <-synced); err != nil {
			t.Fatal(err)
		}
	}
}

// One damaged record: what lies behind is shown, with how many are missing; a
// record that was written twice is not lost.
func TestBehindDamage(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "log")
	l, err := Create(files.OS, path, "log")
	if err != nil {
		t.Fatal(err)
	}
	for _, body := range []string{"one", "two", "three"} {
		if err := l.Append(1, []byte(body)); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(l.TakeBack(2, 1, []byte("four")), l.Append(1, []byte("five")), l.Close()); err != nil {
		t.Fatal(err)
	}
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	all := []string{"one", "two", "three", "four", "four", "five"}
	for at := range whole {
		b := bytes.Clone(whole)
		b[at] ^= 1 << (at % 8)
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		var got, behind []string
		lost := 0
		l, cut, err := Replay(files.OS, path, "log", Reader{
			Record: func(_ Kind, body []byte) error { got = append(got, string(body)); return nil },
			Behind: func(b Behind) { lost += b.Lost; behind = append(behind, string(b.Body)) },
		})
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(l.Append(1, []byte("more")), l.Close()); err != nil {
			t.Fatal(err)
		}
		n := len(got)
		if n == len(all) || !slices.Equal(got, all[:n]) || !slices.Equal(behind, all[n+1:]) || cut == 0 || lost != min(1, len(behind)) {
			t.Fatalf("byte %d: %v, behind %v, %d lost, %d bytes cut", at, got, behind, lost, cut)
		}
		if again, cut := replay(t, path, "log"); cut != 0 || len(again) != n+1 || again[n].body != "more" {
			t.Fatalf("byte %d: %v after the next append", at, again)
		}
	}
}

// What a killed daemon leaves of a bulk append can be longer than the buffer
// that looks for records behind it.
func TestLongTornRecord(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a.log")
	l, err := Create(files.OS, path, "log")
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(l.Append(1, []byte("whole")), l.Append(2, make([]byte, 5<<20)), l.Close()); err != nil {
		t.Fatal(err)
	}
	for _, size := range []int64{4 << 20, 3<<20 + 7, 1<<20 + 25 + headerBytes, 100} {
		if err := os.Truncate(path, size); err != nil {
			t.Fatal(err)
		}
		whole, behind := 0, 0
		l, damaged, err := Replay(files.OS, path, "log", Reader{
			Record: func(Kind, []byte) error { whole++; return nil },
			Behind: func(Behind) { behind++ },
		})
		if err != nil || whole != 1 || behind != 0 || damaged != size-headerBytes-5 {
			t.Fatalf("cut at %d: %d whole, %d behind, %d damaged: %v", size, whole, behind, damaged, err)
		}
		if err := errors.Join(l.Append(2, make([]byte, 5<<20)), l.Close()); err != nil {
			t.Fatal(err)
		}
	}
}

// TestRead: a log that is open hands out what was appended, and what is damaged
// is an error.
func TestRead(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	l, err := Create(files.OS, path, "log")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	var want []string
	read := func() (got []string, err error) {
		err = l.Read(func(k Kind, body []byte) error {
			got = append(got, fmt.Sprint(k, string(body)))
			return nil
		})
		return got, err
	}
	for i := range 20 {
		body := strings.Repeat("x", i*i)
		if err := l.Append(Kind(i%3), []byte(body)); err != nil {
			t.Fatal(err)
		}
		want = append(want, fmt.Sprint(Kind(i%3), body))
		if got, err := read(); err != nil || !slices.Equal(got, want) {
			t.Fatalf("after %d records: %v, %v", i+1, got, err)
		}
	}
	stop := errors.New("stop")
	if err := l.Read(func(Kind, []byte) error { return stop }); !errors.Is(err, stop) {
		t.Error(err)
	}
	size, _ := l.Size()
	for at := int64(0); at < size; at += 13 {
		flip(t, path, at)
		if _, err := read(); !errors.Is(err, tiers.ErrCorrupt) {
			t.Fatalf("byte %d: %v", at, err)
		}
		flip(t, path, at)
	}
	if got, err := read(); err != nil || len(got) != 20 {
		t.Fatal(got, err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := read(); !errors.Is(err, tiers.ErrClosed) {
		t.Error(err)
	}
}

// flip changes a bit of a file.
func flip(t *testing.T, path string, at int64) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var b [1]byte
	if _, err := f.ReadAt(b[:], at); err != nil {
		t.Fatal(err)
	}
	b[0] ^= 4
	if _, err := f.WriteAt(b[:], at); err != nil {
		t.Fatal(err)
	}
}

// A power cut may lose records before whole ones. What lies behind says that
// they were never durable, and how much of what was they may have taken back.
func TestPowerCut(t *testing.T) {
	d := filestest.NewDisk()
	l, err := Create(d, "/log", "log")
	if err != nil {
		t.Fatal(err)
	}
	big := make([]byte, 6000)
	if err := errors.Join(l.Append(1, big), l.TakeBack(2, 7, big), l.Append(1, big), l.Sync(), d.SyncDir("/")); err != nil {
		t.Fatal(err)
	}
	const durable = 4
	kinds := []Kind{1, 2, 2, 1}
	for i := range 6 {
		err := l.Append(1, big)
		if kinds = append(kinds, 1); i == 2 {
			err = errors.Join(err, l.TakeBack(2, 5, big))
			kinds = append(kinds, 2, 2)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	lostMany, tookBack := false, false
	for i := range uint64(400) {
		cut := d.PowerCut(d.Ops(), rand.New(rand.NewPCG(1, i)))
		n := 0
		var behind []Behind
		l, _, err := Replay(cut, "/log", "log", Reader{
			Record: func(k Kind, _ []byte) error {
				if k != kinds[n] {
					return fmt.Errorf("record %d is of kind %d", n, k)
				}
				n++
				return nil
			},
			Behind: func(b Behind) { behind = append(behind, b) },
		})
		if err != nil || n < durable {
			t.Fatalf("cut %d: %d records, %v", i, n, err)
		}
		at := n
		for _, b := range behind {
			at += b.Lost
			keeps := uint64(KeepsAll)
			if at >= 7 { // the first of the two that take back, which may be what was lost
				keeps = 5
			}
			if b.Durable || b.Kind != kinds[at] || b.Keeps != keeps {
				t.Fatalf("cut %d: %d records; behind them record %d: %+v", i, n, at, b.Keeps)
			}
			lostMany = lostMany || b.Lost > 1
			tookBack = tookBack || n < 7 && keeps == 5
			at++
		}
		if err := errors.Join(l.Append(1, []byte("more")), l.Close()); err != nil {
			t.Fatal(err)
		}
	}
	if !lostMany || !tookBack {
		t.Errorf("many lost: %v, a truncation: %v", lostMany, tookBack)
	}
}

// Damage in what was synced is told from a power cut.
func TestDurableDamage(t *testing.T) {
	d := filestest.NewDisk()
	l, err := Create(d, "/log", "log")
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(l.Append(1, []byte("one")), l.Append(1, []byte("two")), l.Sync(), l.Append(1, []byte("three")), l.Append(1, []byte("four"))); err != nil {
		t.Fatal(err)
	}
	for at, durable := range []bool{true, true, false} {
		d := d.Kill(d.Ops())
		f, err := d.Open("/log", 0)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.WriteAt([]byte{0xff}, int64(at)*(headerBytes+3)+headerBytes); err != nil {
			t.Fatal(err)
		}
		n := 0
		_, _, err = Replay(d, "/log", "log", Reader{Record: func(Kind, []byte) error { n++; return nil }, Behind: func(b Behind) {
			if b.Durable != durable && string(b.Body) == "four" {
				t.Errorf("record %d damaged: durable %v", at, b.Durable)
			}
		}})
		if err != nil || n != at {
			t.Errorf("record %d damaged: %d whole, %v", at, n, err)
		}
	}
}

// After a sync that failed nobody knows what is durable, whatever later ones say.
func TestFailedSync(t *testing.T) {
	d := filestest.NewDisk()
	l, err := Create(d, "/log", "log")
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Append(1, []byte("one")); err != nil {
		t.Fatal(err)
	}
	d.Misbehave(filestest.Faults{Fail: 1}, 1)
	if err := l.Sync(); !errors.Is(err, syscall.EIO) {
		t.Fatal(err)
	}
	d.Misbehave(filestest.Faults{}, 0)
	if err := l.Sync(); !errors.Is(err, syscall.EIO) {
		t.Errorf("the next sync: %v", err)
	}
	if err := l.Append(1, []byte("two")); !errors.Is(err, syscall.EIO) {
		t.Errorf("an append: %v", err)
	}
	if _, synced := l.Size(); synced != 0 {
		t.Errorf("%d bytes are said to be durable", synced)
	}
	if err := l.Remove(); err != nil {
		t.Error(err)
	}
}

// syncOnce is a file system whose first sync waits and then fails. Others
// succeed, as those do that overlap it: the system tells an error once.
type syncOnce struct {
	files.FS
	syncs   atomic.Int32
	syncing chan struct{} // closed when the first sync is under way
	open    chan struct{} // it waits for this
}

func newSyncOnce() *syncOnce {
	return &syncOnce{FS: files.OS, syncing: make(chan struct{}), open: make(chan struct{})}
}

func (s *syncOnce) Open(name string, how files.Flag) (files.File, error) {
	f, err := s.FS.Open(name, how)
	if err != nil {
		return nil, err
	}
	return &syncOnceFile{f, s}, nil
}

type syncOnceFile struct {
	files.File
	s *syncOnce
}

func (f *syncOnceFile) Sync() error {
	if f.s.syncs.Add(1) > 1 {
		return nil
	}
	close(f.s.syncing)
	<-f.s.open
	return syscall.EIO
}

// A sync that overlaps one that fails fails too, and so does a Close: nobody
// says that bytes are durable which the system gave up. Appends do not wait.
func TestSyncBesideFailingSync(t *testing.T) {
	for what, end := range map[string]func(*Log) error{"sync": (*Log).Sync, "close": (*Log).Close} {
		fsys := newSyncOnce()
		l, err := Create(fsys, filepath.Join(t.TempDir(), "log"), "log")
		if err != nil {
			t.Fatal(err)
		}
		if err := l.Append(1, []byte("one")); err != nil {
			t.Fatal(err)
		}
		first, second := make(chan error, 1), make(chan error, 1)
		go func() { first <- l.Sync() }()
		<-fsys.syncing
		if err := l.Append(1, []byte("two")); err != nil {
			t.Fatal(err)
		}
		go func() { second <- end(l) }()
		select {
		case err := <-second:
			t.Errorf("a %s did not wait for the sync under way: %v", what, err)
			second <- err
		case <-time.After(20 * time.Millisecond):
		}
		close(fsys.open)
		if err := <-first; !errors.Is(err, syscall.EIO) {
			t.Errorf("the first sync: %v", err)
		}
		if err := <-second; !errors.Is(err, syscall.EIO) {
			t.Errorf("a %s beside it: %v", what, err)
		}
		if _, synced := l.Size(); synced != 0 {
			t.Errorf("%d bytes are said to be durable", synced)
		}
		_ = l.Close()
	}
}

// A sync that fails says so though the log was removed meanwhile, which does
// not wait for it.
func TestRemoveBesideFailingSync(t *testing.T) {
	fsys := newSyncOnce()
	path := filepath.Join(t.TempDir(), "log")
	l, err := Create(fsys, path, "log")
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Append(1, []byte("one")); err != nil {
		t.Fatal(err)
	}
	synced := make(chan error, 1)
	go func() { synced <- l.Sync() }()
	<-fsys.syncing
	if err := l.Remove(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the file is still there: %v", err)
	}
	close(fsys.open)
	if err := <-synced; !errors.Is(err, syscall.EIO) {
		t.Errorf("the sync: %v", err)
	}
}
