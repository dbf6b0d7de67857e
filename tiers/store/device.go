package store

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"kvtier/attention"
	"kvtier/tiers"
	"kvtier/tiers/gpu"
	"kvtier/tiers/gpu/cuda"
	"kvtier/tiers/gpu/kernels"
	"kvtier/tiers/seal"
)

// The GPU tier holds whole segments: those that were sealed last, and those that queries asked for. What it holds is read there:
// all of it, or of much the pages that matter most; the rest is the business of RAM and NVMe.
const (
	riseQueue = 1024 // segments waiting to be brought to the GPU; more are forgotten
	// riseAgain is how long a segment that was brought up, or found no room, is not tried again; each time twice as long, up to
	// riseSeldom. Where contexts are larger than the device's memory, segments must not take each other's place all the time.
	riseAgain, riseSeldom = 10 * time.Second, 10 * time.Minute
	mostTried             = 1 << 18 // segments remembered; then all are forgotten
	aheadQueue            = 4       // layers waiting to be brought up ahead; of more the oldest is forgotten
	// sayAgain is how often failures of the device are logged.
	sayAgain = time.Minute
)

// device is the GPU tier and what brings segments there.
type device struct {
	tier    *gpu.Tier
	queue   chan *tiers.Header
	ahead   chan []next    // layers that may be asked next; nil: nothing comes up ahead
	answers sync.WaitGroup // under way
	kept    atomic.Int64   // segments that stayed where they were made
	mu      struct {
		sync.Mutex
		tried   map[tiers.ID]try
		stopped bool      // it answered wrongly: nothing is asked of it any more (giveup.go)
		lost    bool      // it was said
		said    time.Time // when a failure was said last
	}
}

// try says when a segment was last tried, and for how long it is not tried again.
type try struct {
	at   time.Time
	wait time.Duration
}

// openDevice opens the GPU tier if there is to be one.
func (s *Store) openDevice(o Options) error {
	if o.GPUBytes == 0 {
		return nil
	}
	t, err := gpu.Open(gpu.Options{Device: o.GPUDevice, Bytes: o.GPUBytes, Patience: o.GPUPatience, Slab: s.ram.Slab, PinBytes: o.RAMBytes})
	if err != nil && o.GPUBytes == gpu.Auto {
		level := slog.LevelWarn
		if errors.Is(err, cuda.ErrNoDriver) || errors.Is(err, cuda.ErrNoDevice) {
			level = slog.LevelDebug
		}
		s.log.Log(context.Background(), level, "no GPU tier: answers come from RAM and NVMe", "err", err)
		return nil
	}
	if err != nil {
		return fmt.Errorf("%w: mend that, or start with --gpu off", err)
	}
	s.device = &device{tier: t, queue: make(chan *tiers.Header, riseQueue)}
	if !o.NoPrefetch {
		s.device.ahead = make(chan []next, aheadQueue)
	}
	s.device.mu.tried = map[tiers.ID]try{}
	s.log.Info("GPU tier", "device", t.Info().Name, "limit", t.Usage().BytesLimit)
	return nil
}

// unmapping has the GPU let go of a slab of RAM.
func (s *Store) unmapping(slab []byte) error {
	if s.device == nil {
		return nil
	}
	return s.device.tier.Unmapping(slab)
}

// Segment is one that a query reads.
type Segment = gpu.Segment

// Attend begins to attend to those of a layer's segments that lie whole in the memory of a GPU, and asks for the others to be brought there. It returns nil if there are none. Errors
// are of the device, and were logged: the segments lie below, too.
func (s *Store) Attend(ctx context.Context, segments []Segment, q []float32, softcap float32, choice gpu.Choice) *gpu.Answer {
	d := s.device
	if d == nil || !d.begin() {
		return nil
	}
	a, err := d.tier.Attend(ctx, segments, q, softcap, choice)
	if a == nil {
		d.answers.Done()
	}
	if err != nil {
		s.deviceFailed(err)
		return nil
	}
	for i := range segments {
		if a == nil || !a.Held[i] {
			d.want(segments[i].Header)
		}
	}
	return a
}

// Wait returns the partials of an answer, [heads][rows]; nil if the device failed, or was stopped.
func (s *Store) Wait(a *gpu.Answer) []attention.Partial {
	ps, err := a.Wait()
	s.device.answers.Done()
	if err != nil {
		s.deviceFailed(err)
		return nil
	}
	if s.device.stopped() {
		return nil
	}
	return ps
}

