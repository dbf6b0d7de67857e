package store

import (
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"log/slog"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"

	"kvtier/tiers"
	"kvtier/tiers/files"
	"kvtier/tiers/gpu"
	"kvtier/tiers/nvme"
	"kvtier/tiers/seal"
)

// Kind is the first byte of a record's key.
type Kind byte

// The kinds of records. Values of spans and sequences are the server's.
const (
	kindSegment  Kind = 'h'
	KindSpan     Kind = 'p'
	KindSequence Kind = 'q'
)

// Names in the data folder.
const (
	catalogueDir = "catalogue"
	segmentsDir  = "segments"
	formatFile   = "FORMAT"
	lockFile     = "LOCK"
)

// folderFormat is the version of the data folder as a whole.
const folderFormat = 6

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// formatLine is the content of FORMAT, with its own checksum.
func formatLine(version int) string {
	s := fmt.Sprintf("kvtier data folder, format %d", version)
	return fmt.Sprintf("%s, crc32c %08x\n", s, crc32.Checksum([]byte(s), castagnoli))
}

// checkFormat refuses folders that another version wrote, and marks new ones.
func checkFormat(fsys files.FS, dir string) error {
	found, err := readFormat(fsys, dir)
	if found || err != nil {
		return err
	}
	if _, err := fsys.List(filepath.Join(dir, catalogueDir)); err == nil {
		return fmt.Errorf("data folder %s holds data but no FORMAT file: restore that file: %w", dir, tiers.ErrCorrupt)
	}
	if err := files.WriteFile(fsys, filepath.Join(dir, formatFile), []byte(formatLine(folderFormat))); err != nil {
		return fmt.Errorf("data folder: %w", err)
	}
	return nil
}

// readFormat says whether there is a FORMAT file, and what is wrong with it.
func readFormat(fsys files.FS, dir string) (found bool, err error) {
	path := filepath.Join(dir, formatFile)
	b, err := files.ReadFile(fsys, path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("data folder: %w", err)
	}
	var v int
	if _, err := fmt.Sscanf(string(b), "kvtier data folder, format %d,", &v); err != nil || string(b) != formatLine(v) {
		return true, fmt.Errorf("%s is damaged or not a kvtier file: restore it: %w", path, tiers.ErrCorrupt)
	}
	if v != folderFormat {
		return true, fmt.Errorf("data folder %s has format %d, this build reads %d: use the kvtierd that wrote it, or another folder: %w",
			dir, v, folderFormat, tiers.ErrVersion)
	}
	return true, nil
}

// quiet passes on what Pebble has to say at debug level, and its errors.
type quiet struct{ log *slog.Logger }

func (q quiet) Infof(f string, a ...any)  { q.log.Debug("catalogue: " + fmt.Sprintf(f, a...)) }
func (q quiet) Errorf(f string, a ...any) { q.log.Error("catalogue: " + fmt.Sprintf(f, a...)) }

// Fatalf is called when Pebble cannot go on. It must not return.
func (q quiet) Fatalf(f string, a ...any) {
	panic("catalogue: " + fmt.Sprintf(f, a...))
}

func openCatalogue(fsys vfs.FS, dir string, readOnly bool, log *slog.Logger) (db *pebble.DB, err error) {
	cache := pebble.NewCache(8 << 20)
	defer cache.Unref()
	// Damaged metadata can make Pebble panic: that, too, is a clear error.
	defer func() {
		if r := recover(); r != nil {
			db, err = nil, fmt.Errorf("open the catalogue: %w: %v; %s", tiers.ErrCorrupt, r, whatToDo)
		}
	}()
	db, err = pebble.Open(dir, &pebble.Options{
		FS: fsys, ReadOnly: readOnly, Cache: cache, MemTableSize: 4 << 20, Logger: quiet{log}, FormatMajorVersion: pebble.FormatNewest,
		// By default this is fatal. Whoever reads the damaged block is told; the rest goes on.
		EventListener: &pebble.EventListener{DataCorruption: func(i pebble.DataCorruptionInfo) {
			log.Error("the catalogue is damaged", "file", i.Path, "err", i.Details)
		}},
	})
	if err != nil {
		return nil, catalogueError("open the catalogue (if its files are damaged: "+whatToDo+")", err)
	}
	return db, nil
}

