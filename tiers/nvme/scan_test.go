package nvme

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"kvtier/tiers"
	"kvtier/tiers/files"
	"kvtier/tiers/tiertest"
)

// A scan reads every part once, as it was written, and through a file system
// that cannot be written; a file that ends early is said to.
func TestScan(t *testing.T) {
	dir := t.TempDir()
	o := Options{Bytes: 64 << 20, ExtentBytes: 16 << 20}
	a := openAt(t, dir, o)
	headers := map[tiers.ID]*tiers.Header{}
	for i, n := range []int{3000, 40000, 100, 600000, 7000, 20000, 900, 90000} {
		h, pieces := tiertest.Segment(uint64(i), 2, n)
		ok(t, a.Put(ctx, h, pieces))
		headers[h.ID] = h
	}
	locations := map[tiers.ID]Location{}
	for id := range headers {
		locations[id], _ = a.Locate(id)
	}
	ok(t, errors.Join(a.Sync(ctx), a.Close()))

	o.FS = files.ReadOnly(files.OS)
	b := openAt(t, dir, o)
	for id, l := range locations {
		ok(t, b.Restore(id, l))
	}
	scan := func() (whole, short int) {
		var mu sync.Mutex
		seen := map[Run]bool{}
		ok(t, b.Scan(ctx, func(s Stored) error {
			h := headers[s.ID]
			err := h.CheckBlocks(s.Part, 0, s.Bytes)
			mu.Lock()
			defer mu.Unlock()
			switch {
			case err != nil || seen[s.Run]:
				t.Errorf("segment %v, part %d, again %v: %v", s.ID, s.Part, seen[s.Run], err)
			case s.Err != nil:
				is(t, s.Err, io.ErrUnexpectedEOF)
				short++
			case int64(len(s.Bytes)) == h.Bytes(s.Part):
				whole++
			}
			seen[s.Run] = true
			return nil
		}))
		return whole, short
	}
	parts := 0
	for _, l := range locations {
		for _, r := range l.Parts {
			if r.Blocks > 0 {
				parts++
			}
		}
	}
	if whole, short := scan(); whole != parts || short != 0 {
		t.Errorf("%d parts whole, %d short, of %d", whole, short, parts)
	}
	ok(t, os.Truncate(filepath.Join(dir, ExtentName(1)), 5<<20))
	if whole, short := scan(); whole+short != parts || short == 0 {
		t.Errorf("%d parts whole, %d short, of %d", whole, short, parts)
	}
	stop := errors.New("stop")
	is(t, b.Scan(ctx, func(Stored) error { return stop }), stop)
}