// Seal makes the segments of a span's layers, which are alike, on a GPU: the same bytes as seal.Segment. It returns none if the host has to: there
// is no GPU, or it failed, which was logged. What the GPU keeps of them is there for queries once the batch has committed them. The error is tiers.ErrCorrupt
// if that is not what it made.
func (b *Batch) Seal(ctx context.Context, rows []*seal.Rows, options []seal.Options) ([]gpu.Sealed, error) {
	d := b.s.device
	if d == nil || !d.begin() {
		return nil, nil
	}
	defer d.answers.Done()
	out, err := d.tier.Seal(ctx, rows, options)
	if errors.Is(err, tiers.ErrCorrupt) {
		return nil, err
	}
	if err != nil {
		b.s.deviceFailed(err)
		return nil, nil
	}
	for _, x := range out {
		if x.Kept != nil {
			b.kept[x.Header.ID] = x.Kept
		}
	}
	if d.stopped() {
		return nil, nil
	}
	return out, nil
}

// adopt has the GPU keep a segment that it made and that is stored now; false if it did not.
func (d *device) adopt(id tiers.ID, k *gpu.Kept) bool {
	if d.stopped() || !k.Adopt() {
		return false
	}
	d.kept.Add(1)
	d.mu.Lock()
	defer d.mu.Unlock()
	d.mu.tried[id] = try{time.Now(), riseAgain}
	return true
}

// DeviceWork is what a GPU does beside answers.
type DeviceWork struct {
	Kept   int64 // segments that stayed on the GPU that made them
	Pinned int64 // bytes of RAM that it copies from by itself
	// Ahead is how many segments came up before they were asked for, and AheadUsed how many of them were attended then.
	Ahead, AheadUsed int64
}

// DeviceWork returns it; there has to be a GPU tier.
func (s *Store) DeviceWork() DeviceWork {
	w := DeviceWork{Kept: s.device.kept.Load(), Pinned: s.device.tier.PinnedBytes()}
	w.Ahead, w.AheadUsed = s.device.tier.Ahead()
	return w
}

// HasDevice says whether there is a GPU tier, trusted or not.
func (s *Store) HasDevice() bool { return s.device != nil }

// deviceFailed logs what went wrong: that the device is lost once, other failures now and then.
func (s *Store) deviceFailed(err error) {
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) || errors.Is(err, tiers.ErrClosed) {
		return
	}
	d := s.device
	d.mu.Lock()
	lost := errors.Is(err, tiers.ErrLost)
	say := !d.mu.lost && (lost || time.Since(d.mu.said) >= sayAgain)
	d.mu.lost = d.mu.lost || lost
	if say {
		d.mu.said = time.Now()
	}
	d.mu.Unlock()
	if say {
		s.log.Error("the GPU tier failed: answers come from RAM and NVMe", "err", err)
	}
}

// want asks for a segment to be brought to the GPU.
func (d *device) want(h *tiers.Header) {
	if !d.tier.Attends(h) {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.tryLocked(h.ID, func() bool {
		select {
		case d.queue <- h:
			return true
		default:
			return false // it will be wanted again
		}
	})
}

// next is a segment that may be asked for next, and the one of the layer before that was.
type next struct {
	h    *tiers.Header
	like tiers.ID
}

// Ahead tells that segments after were asked for, not all of which were on the GPU, and that those of the next layer, of the same tokens, probably come next: these come up as far as
// they deserve it (gpu.Tier.Deserves).
func (s *Store) Ahead(after, segments []Segment) {
	d := s.device
	if d == nil || d.ahead == nil || d.stopped() {
		return
	}
	all := make([]next, len(segments))
	for i, x := range segments {
		all[i] = next{x.Header, after[i].Header.ID}
	}
	for {
		select {
		case d.ahead <- all:
			return
		default:
		}
		select {
		case <-d.ahead: // the oldest: it has been asked for by now
		default:
		}
	}
}

// rise brings segments to the GPU until ctx ends: those that may be asked for next before those that were asked for.
func (s *Store) rise(ctx context.Context) {
	for ctx.Err() == nil {
		select {
		case all := <-s.device.ahead:
			s.riseAhead(ctx, all)
			continue
		default:
		}
		select {
		case <-ctx.Done():
		case all := <-s.device.ahead:
			s.riseAhead(ctx, all)
		case h := <-s.device.queue:
			if err := s.riseOne(ctx, h); err != nil && ctx.Err() == nil {
				s.deviceFailed(err)
			}
		}
	}
}

// riseAhead brings segments of a layer up that deserve it, until those of another layer may come next. What does not lie in RAM takes of the budget for what is read to be brought up.
func (s *Store) riseAhead(ctx context.Context, all []next) {
	d := s.device
	planes := kernels.Planes(false)
	for _, x := range all {
		if ctx.Err() != nil || len(d.ahead) > 0 {
			return
		}
		bytes := int64(0)
		reqs := s.forDevice(x.h)
		for _, r := range reqs {
			_, n, _ := x.h.Piece(r.Head, r.Plane)
			bytes += int64(n)
		}
		if !d.tier.Attends(x.h) || !d.tier.Deserves(x.h.ID, x.like, bytes) || !d.try(x.h.ID) {
			continue
		}
		if !s.ram.Holds(x.h, planes) && !s.up.pay(int(bytes)) {
			return
		}
		if err := s.riseOne(ctx, x.h); err != nil {
			if ctx.Err() == nil {
				s.deviceFailed(err)
			}
			return
		}
		d.tier.MarkAhead(x.h.ID)
	}
}

// try says whether a segment may be tried now, and notes that it is.
func (d *device) try(id tiers.ID) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.tryLocked(id, func() bool { return true })
}

