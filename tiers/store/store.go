package store

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"path/filepath"
	"sync"
	"time"

	"github.com/cockroachdb/pebble/v2"

	"kvtier/tiers"
	"kvtier/tiers/files"
	"kvtier/tiers/nvme"
	"kvtier/tiers/ram"
)

// Options of a store.
type Options struct {
	RAMBytes  int64 // hard limit of what lies in RAM: the RAM tier, and blocks of the NVMe tier that were read by ranges
	DiskBytes int64 // hard limit of the NVMe tier
	// GPUBytes is the hard limit of what lies in the memory of a GPU; 0: none, gpu.Auto: what is free of it, if there is one.
	GPUBytes  int64
	GPUDevice int // its number
	// GPUPatience is how long an answer of the GPU is waited for; 0: 10 seconds.
	GPUPatience time.Duration
	// NoPrefetch leaves segments where they are until they are asked for.
	NoPrefetch bool
	// PromoteBytes is how many bytes a second are read from NVMe to be brought into RAM because
	// queries read them there; 0: as many as the disk gives. What every query reads comes up without a limit after a start.
	PromoteBytes int64
	FS           files.FS // nil is the operating system's
	Logger       *slog.Logger
}

// Store holds sealed segments. Safe for concurrent use.
type Store struct {
	dir    string
	fs     files.FS
	lock   io.Closer
	db     *pebble.DB
	ram    *ram.Tier
	nvme   *nvme.Tier
	log    *slog.Logger
	up     *promoter
	device *device // nil: none

	ledger     *ledger
	committing sync.Mutex // taken before ledger's lock, mu and the tiers'

	ramBytes int64 // Options.RAMBytes

	mu struct {
		sync.RWMutex
		headers map[tiers.ID]*tiers.Header
		damaged map[tiers.ID]string // segments whose bytes failed a check, and how
	}
}

// Open opens the data folder dir, or makes it. Only one process may have it open.
func Open(ctx context.Context, dir string, o Options) (s *Store, err error) {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.FS == nil {
		o.FS = files.OS
	}
	if err := o.FS.MkdirAll(dir); err != nil {
		return nil, fmt.Errorf("data folder: %w", err)
	}
	s = &Store{dir: dir, fs: o.FS, log: o.Logger, ramBytes: o.RAMBytes}
	s.mu.headers, s.mu.damaged = map[tiers.ID]*tiers.Header{}, map[tiers.ID]string{}
	defer func(s *Store) {
		if err != nil {
			_ = s.closeFiles() // what was opened so far; err says more
		}
	}(s)
	if s.lock, err = lockFolder(o.FS, dir); err != nil {
		return nil, err
	}
	if err = checkFormat(o.FS, dir); err != nil {
		return nil, err
	}
	// A daemon that was killed may have left names that are not durable yet.
	if err = o.FS.SyncDir(dir); err != nil {
		return nil, fmt.Errorf("data folder: %w", err)
	}
	s.syncAbove(dir)
	blocks := blockBytes(o.RAMBytes)
	if s.ram, err = ram.New(ram.Options{Bytes: o.RAMBytes - blocks, Unmapping: s.unmapping}); err != nil {
		return nil, err
	}
	if s.nvme, err = nvme.Open(filepath.Join(dir, segmentsDir), nvme.Options{Bytes: o.DiskBytes, CacheBytes: blocks, FS: o.FS}); err != nil {
		return nil, err
	}
	once := newReadOnce(o.FS.Pebble())
	defer once.forget()
	if s.ledger, err = openLedger(o.FS, once, dir, o.Logger); err != nil {
		return nil, err
	}
	if s.db, err = openCatalogue(once, filepath.Join(dir, catalogueDir), false, o.Logger); err != nil {
		return nil, err
	}
	if err = s.recover(ctx); err != nil {
		return nil, err
	}
	if err = s.openDevice(o); err != nil {
		return nil, err
	}
	s.up = newPromoter(s, o.PromoteBytes)
	if s.device != nil {
		s.up.background(s.rise)
	}
	s.up.background(s.bringUpFirst)
	return s, nil
}

// syncAbove makes the folder's own name durable, and those of what it lies in:
// a daemon that was killed may have made them just before. Folders further up
// may be others', who do not let them be read; those were not made by a daemon.
func (s *Store) syncAbove(dir string) {
	for up := filepath.Dir(dir); up != dir; dir, up = up, filepath.Dir(up) {
		if err := s.fs.SyncDir(up); err != nil {
			s.log.Debug("sync a folder above the data folder", "folder", up, "err", err)
			return
		}
	}
}

// blockBytes is how much of the limit of RAM is for blocks: a fifth, if that is worth it.
func blockBytes(limit int64) int64 {
	const least = 256 << 20
	if limit < least {
		return 0
	}
	return limit / 5
}

