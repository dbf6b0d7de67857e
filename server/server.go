package server

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/codes"

	"kvtier/tiers"
	"kvtier/tiers/files"
	"kvtier/tiers/store"
)

// Options of a server. The zero value of a field is its default.
type Options struct {
	DataDir     string        // made if missing, mode 0700
	RAMBytes    int64         // RAM tier's limit; 1 GiB
	DiskBytes   int64         // NVMe tier's limit; 20 GiB
	GPUBytes    int64         // GPU tier's limit; none. gpu.Auto: what a GPU has free, if there is one
	GPUDevice   int           // number of the GPU
	GPUPatience time.Duration // how long an answer of it is waited for, which takes milliseconds; 10 s
	// GPUChooseAbove: in mode budget a GPU that holds more than so many tokens of a layer reads a part of them; 0: it reads all.
	GPUChooseAbove int
	NoPrefetch     bool          // segments come up to a GPU when they were asked for, not before
	SealOnHost     bool          // segments are made on the host also where there is a GPU
	TailBytes      int64         // unquantised rows in RAM; 2 GiB
	ReadAllTokens  int           // contexts up to this length are read whole; 8,192. Negative: none
	DefaultShare   float32       // budget of a call that names none; 0.2
	ReadAllInRAM   float32       // least share of a budget that is answered from everything where all of it lies in RAM; 0: none
	ByPage         bool          // other budgets are answered by page, not line by line
	PromoteBytes   int64         // bytes a second that are brought from NVMe into RAM at most; no limit
	ReadWait       time.Duration // longest wait for reads of keys and values of a call that names none; none: as long as it takes
	AuditShare     float32       // share of sparse calls that are audited; 0.01. Negative: none
	GPUAuditShare  float32       // share of the calls that a GPU took part in that are audited; 0.01. Negative: none
	Steer          bool          // divide a share among layers and KV heads by what their queries showed
	SyncInterval   time.Duration // how often logs are made power-safe; 20 ms
	Cores          int           // for work in the background, and items of a call that are answered at the same time; GOMAXPROCS
	RecoverAtOnce  int           // logs of open tails that are read at the same time at the start; 8
	FS             files.FS      // where the data folder is; the operating system's
	Logger         *slog.Logger
	Version        string
}

