package store

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"math"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cockroachdb/pebble/v2"

	"kvtier/tiers"
	"kvtier/tiers/files"
	"kvtier/tiers/nvme"
	"kvtier/tiers/seal"
)

// Inspection is a data folder that is looked at while no daemon runs on it. It
// changes nothing in the folder, and keeps a daemon out until it is closed.
type Inspection struct {
	// Headers are those of all segments that the catalogue names.
	Headers map[tiers.ID]*tiers.Header
	// Whole says that the catalogue has all records that it should have: what it
	// does not name then, nobody does.
	Whole bool

	fs     files.FS
	dir    string
	report func(Finding)
	log    *slog.Logger
	lock   io.Closer
	db     *pebble.DB // nil: none, or it cannot be read
	nvme   *nvme.Tier // nil: no extents, or they cannot be opened
}

// What to do about findings.
const (
	AdviseRestore = whatToDo
	AdviseReading = "run as the user who runs kvtierd; else check the disk (dmesg, smartctl), then check again"
	adviseSegment = "delete the sequences that use it and read them again, or restore the file from a copy; nothing else is concerned"
	adviseDisk    = "check the disk and its cable (dmesg, smartctl), then check again"
)

// Inspect opens a data folder and reads its catalogue. What it finds goes to
// report, which may be called by several goroutines at once. The error says why
// nothing can be found out: tiers.ErrNotFound where there is no data folder,
// files.ErrLocked where a daemon uses it, tiers.ErrVersion for another build's.
func Inspect(ctx context.Context, fsys files.FS, dir string, report func(Finding)) (x *Inspection, err error) {
	x = &Inspection{Headers: map[tiers.ID]*tiers.Header{}, fs: files.ReadOnly(fsys), dir: dir, report: report, log: slog.New(slog.DiscardHandler)}
	names, err := x.fs.List(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("there is no folder %s: %w", dir, tiers.ErrNotFound)
	}
	if err != nil {
		return nil, fmt.Errorf("data folder: %w", err)
	}
	defer func(x *Inspection) {
		if err != nil {
			_ = x.Close() // err says more
		}
	}(x)
	x.lock, err = x.fs.Share(filepath.Join(dir, lockFile))
	switch {
	case errors.Is(err, files.ErrLocked):
		return nil, fmt.Errorf("a daemon runs on %s: %w", dir, err)
	case err != nil && !errors.Is(err, fs.ErrNotExist): // a copy may lack it
		return nil, fmt.Errorf("data folder: %w", err)
	}
	if err := x.checkFormat(names); err != nil {
		return nil, err
	}
	x.checkLeftovers(names)
	x.openCatalogue()
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	x.openSegments(names)
	return x, nil
}

// FS returns the folder's file system, which cannot be written.
func (x *Inspection) FS() files.FS { return x.fs }

func (x *Inspection) checkFormat(names []string) error {
	found, err := readFormat(x.fs, x.dir)
	switch {
	case errors.Is(err, tiers.ErrVersion):
		return err
	case err != nil:
		x.report(Finding{VerdictOf(err), formatFile, Nowhere, text(err), "restore it: it is one line of text, the same in all folders of this format", tiers.ID{}})
	case !found && !slices.ContainsFunc(names, func(n string) bool {
		return n == catalogueDir || n == segmentsDir || n == changesFile
	}):
		return fmt.Errorf("%s holds no data of kvtier: %w", x.dir, tiers.ErrNotFound)
	case !found:
		x.report(Finding{Damage, formatFile, Nowhere, "it is missing, and the folder holds data", "restore it: it is one line of text, the same in all folders of this format", tiers.ID{}})
	}
	return nil
}

// checkLeftovers looks for small files whose writing a crash interrupted.
func (x *Inspection) checkLeftovers(names []string) {
	for _, n := range names {
		if strings.HasSuffix(n, ".new") {
			x.report(Finding{Note, n, Nowhere, "a crash left it before it took the place of the file that it is named after", "nothing: it is written over", tiers.ID{}})
		}
	}
}

// Records calls fn for every record of a kind that can be read. What cannot be
// is reported.
func (x *Inspection) Records(k Kind, fn func(key, value []byte)) {
	if x.db == nil {
		return
	}
	err := guard(func() error {
		return eachRecord(x.db, k, func(key, value []byte, err error) error {
			if err != nil {
				x.report(Finding{Damage, catalogueDir, Nowhere, text(err), AdviseRestore, tiers.ID{}})
				return nil
			}
			fn(key, value)
			return nil
		})
	})
	if err != nil && x.Whole { // else it was reported before
		x.Whole = false
		x.report(Finding{VerdictOf(err), catalogueDir, Nowhere, text(err), AdviseRestore, tiers.ID{}})
	}
}

// openSegments opens the extents and gives each segment its place.
func (x *Inspection) openSegments(names []string) {
	opened := true
	if slices.Contains(names, segmentsDir) {
		opened = x.openExtents()
	}
	if _, extents := x.Bytes(); x.db == nil && x.Whole && extents > 0 {
		x.Whole = false
		x.report(Finding{Damage, catalogueDir, Nowhere, "it is missing, and there are extents: the daemon would take them for free room", AdviseRestore, tiers.ID{}})
	}
	x.Records(kindSegment, func(key, value []byte) {
		h, loc, err := parseSegment(key, value)
		if err != nil {
			x.report(Finding{Damage, catalogueDir, Nowhere, fmt.Sprintf("record of segment %.8x: %s", key, text(err)), AdviseRestore, tiers.ID{}})
			return
		}
		x.Headers[h.ID] = h
		if !opened {
			return // that was reported
		}
		if err := x.place(h, loc); err != nil {
			main := loc.Parts[tiers.PartMain]
			x.report(Finding{Damage, extentFile(main.Extent), int64(main.First) * tiers.BlockSize, text(err), adviseSegment, h.ID})
		}
	})
}