const whatToDo = "restore the data folder from a copy, or start with another one"

// catalogueError puts Pebble's errors into this project's words.
func catalogueError(what string, err error) error {
	switch {
	case err == nil:
		return nil
	case pebble.IsCorruptionError(err):
		return fmt.Errorf("%s: %w: %w; %s", what, tiers.ErrCorrupt, err, whatToDo)
	case errors.Is(err, syscall.ENOSPC):
		return fmt.Errorf("%s: %w: %w", what, tiers.ErrFull, err)
	}
	return fmt.Errorf("%s: %w", what, err)
}

func recordKey(k Kind, key []byte) []byte { return append([]byte{byte(k)}, key...) }

// Every value ends with a checksum over key and value: Pebble checks blocks,
// this checks that a value belongs to its key.
func sealValue(key, value []byte) []byte {
	sum := crc32.Update(crc32.Checksum(key, castagnoli), castagnoli, value)
	return append(value[:len(value):len(value)], byte(sum), byte(sum>>8), byte(sum>>16), byte(sum>>24))
}

func openValue(key, b []byte) ([]byte, error) {
	if len(b) >= 4 {
		if v := b[:len(b)-4]; string(sealValue(key, v)) == string(b) {
			return v, nil
		}
	}
	return nil, fmt.Errorf("catalogue: record %q: %w; %s", key, tiers.ErrCorrupt, whatToDo)
}

// Records calls fn for every record of a kind, in the order of keys. Key and
// value are only valid during the call.
func (s *Store) Records(k Kind, fn func(key, value []byte) error) error {
	return eachRecord(s.db, k, func(key, value []byte, err error) error {
		if err != nil {
			return err
		}
		return fn(key, value)
	})
}

// eachRecord is Records that also hands out records that do not check, with why.
func eachRecord(db *pebble.DB, k Kind, fn func(key, value []byte, err error) error) error {
	it, err := db.NewIter(&pebble.IterOptions{LowerBound: []byte{byte(k)}, UpperBound: []byte{byte(k) + 1}})
	if err != nil {
		return catalogueError("read the catalogue", err)
	}
	defer it.Close()
	for it.First(); it.Valid(); it.Next() {
		v, err := it.ValueAndErr()
		if err != nil {
			return catalogueError("read the catalogue", err)
		}
		v, err = openValue(it.Key(), v)
		if err := fn(it.Key()[1:], v, err); err != nil {
			return err
		}
	}
	return catalogueError("read the catalogue", it.Error())
}

// A segment's record is its location, then its header.
func segmentRecord(h *tiers.Header, loc nvme.Location) []byte {
	b, _ := loc.MarshalBinary() // it cannot fail
	return append(b, h.Marshal()...)
}

func parseSegment(key, value []byte) (*tiers.Header, nvme.Location, error) {
	var loc nvme.Location
	if len(value) < nvme.LocationSize {
		return nil, loc, fmt.Errorf("catalogue: segment record: %w", tiers.ErrCorrupt)
	}
	if err := loc.UnmarshalBinary(value[:nvme.LocationSize]); err != nil {
		return nil, loc, err
	}
	h, err := tiers.UnmarshalHeader(value[nvme.LocationSize:])
	if err != nil {
		return nil, loc, err
	}
	if string(h.ID[:]) != string(key) {
		return nil, loc, fmt.Errorf("catalogue: segment %v under another's key: %w", h.ID, tiers.ErrCorrupt)
	}
	return h, loc, seal.Check(h) // refuses pieces that cannot be what the counts say
}

func containsID(err error, id tiers.ID) bool { return strings.Contains(err.Error(), id.String()) }

// Batch is a change that is committed as one: segments that come and go, and
// records of spans and sequences. Not for concurrent use.
type Batch struct {
	s       *Store
	b       *pebble.Batch
	put     []put
	low     []*tiers.Header // of which low planes are dropped
	dropped []dropped
	kept    map[tiers.ID]*gpu.Kept // what a GPU keeps of segments that it made
	grows   bool                   // it sets a record
	done    bool
}