func (o *Options) defaults() error {
	set := func(p *int64, v int64) {
		if *p == 0 {
			*p = v
		}
	}
	set(&o.RAMBytes, 1<<30)
	set(&o.DiskBytes, 20<<30)
	set(&o.TailBytes, 2<<30)
	if o.ReadAllTokens == 0 {
		o.ReadAllTokens = 8192
	}
	o.ReadAllTokens = max(0, o.ReadAllTokens)
	if o.DefaultShare == 0 {
		o.DefaultShare = .2
	}
	if o.AuditShare == 0 {
		o.AuditShare = .01
	}
	if o.GPUAuditShare == 0 {
		o.GPUAuditShare = .01
	}
	if o.SyncInterval == 0 {
		o.SyncInterval = 20 * time.Millisecond
	}
	if o.Cores == 0 {
		o.Cores = runtime.GOMAXPROCS(0)
	}
	if o.RecoverAtOnce == 0 {
		o.RecoverAtOnce = 8
	}
	if o.FS == nil {
		o.FS = files.OS
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	switch {
	case o.DataDir == "":
		return errors.New("no data folder given")
	case o.RAMBytes < 0 || o.DiskBytes < 0 || o.TailBytes < 0:
		return errors.New("a byte limit is negative")
	case !(o.DefaultShare > 0 && o.DefaultShare <= 1):
		return fmt.Errorf("the default share is %v, not in (0, 1]", o.DefaultShare)
	case !(o.ReadAllInRAM >= 0 && o.ReadAllInRAM <= 1):
		return fmt.Errorf("budgets from %v on are to be answered from everything in RAM: it must be from 0 to 1", o.ReadAllInRAM)
	case o.PromoteBytes < 0:
		return fmt.Errorf("%d bytes a second are to be brought into RAM: less than none", o.PromoteBytes)
	case o.Cores < 0:
		return fmt.Errorf("%d cores: less than one", o.Cores)
	case o.RecoverAtOnce < 0:
		return fmt.Errorf("%d logs are to be read at the same time: less than one", o.RecoverAtOnce)
	case o.ReadWait < 0:
		return fmt.Errorf("the longest wait for reads is %v, less than none", o.ReadWait)
	case o.AuditShare > 1:
		return fmt.Errorf("the audit share is %v, more than 1", o.AuditShare)
	case o.GPUAuditShare > 1:
		return fmt.Errorf("the audit share of the GPU is %v, more than 1", o.GPUAuditShare)
	}
	return nil
}

// Server holds sequences in one data folder.
type Server struct {
	opt         Options
	log         *slog.Logger
	key         []byte
	store       *store.Store
	spans       *spanTable
	names       *nameIndex
	leases      *leaseTable
	sealer      *sealer
	syncer      *syncer
	auditor     *auditor
	calibration *calibration
	metrics     *metrics
	started     time.Time
	tail        atomic.Int64 // bytes of rows in RAM
	largeTail   int64        // from which a sequence's appends wait for its sealing; tests lower it
	pins        pinTable

	// commits serialises what adds and removes spans and planes of segments in the catalogue. Taken
	// after a sequence's write lock.
	commits sync.Mutex

	mu struct {
		sync.RWMutex
		sequences map[string]*sequence
		handles   map[uint64]*sequence
		next      uint64 // handle
		closed    bool
		conns     map[*fastConn]bool
		closers   []func()
	}
	work sync.WaitGroup // calls in flight, beyond gRPC's own
}

// Open recovers the data folder and starts the background work.
func Open(ctx context.Context, o Options) (srv *Server, err error) {
	if err := o.defaults(); err != nil {
		return nil, err
	}
	srv = &Server{opt: o, log: o.Logger, started: time.Now(), names: newNameIndex(), calibration: newCalibration(), largeTail: largeTail}
	srv.mu.sequences, srv.mu.handles = map[string]*sequence{}, map[uint64]*sequence{}
	srv.mu.conns = map[*fastConn]bool{}
	srv.pins.pins, srv.pins.segments = map[uint64]*pin{}, map[tiers.ID]int{}
	if srv.store, err = store.Open(ctx, o.DataDir, store.Options{RAMBytes: o.RAMBytes, DiskBytes: o.DiskBytes, PromoteBytes: o.PromoteBytes,
		GPUBytes: o.GPUBytes, GPUDevice: o.GPUDevice, GPUPatience: o.GPUPatience, NoPrefetch: o.NoPrefetch, FS: o.FS, Logger: o.Logger}); err != nil {
		return nil, err
	}
	defer func(st *store.Store) { // srv is nil then
		if err != nil {
			_ = st.Close()
		}
	}(srv.store)
	if srv.key, err = tenantKey(o.FS, o.DataDir); err != nil {
		return nil, err
	}
	if err = o.FS.MkdirAll(srv.tailDir()); err != nil {
		return nil, err
	}
	srv.spans = newSpanTable(srv.store)
	srv.metrics = newMetrics(srv)
	if err := srv.calibration.load(o.FS, o.DataDir); err != nil {
		// Only what errors are stated from: audits make it good.
		srv.log.Warn("what audits taught is lost", "error", err)
	}
	srv.leases = newLeaseTable()
	srv.auditor = newAuditor(srv)
	srv.sealer = newSealer(srv)
	srv.syncer = newSyncer(srv, o.SyncInterval)
	if err = srv.recover(ctx); err != nil {
		srv.stopBackground()
		return nil, err
	}
	return srv, nil
}

// tailsDir is where the logs of open tails are in the data folder.
const tailsDir = "tails"

func (srv *Server) tailDir() string { return filepath.Join(srv.opt.DataDir, tailsDir) }

// Metrics returns what /metrics shows.
func (srv *Server) Metrics() prometheus.Gatherer { return srv.metrics.registry }

// Sequences returns how many sequences there are.
func (srv *Server) Sequences() int {
	srv.mu.RLock()
	defer srv.mu.RUnlock()
	return len(srv.mu.sequences)
}

func (srv *Server) stopBackground() {
	srv.leases.close()
	srv.sealer.close()
	srv.auditor.close()
	srv.syncer.close()
}

// Close stops the work, makes logs power-safe and closes the files. Calling it
// again does nothing.
func (srv *Server) Close(ctx context.Context) error {
	srv.mu.Lock()
	if srv.mu.closed {
		srv.mu.Unlock()
		return nil
	}
	srv.mu.closed = true
	closers := srv.mu.closers
	for c := range srv.mu.conns {
		closers = append(closers, c.stop)
	}
	srv.mu.Unlock()
	for _, c := range closers {
		c()
	}
	done := make(chan struct{})
	go func() {
		srv.work.Wait()
		close(done)
	}()
	select {
	case <-done:
	case <-ctx.Done():
		srv.log.Warn("closing with calls in flight")
	}
	srv.stopBackground()
	errs := []error{srv.calibration.save(srv.opt.FS, srv.opt.DataDir)}
	for _, s := range srv.list() {
		s.write.Lock()
		if s.log != nil {
			errs = append(errs, s.log.Close())
		}
		s.write.Unlock()
	}
	return errors.Join(append(errs, srv.store.Close())...)
}

// enter counts a call in flight; it fails once the server is closing.
func (srv *Server) enter() (leave func(), err error) {
	srv.mu.RLock()
	defer srv.mu.RUnlock()
	if srv.mu.closed {
		return nil, fail(codes.Unavailable, ReasonClosing, "the daemon is shutting down")
	}
	srv.work.Add(1)
	return srv.work.Done, nil
}

// list returns all sequences, the oldest handle first.
func (srv *Server) list() []*sequence {
	srv.mu.RLock()
	defer srv.mu.RUnlock()
	return slices.SortedFunc(maps.Values(srv.mu.sequences), byAge)
}

// byAge orders sequences: what is done to many is done in one order, so that
// tests can do it again.
func byAge(a, b *sequence) int { return cmp.Compare(a.handle, b.handle) }

// sequence finds a sequence.
func (srv *Server) sequence(id string) (*sequence, error) {
	srv.mu.RLock()
	defer srv.mu.RUnlock()
	if s := srv.mu.sequences[id]; s != nil {
		return s, nil
	}
	return nil, fail(codes.NotFound, ReasonUnknown, "no sequence %q: list them with 'kvtier ls', or open a new one", id)
}

// byHandle finds a sequence by its number on the fast path.
func (srv *Server) byHandle(h uint64) (*sequence, error) {
	srv.mu.RLock()
	defer srv.mu.RUnlock()
	if s := srv.mu.handles[h]; s != nil {
		return s, nil
	}
	return nil, fail(codes.NotFound, ReasonUnknown, "no sequence with handle %d: handles end with the daemon; open the sequence again", h)
}

// addSequence makes a sequence known.
func (srv *Server) addSequence(s *sequence) {
	srv.mu.Lock()
	defer srv.mu.Unlock()
	srv.mu.next++
	s.handle = srv.mu.next
	srv.mu.sequences[s.id], srv.mu.handles[s.handle] = s, s
}

func (srv *Server) removeSequence(s *sequence) {
	srv.mu.Lock()
	defer srv.mu.Unlock()
	delete(srv.mu.sequences, s.id)
	delete(srv.mu.handles, s.handle)
}