// Dir returns the data folder.
func (s *Store) Dir() string { return s.dir }

// lockFolder keeps a second daemon out.
func lockFolder(fsys files.FS, dir string) (io.Closer, error) {
	lock, err := fsys.Lock(filepath.Join(dir, lockFile))
	if errors.Is(err, files.ErrLocked) {
		return nil, fmt.Errorf("data folder %s is in use by another daemon or a running 'kvtier check': stop it, or choose another folder with --data", dir)
	}
	if err != nil {
		return nil, fmt.Errorf("data folder: %w", err)
	}
	return lock, nil
}

// recover takes up the segments that the catalogue names.
func (s *Store) recover(ctx context.Context) error {
	return s.Records(kindSegment, func(key, value []byte) error {
		if err := ctx.Err(); err != nil {
			return err
		}
		h, loc, err := parseSegment(key, value)
		if err != nil {
			return err
		}
		s.mu.headers[h.ID] = h
		if err := s.nvme.Restore(h.ID, loc); err != nil {
			s.log.Error("a segment's bytes are missing", "segment", h.ID, "err", err)
			s.mu.damaged[h.ID] = err.Error()
		}
		return nil
	})
}

// Header returns the header of a segment; ErrNotFound if there is none.
func (s *Store) Header(id tiers.ID) (*tiers.Header, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if h := s.mu.headers[id]; h != nil {
		return h, nil
	}
	return nil, fmt.Errorf("segment %v: %w", id, tiers.ErrNotFound)
}

// Pin pins pieces wherever they lie. Every pin returned is held; if one cannot
// be had the error says why and none is.
func (s *Store) Pin(ctx context.Context, reqs []tiers.Request) ([]tiers.Pin, tiers.Moved, error) {
	return s.pin(ctx, reqs, nil)
}

// Hasty is a store whose reader waits for NVMe no longer than its patience lasts: ranges that have not come by then are nil.
type Hasty struct {
	s *Store
	p *tiers.Patience
}

// Within returns the store for readers that share p.
func (s *Store) Within(p *tiers.Patience) Hasty { return Hasty{s, p} }

// Pin is Store.Pin, but for ranges that are late. See tiers.Pin.Late.
func (h Hasty) Pin(ctx context.Context, reqs []tiers.Request) ([]tiers.Pin, tiers.Moved, error) {
	return h.s.pin(ctx, reqs, h.p)
}

func (s *Store) pin(ctx context.Context, reqs []tiers.Request, p *tiers.Patience) ([]tiers.Pin, tiers.Moved, error) {
	var moved tiers.Moved
	pins, err := s.ram.Pin(ctx, reqs)
	if err != nil {
		return nil, moved, err
	}
	var below []tiers.Request
	var at []int
	for i := range pins {
		if pins[i].Held() {
			moved.RAM += int64(pins[i].Transferred)
			continue
		}
		below, at = append(below, reqs[i]), append(at, i)
	}
	if len(below) == 0 {
		return pins, moved, nil
	}
	got, err := s.below(ctx, below, p)
	if err != nil {
		releaseAll(pins)
		s.noteDamage(below, err)
		return nil, moved, fmt.Errorf("read from NVMe: %w", err)
	}
	for i := range got {
		pins[at[i]] = got[i]
		if !got[i].Held() {
			err = s.missing(below[i])
		}
		moved.NVMe += int64(got[i].Transferred)
		moved.RAM += int64(got[i].Cached)
	}
	if err != nil {
		releaseAll(pins)
		return nil, moved, err
	}
	for i, a := range at {
		pins[a] = s.up.watch(below[i], got[i])
	}
	return pins, moved, nil
}

// below pins pieces in the NVMe tier.
func (s *Store) below(ctx context.Context, reqs []tiers.Request, p *tiers.Patience) ([]tiers.Pin, error) {
	if p == nil {
		return s.nvme.Pin(ctx, reqs)
	}
	return s.nvme.PinWithin(ctx, reqs, p, func(err error) { // what failed when nobody waited for it
		s.noteDamage(reqs, err)
		if !errors.Is(err, tiers.ErrCorrupt) && !errors.Is(err, tiers.ErrClosed) {
			s.log.Warn("a late read from NVMe failed", "err", err)
		}
	})
}

// missing says why a piece cannot be had.
func (s *Store) missing(r tiers.Request) error {
	why := tiers.ErrNotFound
	if s.Damage(r.Header.ID) != "" {
		why = tiers.ErrCorrupt
	}
	return fmt.Errorf("segment %v: plane %v of head %d is not stored: %w", r.Header.ID, r.Plane, r.Head, why)
}

func releaseAll(pins []tiers.Pin) {
	for i := range pins {
		pins[i].Release(0)
	}
}