type put struct {
	h     *tiers.Header
	parts [tiers.NumParts][]byte
}

type dropped struct {
	id     tiers.ID
	planes tiers.PlaneSet
}

// NewBatch begins a change. Close it in any case.
func (s *Store) NewBatch() *Batch {
	return &Batch{s: s, b: s.db.NewBatch(), kept: map[tiers.ID]*gpu.Kept{}}
}

// PutSegment writes a segment to the NVMe tier; it exists once the batch is
// committed. ErrFull says that the tier's limit, or the disk, leaves no room.
func (b *Batch) PutSegment(ctx context.Context, h *tiers.Header, parts [tiers.NumParts][]byte) error {
	if _, err := b.s.Header(h.ID); err == nil {
		// The same bytes are there already. The caller is about to give up its
		// rows, so they had better be whole.
		if err := b.s.Verify(ctx, h); err != nil {
			return fmt.Errorf("stored before, and damaged since (delete the sequences that use it): %w", err)
		}
		return nil
	}
	if err := b.s.nvme.Put(ctx, h, h.Pieces(parts)); err != nil {
		return err
	}
	b.put = append(b.put, put{h, parts})
	return nil
}

// Has says whether a segment exists, or will once the batch is committed.
func (b *Batch) Has(id tiers.ID) bool {
	for _, p := range b.put {
		if p.h.ID == id {
			return true
		}
	}
	_, err := b.s.Header(id)
	return err == nil
}

// DropSegment removes a segment.
func (b *Batch) DropSegment(id tiers.ID) error {
	key := recordKey(kindSegment, id[:])
	b.dropped = append(b.dropped, dropped{id, tiers.AllPlanes})
	return b.b.Delete(key, nil)
}

// DropLow removes the low planes of a segment, if it has any when the batch is committed: one that was dropped meanwhile stays so.
func (b *Batch) DropLow(h *tiers.Header) {
	b.low = append(b.low, h)
	b.grows = true
}

func (b *Batch) setSegment(h *tiers.Header, loc nvme.Location) error {
	b.grows = true
	key := recordKey(kindSegment, h.ID[:])
	return b.b.Set(key, sealValue(key, segmentRecord(h, loc)), nil)
}

// Set writes a record; Delete removes one.
func (b *Batch) Set(k Kind, key, value []byte) error {
	b.grows = true
	full := recordKey(k, key)
	return b.b.Set(full, sealValue(full, value), nil)
}

// Delete removes a record.
func (b *Batch) Delete(k Kind, key []byte) error { return b.b.Delete(recordKey(k, key), nil) }

// Commit makes the change durable: first the bytes of segments, then the
// catalogue. Room that the change frees is free only after that.
func (b *Batch) Commit(ctx context.Context) error {
	if err := b.room(); err != nil {
		return err
	}
	if len(b.put) > 0 {
		if err := b.s.nvme.Sync(ctx); err != nil {
			return err
		}
	}
	if err := b.commit(); err != nil {
		return err
	}
	b.warm(ctx)
	return nil
}

// commit commits what is stored where now. Changes come one after the other: no record may say where a segment lies that another one drops.
func (b *Batch) commit() error {
	b.s.committing.Lock()
	defer b.s.committing.Unlock()
	for _, p := range b.put {
		if err := b.recordPut(p); err != nil {
			return err
		}
	}
	for _, h := range b.low {
		if err := b.recordWithoutLow(h); err != nil {
			return err
		}
	}
	if err := b.s.ledger.commit(b.b); err != nil {
		return catalogueError("commit to the catalogue", err)
	}
	b.done = true
	b.s.mu.Lock()
	for _, p := range b.put {
		b.s.mu.headers[p.h.ID] = p.h
	}
	for _, d := range b.dropped {
		if d.planes == tiers.AllPlanes {
			delete(b.s.mu.headers, d.id)
			delete(b.s.mu.damaged, d.id)
		}
	}
	b.s.mu.Unlock()
	// The change stands. Room that could not be given back (the tier is closing)
	// is free after the next start.
	for _, d := range b.dropped {
		if err := errors.Join(b.s.dropOnDevice(d.id, d.planes), b.s.ram.Drop(d.id, d.planes), b.s.nvme.Drop(d.id, d.planes)); err != nil {
			b.s.log.Warn("free a segment's room", "segment", d.id, "err", err)
		}
	}
	return nil
}

