package nvme

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"

	"kvtier/tiers"
	"kvtier/tiers/files"
)

// Options configures a tier.
type Options struct {
	// Bytes is the hard limit of all extents together. It must be given.
	Bytes int64
	// ExtentBytes is the size of an extent; 0 is 256 MiB. Where the limit or the
	// disk has less left, an extent is smaller.
	ExtentBytes int64
	// Depth is how many reads are under way at once, for all callers together; 0 is 32.
	Depth int
	// CacheBytes is the hard limit of memory for blocks that were read by ranges; 0: none.
	CacheBytes int64
	// LateReads is how many reads that nobody waits for any more may be left to do before PinWithin begins no others; 0 is 512.
	LateReads int
	// FS is where the extents lie; nil is the operating system's.
	FS files.FS
}

// Tier keeps parts of segments on disk. It implements tiers.Tier.
type Tier struct {
	dir    string
	fs     files.FS
	o      Options
	slots  chan struct{} // a read holds one
	queues chan *queue   // that are not in use
	ops    sync.WaitGroup
	late   late

	closing context.Context // ends with the tier: reads that nobody waits for are not begun then
	stop    context.CancelFunc

	mu struct {
		sync.Mutex
		segments map[tiers.ID]*segment
		extents  map[uint32]*extent
		order    []*extent // by number: first fit
		next     uint32    // number of the next extent
		files    int64     // bytes of all extents
		used     int64     // bytes of all runs
		parts    int64
		closed   bool
	}

	// grow serialises the making and removing of extents, syncing that of Sync.
	// They are held during I/O, and nothing that Pin needs waits for them.
	grow, syncing sync.Mutex

	cache  *cache        // or nil
	number atomic.Uint64 // of the newest part

	hits, misses, read, written, corruptions, lateReads atomic.Int64
}

// segment is what the tier holds of one segment.
type segment struct {
	parts  [tiers.NumParts]*stored
	hidden tiers.PlaneSet // dropped while others of their part stayed
}

// stored is a part on disk. Tier.mu guards refs and dead.
type stored struct {
	number uint64 // no other of the tier has it
	run    Run
	extent *extent
	refs   int  // reads under way
	dead   bool // dropped: the run is free with the last read
}

// Open opens the extents of a directory, all of them free. The caller
// Restores what is in use before the first Put.
func Open(dir string, o Options) (*Tier, error) {
	if o.Bytes < tiers.BlockSize {
		return nil, fmt.Errorf("nvme: a limit of %d bytes holds nothing", o.Bytes)
	}
	o.ExtentBytes = cmp.Or(o.ExtentBytes, 256<<20) / tiers.BlockSize * tiers.BlockSize
	o.Depth = cmp.Or(o.Depth, 32)
	o.LateReads = cmp.Or(o.LateReads, 512)
	if o.ExtentBytes <= 0 || o.Depth < 0 || o.LateReads < 0 {
		return nil, errors.New("nvme: extent size, depth or number of late reads out of range")
	}
	if o.FS == nil {
		o.FS = files.OS
	}
	t := &Tier{dir: dir, fs: o.FS, o: o, slots: make(chan struct{}, o.Depth), queues: make(chan *queue, o.Depth), cache: newCache(o.CacheBytes)}
	t.closing, t.stop = context.WithCancel(context.Background())
	t.late.blocks = map[blockKey]*batch{}
	t.mu.segments = map[tiers.ID]*segment{}
	t.mu.extents = map[uint32]*extent{}
	t.mu.next = 1
	if err := t.fs.MkdirAll(dir); err != nil {
		return nil, fmt.Errorf("nvme: open %s: %w", dir, err)
	}
	names, err := t.fs.List(dir)
	if err != nil {
		return nil, fmt.Errorf("nvme: open %s: %w", dir, err)
	}
	for _, name := range names {
		number, ok := extentNumber(name)
		if !ok {
			continue
		}
		if err := t.openExtent(number); err != nil {
			return nil, errors.Join(fmt.Errorf("nvme: open %s: %w", name, err), t.Close())
		}
	}
	return t, nil
}

// openExtent is used before the tier is shared.
func (t *Tier) openExtent(number uint32) error {
	f, err := t.fs.Open(filepath.Join(t.dir, ExtentName(number)), files.Direct)
	if err != nil {
		return err
	}
	size, err := f.Size()
	if err != nil {
		return errors.Join(err, f.Close())
	}
	t.addLocked(newExtent(number, f, size))
	return nil
}

func (t *Tier) addLocked(x *extent) {
	t.mu.extents[x.number] = x
	i, _ := slices.BinarySearchFunc(t.mu.order, x.number, func(x *extent, n uint32) int { return cmp.Compare(x.number, n) })
	t.mu.order = slices.Insert(t.mu.order, i, x)
	t.mu.next = max(t.mu.next, x.number+1)
	t.mu.files += x.bytes()
}

// Direct says whether all extents are read with direct I/O. With no extents it is false.
func (t *Tier) Direct() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, x := range t.mu.order {
		if !x.file.Direct() {
			return false
		}
	}
	return len(t.mu.order) > 0
}

// Usage says what the tier holds now and did so far. BytesUsed counts blocks
// that are taken; the files have up to BytesLimit. Pieces counts parts.
func (t *Tier) Usage() tiers.Usage {
	t.mu.Lock()
	defer t.mu.Unlock()
	return tiers.Usage{
		BytesUsed: t.mu.used, BytesLimit: t.o.Bytes,
		Pieces: t.mu.parts,
		Hits:   t.hits.Load(), Misses: t.misses.Load(),
		BytesRead: t.read.Load(), BytesWritten: t.written.Load(),
		Corruptions: t.corruptions.Load(), LateReads: t.lateReads.Load(),
	}
}

// FileBytes is what the extents take on the disk, whether something lies there or not.
func (t *Tier) FileBytes() int64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.mu.files
}

// CacheBytes is the memory that blocks take.
func (t *Tier) CacheBytes() int64 { return t.cache.bytes() }

// begin says that an operation uses the files. End it with t.ops.Done.
func (t *Tier) begin() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.mu.closed {
		return tiers.ErrClosed
	}
	t.ops.Add(1)
	return nil
}

// Close waits for operations under way and closes the files. Pins stay valid.
func (t *Tier) Close() error {
	t.mu.Lock()
	if t.mu.closed {
		t.mu.Unlock()
		return nil
	}
	t.mu.closed = true
	t.mu.Unlock()
	t.stop()
	t.ops.Wait()
	var errs []error
	for _, x := range t.mu.order { // nobody else is left
		errs = append(errs, x.file.Close())
	}
	t.cache.close()
	close(t.queues)
	for q := range t.queues {
		errs = append(errs, q.close())
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("nvme: close: %w", err)
	}
	return nil
}