// noteDamage remembers which segments failed a check. The error names one of
// them; only that one is marked.
func (s *Store) noteDamage(reqs []tiers.Request, err error) {
	if !errors.Is(err, tiers.ErrCorrupt) {
		return
	}
	s.log.Error("stored bytes are damaged", "err", err)
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, r := range reqs {
		if containsID(err, r.Header.ID) {
			s.mu.damaged[r.Header.ID] = err.Error()
		}
	}
}

// Damage says how a segment was found damaged; empty if it was not.
func (s *Store) Damage(id tiers.ID) string {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.mu.damaged[id]
}

// AnyDamage says whether any segment was found damaged.
func (s *Store) AnyDamage() bool {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return len(s.mu.damaged) > 0
}

// Hold keeps a segment's pieces in RAM once they are there, or lets them go, also
// those of a segment that was removed. It brings up those of planes.
func (s *Store) Hold(id tiers.ID, held bool, planes tiers.PlaneSet) (bytes int64, err error) {
	if !held {
		return 0, s.ram.Hold(id, false)
	}
	if _, err := s.Header(id); err != nil {
		return 0, err
	}
	if err := s.ram.Hold(id, true); err != nil {
		return 0, err
	}
	// A removal that was through with RAM before does not end the hold.
	h, err := s.Header(id)
	if err != nil {
		return 0, errors.Join(err, s.ram.Hold(id, false))
	}
	return s.BringUp(h, planes), nil
}

// BringUp asks for planes of a segment to be brought into RAM, and returns the
// bytes that are not there yet.
func (s *Store) BringUp(h *tiers.Header, planes tiers.PlaneSet) (bytes int64) {
	for head := range h.Heads {
		for p := tiers.Plane(0); p < tiers.NumPlanes; p++ {
			if _, n, ok := h.Piece(head, p); ok && planes.Has(p) && !s.ram.Resident(h.ID, head, p) {
				bytes += int64(n)
				s.up.want(tiers.Request{Header: h, Head: head, Plane: p})
			}
		}
	}
	return bytes
}

// Resident says whether a piece lies in RAM.
func (s *Store) Resident(id tiers.ID, head int, p tiers.Plane) bool {
	return s.ram.Resident(id, head, p)
}

// InRAM says whether all pieces lie in RAM that a segment has of these planes.
func (s *Store) InRAM(h *tiers.Header, planes tiers.PlaneSet) bool { return s.ram.Holds(h, planes) }

// Usage returns what RAM and NVMe hold. RAM's bytes include blocks of the NVMe tier.
func (s *Store) Usage() (ram, nvme tiers.Usage) {
	ram, nvme = s.ram.Usage(), s.nvme.Usage()
	ram.BytesUsed += s.nvme.CacheBytes()
	ram.BytesLimit = s.ramBytes
	return ram, nvme
}

// HasLow says whether the low planes of a segment are stored.
func (s *Store) HasLow(id tiers.ID) bool {
	loc, ok := s.nvme.Locate(id)
	return ok && loc.Parts[tiers.PartLow].Blocks > 0
}

// Bytes returns how many bytes a segment takes on disk, header and location included.
func (s *Store) Bytes(h *tiers.Header) int64 {
	n := h.Bytes(tiers.PartMain) + int64(len(h.Marshal())) + int64(nvme.LocationSize)
	if s.HasLow(h.ID) {
		n += h.Bytes(tiers.PartLow)
	}
	return n
}

// Verify reads every stored byte of a segment from NVMe and checks it.
func (s *Store) Verify(ctx context.Context, h *tiers.Header) error {
	var reqs []tiers.Request
	for head := range h.Heads {
		for p := tiers.Plane(0); p < tiers.NumPlanes; p++ {
			if _, _, ok := h.Piece(head, p); ok && (p.Part() == tiers.PartMain || s.HasLow(h.ID)) {
				reqs = append(reqs, tiers.Request{Header: h, Head: head, Plane: p})
			}
		}
	}
	pins, _, err := s.Disk().Pin(ctx, reqs)
	releaseAll(pins)
	return err
}

// Close stops the background work and closes the files.
func (s *Store) Close() error {
	if s.up != nil {
		s.up.close()
	}
	return s.closeFiles()
}

func (s *Store) closeFiles() error {
	errs := []error{s.ledger.close(), s.closeDevice()}
	if s.db != nil {
		errs = append(errs, s.db.Close())
	}
	if s.nvme != nil {
		errs = append(errs, s.nvme.Close())
	}
	if s.ram != nil {
		errs = append(errs, s.ram.Close())
	}
	if s.lock != nil {
		errs = append(errs, s.lock.Close())
	}
	return errors.Join(errs...)
}