// ErrVanished says that a segment that was put went before it was committed, with another of the same bytes: put it again.
var ErrVanished = errors.New("it was removed before it was committed")

// recordPut says where a segment lies that was put. All of it has to be there: another deletion of the same bytes may have taken it.
func (b *Batch) recordPut(p put) error {
	loc, ok := b.s.nvme.Locate(p.h.ID)
	for part, bytes := range p.parts {
		ok = ok && (len(bytes) == 0 || int(loc.Parts[part].Blocks) == p.h.Blocks(tiers.Part(part)))
	}
	if !ok {
		return fmt.Errorf("segment %v: %w", p.h.ID, ErrVanished)
	}
	return b.setSegment(p.h, loc)
}

// recordWithoutLow says of a segment that is still there that it has no low planes any more.
func (b *Batch) recordWithoutLow(h *tiers.Header) error {
	if _, err := b.s.Header(h.ID); err != nil {
		return nil // it went as a whole
	}
	loc, ok := b.s.nvme.Locate(h.ID)
	if !ok || loc.Parts[tiers.PartLow].Blocks == 0 {
		return nil
	}
	loc.Parts[tiers.PartLow] = nvme.Run{}
	b.dropped = append(b.dropped, dropped{h.ID, tiers.LowPlanes})
	return b.setSegment(h, loc)
}

// What must be free in the file system for a change that sets records, and for
// one that only removes some. To Pebble a full disk is fatal.
const (
	roomToGrow   = 8 << 20
	roomToRemove = 1 << 20
)

// room refuses a change while the file system is full.
func (b *Batch) room() error {
	free, err := b.s.fs.Free(b.s.dir)
	if err != nil {
		return fmt.Errorf("data folder: %w", err)
	}
	need := int64(roomToRemove)
	if b.grows {
		need = roomToGrow
	}
	if free < need {
		return fmt.Errorf("the file system of %s has %d bytes left, the catalogue needs %d: %w", b.s.dir, free, need, tiers.ErrFull)
	}
	return nil
}

// everyQuery are the planes that nearly every query reads some of, of nearly every segment.
const everyQuery = tiers.PlaneSet(1<<tiers.PlanePages | 1<<tiers.PlaneMap | 1<<tiers.PlaneSteps | 1<<tiers.PlaneK1 |
	1<<tiers.PlaneK2 | 1<<tiers.PlaneSinks | 1<<tiers.PlaneWindow)

// warm brings new segments into RAM: what every query reads in place of what earns
// its room less, all else as far as there is free room. They are in memory now, and are often asked next.
func (b *Batch) warm(ctx context.Context) {
	for _, p := range b.put {
		if d := b.s.device; d != nil && !d.adopt(p.h.ID, b.kept[p.h.ID]) {
			d.want(p.h)
		}
		full := false
		for _, piece := range p.h.Pieces(p.parts) {
			switch {
			case everyQuery.Has(piece.Plane):
				_ = b.s.ram.Prime(ctx, p.h, []tiers.Piece{piece}) // it stays below then
			case !full:
				full = b.s.ram.Offer(ctx, p.h, []tiers.Piece{piece}) != nil
			}
		}
	}
}

// Close abandons what was not committed.
func (b *Batch) Close() error {
	errs := []error{b.b.Close()}
	for _, k := range b.kept {
		k.Discard() // it was not committed
	}
	if !b.done {
		for _, p := range b.put {
			errs = append(errs, b.s.nvme.Drop(p.h.ID, tiers.AllPlanes))
		}
	}
	return errors.Join(errs...)
}