// tryLocked does what tries a segment if it may be tried now.
func (d *device) tryLocked(id tiers.ID, begin func() bool) bool {
	now := time.Now()
	t, ok := d.mu.tried[id]
	if d.mu.stopped || ok && now.Sub(t.at) < t.wait || !begin() {
		return false
	}
	d.mu.tried[id] = try{now, min(max(2*t.wait, riseAgain), riseSeldom)}
	if len(d.mu.tried) > mostTried {
		clear(d.mu.tried) // queries come by here: no time to look for the oldest
	}
	return true
}

// riseOne brings a segment to the GPU from wherever it lies.
func (s *Store) riseOne(ctx context.Context, h *tiers.Header) error {
	reqs := s.forDevice(h)
	pins, _, err := s.Pin(ctx, reqs)
	if err != nil {
		return nil // it was removed, or queries say so, too
	}
	pieces := make([]tiers.Piece, len(pins))
	for i, r := range reqs {
		pieces[i] = tiers.Piece{Head: r.Head, Plane: r.Plane, Bytes: pins[i].Ranges[0]}
	}
	if err := s.device.tier.PutFrom(ctx, h, pieces, func() { releaseAll(pins) }); err != nil && !errors.Is(err, tiers.ErrFull) {
		return fmt.Errorf("bring a segment to the GPU: %w", err)
	}
	if _, err := s.Header(h.ID); err != nil { // it was removed meanwhile
		return s.device.tier.Drop(h.ID, tiers.AllPlanes)
	}
	return nil
}

// forDevice are the pieces of a segment that are of use on the GPU.
func (s *Store) forDevice(h *tiers.Header) (reqs []tiers.Request) {
	planes := kernels.Planes(false)
	if s.HasLow(h.ID) {
		planes |= kernels.Planes(true)
	}
	for plane := range tiers.NumPlanes {
		if planes.Has(plane) {
			reqs = append(reqs, wholePlane([]*tiers.Header{h}, plane)...)
		}
	}
	return reqs
}

// dropOnDevice forgets planes of a segment on the GPU.
func (s *Store) dropOnDevice(id tiers.ID, planes tiers.PlaneSet) error {
	if s.device == nil {
		return nil
	}
	if err := s.device.tier.Drop(id, planes); !errors.Is(err, tiers.ErrLost) { // what is lost holds nothing
		return err
	}
	return nil
}

// OpenShared opens device memory of another process. The error is cuda.ErrNoDevice where there is no GPU tier.
func (s *Store) OpenShared(ctx context.Context, h cuda.Handle, n int64) (*gpu.Shared, error) {
	if s.device == nil {
		return nil, cuda.ErrNoDevice
	}
	return s.device.tier.OpenShared(ctx, h, n)
}

// closeDevice gives the GPU back.
func (s *Store) closeDevice() error {
	if s.device == nil {
		return nil
	}
	return s.device.tier.Close()
}

// GPUUsage returns what the GPU holds; ok is false if there is none.
func (s *Store) GPUUsage() (u tiers.Usage, ok bool) {
	if s.device == nil {
		return u, false
	}
	return s.device.tier.Usage(), true
}