func extentFile(number uint32) string { return filepath.Join(segmentsDir, nvme.ExtentName(number)) }

func (x *Inspection) openExtents() bool {
	dir := filepath.Join(x.dir, segmentsDir)
	names, err := x.fs.List(dir)
	if err == nil {
		x.nvme, err = nvme.Open(dir, nvme.Options{Bytes: math.MaxInt64, FS: x.fs})
	}
	if err != nil {
		x.report(Finding{Unread, segmentsDir, Nowhere, text(err), AdviseReading, tiers.ID{}})
		return false
	}
	for _, n := range names {
		if !nvme.IsExtentName(n) {
			x.report(Finding{Note, filepath.Join(segmentsDir, n), Nowhere, "it is no extent: nobody reads it", "nothing; it may be removed", tiers.ID{}})
		}
	}
	return true
}

// place takes up a segment as the daemon does, and says why it cannot.
func (x *Inspection) place(h *tiers.Header, loc nvme.Location) error {
	for p, r := range loc.Parts {
		want := h.Blocks(tiers.Part(p))
		if int(r.Blocks) != want && (r.Blocks > 0 || p == int(tiers.PartMain)) { // low planes may have been dropped
			return fmt.Errorf("part %d of segment %v has %d blocks, its location %d", p, h.ID, want, r.Blocks)
		}
	}
	if x.nvme == nil {
		return fmt.Errorf("segment %v: there are no extents", h.ID)
	}
	return x.nvme.Restore(h.ID, loc)
}

// Bytes returns how many bytes the segments take that can be read, and how many
// the extents have.
func (x *Inspection) Bytes() (segments, extents int64) {
	if x.nvme == nil {
		return 0, 0
	}
	return x.nvme.Usage().BytesUsed, x.nvme.FileBytes()
}

// StoredBytes returns how many bytes a segment takes in the extents.
func (x *Inspection) StoredBytes(id tiers.ID) (n int64) {
	if x.nvme == nil {
		return 0
	}
	loc, _ := x.nvme.Locate(id)
	for _, r := range loc.Parts {
		n += int64(r.Blocks) * tiers.BlockSize
	}
	return n
}

// Layout lists where segments lie in the extents.
func (x *Inspection) Layout() []nvme.Stored {
	if x.nvme == nil {
		return nil
	}
	return x.nvme.Layout()
}

// CheckSegments reads every byte of every segment, checks it and parses it.
// done is told how many bytes were, by several goroutines at once. The error is
// that of ctx. Memory is what nvme.Tier.Scan takes.
func (x *Inspection) CheckSegments(ctx context.Context, done func(bytes int64)) error {
	if x.nvme == nil {
		return nil
	}
	return x.nvme.Scan(ctx, func(s nvme.Stored) error {
		defer done(int64(s.Run.Blocks) * tiers.BlockSize)
		first := x.fault(s)
		if first == nil {
			return nil
		}
		// A disk, a cable or memory may have been wrong this once.
		var again *Finding
		if err := x.nvme.Reread(s, func(s nvme.Stored) error { again = x.fault(s); return nil }); err != nil {
			return err
		}
		if again == nil {
			first.Verdict, first.Advice = Note, adviseDisk
			first.What += "; read once more it was right"
			again = first
		}
		x.report(*again)
		return nil
	})
}

// fault says what is wrong with a part; nil: nothing.
func (x *Inspection) fault(s nvme.Stored) *Finding {
	h, start := x.Headers[s.ID], int64(s.Run.First)*tiers.BlockSize
	f := &Finding{Damage, extentFile(s.Run.Extent), start, "", adviseSegment, s.ID}
	read := len(s.Bytes) / tiers.BlockSize
	bad, first := 0, 0
	var err error
	for b := range read {
		if e := h.CheckBlocks(s.Part, b, s.Bytes[b*tiers.BlockSize:(b+1)*tiers.BlockSize]); e != nil {
			if bad++; bad == 1 {
				first, err = b, e
			}
		}
	}
	switch {
	case bad > 0:
		f.Offset += int64(first) * tiers.BlockSize
		f.What = text(err)
		if bad > 1 {
			f.What += fmt.Sprintf(", and of %d blocks behind it", bad-1)
		}
	case s.Err != nil: // the file is long enough: that was looked at before
		f.Offset += int64(read) * tiers.BlockSize
		f.Verdict, f.What, f.Advice = Unread, fmt.Sprintf("segment %v: %v", s.ID, s.Err), AdviseReading
	default:
		if err := guard(func() error { return seal.CheckImage(h, s.Part, s.Bytes) }); err != nil {
			f.What = fmt.Sprintf("the checksums are right, what they are of is not: %v", err)
			break
		}
		return nil
	}
	return f
}

// guard turns a panic over garbage into an error.
func guard(fn func() error) (err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("%w: %v", tiers.ErrCorrupt, r)
		}
	}()
	return fn()
}

// Close lets a daemon use the folder again.
func (x *Inspection) Close() error {
	var errs []error
	if x.nvme != nil {
		errs = append(errs, x.nvme.Close())
	}
	if x.db != nil {
		errs = append(errs, guard(x.db.Close))
	}
	if x.lock != nil {
		errs = append(errs, x.lock.Close())
	}
	return errors.Join(errs...)
}
