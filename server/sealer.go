package server

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"runtime/debug"
	"sync"
	"sync/atomic"

	"golang.org/x/sync/errgroup"

	"kvtier/attention"
	"kvtier/tiers"
	"kvtier/tiers/gpu"
	"kvtier/tiers/seal"
	"kvtier/tiers/store"
	"kvtier/tiers/taillog"
)

// sealer seals full segments in the background, one sequence's at a time, in turns.
type sealer struct {
	srv  *Server
	done sync.WaitGroup
	one  sync.Mutex // one segment is made at a time: it takes a core and memory

	madeOnDevice atomic.Int64 // segments that a GPU made

	mu struct {
		sync.Mutex
		wake    *sync.Cond
		queue   []*sequence
		closed  bool
		running int
		failed  error // why the last seal failed; nil once one succeeds
	}
	ctx    context.Context // ends with the server
	cancel context.CancelFunc
}

func newSealer(srv *Server) *sealer {
	z := &sealer{srv: srv}
	z.mu.wake = sync.NewCond(&z.mu)
	z.ctx, z.cancel = context.WithCancel(context.Background())
	z.done.Add(1)
	go z.run()
	return z
}

// consider queues a sequence that has a segment to seal.
func (z *sealer) consider(s *sequence) {
	s.mu.Lock()
	_, ready := s.mu.sealPoint()
	queue := ready && !s.mu.sealing && !s.mu.deleted
	if queue {
		s.mu.sealing = true
	}
	s.mu.Unlock()
	if !queue {
		return
	}
	z.mu.Lock()
	z.queue(s)
	z.mu.Unlock()
}

func (z *sealer) queue(s *sequence) {
	z.mu.queue = append(z.mu.queue, s)
	z.mu.wake.Signal()
}

func (z *sealer) pending() int {
	z.mu.Lock()
	defer z.mu.Unlock()
	return len(z.mu.queue) + z.mu.running
}

// lastFailure says why segments cannot be sealed now; nil if they can.
func (z *sealer) lastFailure() error {
	z.mu.Lock()
	defer z.mu.Unlock()
	return z.mu.failed
}

func (z *sealer) run() {
	defer z.done.Done()
	for {
		z.mu.Lock()
		for len(z.mu.queue) == 0 && !z.mu.closed {
			z.mu.wake.Wait()
		}
		if z.mu.closed {
			z.mu.Unlock()
			return
		}
		s := z.mu.queue[0]
		z.mu.queue = z.mu.queue[1:]
		z.mu.running = 1
		z.mu.Unlock()
		err := z.sealNext(s)
		z.mu.Lock()
		z.mu.running = 0
		z.mu.failed = err
		z.mu.Unlock()
	}
}

func (z *sealer) close() {
	z.mu.Lock()
	z.mu.closed = true
	z.mu.wake.Broadcast()
	z.mu.Unlock()
	z.cancel()
	z.done.Wait()
}

// sealNext seals the next full segment of a sequence that lies behind its recent window. If there is another one, the sequence queues
// again, behind those that wait: one that grows as fast as it can does not keep them waiting.
func (z *sealer) sealNext(s *sequence) (err error) {
	defer func() {
		// A panic here would be a defect, but it must not take other sequences down.
		if r := recover(); r != nil {
			err = fmt.Errorf("seal: %v", r)
			z.srv.log.Error("seal a segment", "sequence", s.id, "err", err, "stack", string(debug.Stack()))
		}
		s.mu.Lock()
		s.mu.sealing = false
		s.mu.Unlock()
		if err == nil {
			z.consider(s)
		}
	}()
	for {
		now := s.snapshot()
		if _, ok := now.sealPoint(); !ok {
			return nil
		}
		st, err := s.whole()
		if err != nil {
			return err
		}
		end, ok := st.sealPoint()
		if !ok {
			continue // truncated meanwhile
		}
		err = z.seal(z.ctx, s, &st, end)
		if errors.Is(err, errStale) {
			continue
		}
		if s.usable() != nil {
			return nil // deleted meanwhile
		}
		if err != nil && !errors.Is(err, context.Canceled) {
			z.srv.log.Error("seal a segment", "sequence", s.id, "end", end, "err", err)
		}
		return err
	}
}

// seal seals the tokens from the sealed part's end to end. It makes room on a
// full disk if it can.
func (z *sealer) seal(ctx context.Context, s *sequence, st *state, end uint64) error {
	for {
		err := z.trySeal(ctx, s, st, end)
		if !errors.Is(err, errNoBlocks) || !z.srv.evictOne(s) {
			return err
		}
	}
}

// errNoBlocks: the tier is full. A file system that is full elsewhere is not
// emptied by evicting sequences.
var errNoBlocks = errors.New("no room for a segment")

// errStale: the sequence changed while it was being sealed; nothing was committed.
var errStale = errors.New("the sequence changed meanwhile")

func (z *sealer) trySeal(ctx context.Context, s *sequence, st *state, end uint64) error {
	z.one.Lock()
	defer z.one.Unlock()
	if now := s.snapshot(); now.sealed() != st.sealed() || now.cuts != st.cuts {
		return errStale // somebody else sealed these tokens while this call waited
	}
	b := z.srv.store.NewBatch()
	defer b.Close()
	sp, err := z.spanFor(ctx, s, st, end, b)
	if errors.Is(err, tiers.ErrFull) {
		return fmt.Errorf("%w: %w", errNoBlocks, err)
	}
	if err != nil {
		return err
	}
	if err := s.commitSpan(ctx, sp, end, st.cuts, b); err != nil {
		z.srv.forget(ctx, s, sp)
		return err
	}
	z.srv.metrics.seals.Inc()
	return z.srv.dropLow(ctx, s)
}

// spanFor returns the span that holds tokens [sealed, end): one that was
// sealed before under the same name, or a new one, which b then commits.
func (z *sealer) spanFor(ctx context.Context, s *sequence, st *state, end uint64, b *store.Batch) (*span, error) {
	start := st.sealed()
	// Exact rows of the same tokens are the same. Others are what their own budgets made of them.
	if blocks := end / blockTokens; end%blockTokens == 0 && blocks <= uint64(len(st.names)) && end <= st.exactUntil {
		if sp := z.srv.spans.adopt(s, st.names[blocks-1], start, int(end-start)); sp != nil {
			if z.whole(ctx, sp) {
				return sp, nil
			}
			z.srv.forget(ctx, s, sp)
		}
	}
	sp := &span{spanRecord: spanRecord{ID: newSpanID(), Start: start, Tokens: int(end - start)}}
	n := int(end - start)
	sp.TokenIDs = make([]uint64, n)
	texts := make([][]byte, n)
	for i := range n {
		sp.TokenIDs[i] = noToken
		if i < len(st.ids) {
			sp.TokenIDs[i], texts[i] = st.ids[i], st.texts[i]
		}
	}
	sp.Texts = packTexts(texts)
	sp.segments = make([]*tiers.Header, s.spec.layers)
	layers := z.onDevice(ctx, s, st, start, end, b)
	var put sync.Mutex // a batch is not for concurrent use
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(z.workers(st, s.spec))
	for l := range s.spec.layers {
		g.Go(func() error {
			if err := gctx.Err(); err != nil {
				return err
			}
			h, parts := s.sealLayer(st, l, start, end, layers)
			put.Lock()
			defer put.Unlock()
			sp.segments[l] = h
			return b.PutSegment(gctx, h, parts)
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	for _, h := range sp.segments {
		sp.Segments = append(sp.Segments, fmt.Sprintf("%x", h.ID[:]))
	}
	rec, err := marshalSpan(sp)
	if err != nil {
		return nil, err
	}
	z.srv.spans.add(sp)
	return sp, b.Set(store.KindSpan, []byte(sp.ID), rec)
}

// workers is how many layers are sealed at once: half the cores are left to queries, unless rows that wait to be
// sealed fill so much of their memory that appends may have to wait, or tokens come as fast as in a prefill. Tails that wait for
// nothing may fill memory, too, but those are spilled: so sequences are counted that wait, each for as much as this one.
func (z *sealer) workers(st *state, sp *spec) int {
	end, _ := st.sealPoint()
	if prefill := st.accepted >= end+tiers.SegmentTokens/2; prefill || int64(z.pending())*st.tailBytes(sp) > z.srv.opt.TailBytes/4 {
		return z.srv.opt.Cores
	}
	return max(1, z.srv.opt.Cores/2)
}

// whole says whether every stored byte of a span is right: its rows are about
// to be given up.
func (z *sealer) whole(ctx context.Context, sp *span) bool {
	for _, h := range sp.segments {
		if z.srv.store.Verify(ctx, h) != nil {
			return false
		}
	}
	return true
}

// sealLayer makes one layer's segment of tokens [start, end); layers are those that were begun before, nil if none.
func (s *sequence) sealLayer(st *state, layer int, start, end uint64, layers []toSeal) (*tiers.Header, [tiers.NumParts][]byte) {
	sp := s.spec
	if w := uint64(sp.window[layer]); w > 0 {
		from := start
		if end > w {
			from = max(from, end-w)
		}
		rows := &seal.Rows{Layer: layer, Start: from, Heads: sp.kvHeads, HeadDim: sp.headDim, Type: sp.typ}
		rows.K, rows.V = st.rows[layer].slice(sp, from, end)
		return seal.Window(rows, s.profile, start, int(end-start))
	}
	var x toSeal
	if layers == nil {
		x = s.toSeal(st, layer, start, end)
	} else if x = layers[layer]; x.made.Header != nil {
		return x.made.Header, x.made.Parts
	}
	return seal.Segment(x.rows, x.options)
}

// toSeal is a full layer's part of a span, and the segment if a GPU made it.
type toSeal struct {
	rows    *seal.Rows
	options seal.Options
	made    gpu.Sealed
}

// toSeal gathers what a full layer's segment of tokens [start, end) is made of. What is known of its queries fades.
func (s *sequence) toSeal(st *state, layer int, start, end uint64) (x toSeal) {
	sp := s.spec
	x.rows = &seal.Rows{Layer: layer, Start: start, Heads: sp.kvHeads, HeadDim: sp.headDim, Type: sp.typ}
	x.rows.K, x.rows.V = st.rows[layer].slice(sp, start, end)
	x.options = seal.Options{Profile: s.profile, Low: st.accepted <= uint64(s.srv.opt.ReadAllTokens)}
	if start == 0 {
		x.options.Sinks = min(tiers.SinkTokens, int(end-start)-1)
	}
	sums, sample := s.metrics(layer)
	for h := range sp.kvHeads {
		x.options.Metrics = append(x.options.Metrics, sums[h].Metric())
		x.options.Queries = append(x.options.Queries, groupOf(sample, sp, h))
	}
	return x
}

// metrics copies what is known of a layer's queries, and lets it fade.
func (s *sequence) metrics(layer int) ([]*attention.QuerySum, []float32) {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([]*attention.QuerySum, len(s.mu.queries[layer]))
	for h, q := range s.mu.queries[layer] {
		out[h] = q.Clone()
		q.Decay()
	}
	return out, s.mu.sample[layer]
}

// groupOf gathers the rows of one KV head's group from queries [m][queryHeads][headDim].
func groupOf(q []float32, sp *spec, head int) []float32 {
	row, g := sp.queryHeads*sp.headDim, sp.group()*sp.headDim
	var out []float32
	for at := 0; at < len(q); at += row {
		out = append(out, q[at+head*g:at+(head+1)*g]...)
	}
	return out
}

// commitSpan makes sp part of the sequence: its segments, its record, the
// sequence's record and a log that begins behind it become durable together.
// cuts is what it was when sp was made: rows that were taken back are not sealed.
func (s *sequence) commitSpan(ctx context.Context, sp *span, end, cuts uint64, b *store.Batch) error {
	s.write.Lock()
	defer s.write.Unlock()
	if err := s.usable(); err != nil {
		return err
	}
	st, err := s.wholeLocked()
	if err != nil {
		return err
	}
	if st.sealed() != sp.Start || st.accepted < end || st.cuts != cuts {
		return errStale
	}
	s.srv.commits.Lock()
	defer s.srv.commits.Unlock()
	for _, h := range sp.segments {
		if !b.Has(h.ID) {
			return errStale // the span that shared this segment is gone
		}
	}
	next := st
	next.spans = append(st.spans[:len(st.spans):len(st.spans)], spanRef{sp, sp.Tokens})
	for l, r := range st.rows {
		from := end
		if w := uint64(s.spec.window[l]); w > 0 {
			from = end - min(end, w)
		}
		next.rows[l] = r.from(s.spec, from)
	}
	cut := min(uint64(len(st.ids)), end-sp.Start)
	next.ids, next.texts = st.ids[cut:], st.texts[cut:]
	if err := s.moveTail(ctx, &next, b); errors.Is(err, store.ErrVanished) {
		return errStale
	} else if err != nil {
		return err
	}
	s.srv.spans.refer(s, next.spans[len(next.spans)-1:])
	if blocks := end / blockTokens; end%blockTokens == 0 && blocks <= uint64(len(st.names)) {
		s.srv.spans.setEnd(sp, st.names[blocks-1])
	}
	return nil
}

// moveTail commits state next, of which more is sealed than before. The log stays while most of it is still the tail's: so no
// token is copied to another log more than once, on average. The caller holds write. Whatever else b holds is committed with it.
func (s *sequence) moveTail(ctx context.Context, next *state, b *store.Batch) error {
	size, _ := s.log.Size()
	tail := int64(next.accepted-next.sealed()) * int64(s.spec.tokenBytes())
	if tail < size-tail || next.crashSafe < next.accepted {
		return s.replaceLog(ctx, next, b)
	}
	place := s.place
	if place.Mark == 0 {
		place.From = next.sealed() - uint64(next.spans[len(next.spans)-1].limit)
	}
	place.Mark = rand.Uint64() | 1 // 0 is none
	if s.logMark(place.Mark) != nil {
		return s.replaceLog(ctx, next, b)
	}
	if err := s.commitState(ctx, next, place, b); err != nil {
		return err
	}
	s.place = place
	s.settle(next)
	return nil
}

// logMark notes that records from here on are newer than the sequence's record in the catalogue, and makes that and all before it power-safe.
func (s *sequence) logMark(mark uint64) error {
	if err := s.log.Append(logSealed, binary.LittleEndian.AppendUint64(nil, mark)); err != nil {
		return err
	}
	return s.log.Sync()
}

// commitState commits what b holds and the sequence's record.
func (s *sequence) commitState(ctx context.Context, st *state, place logPlace, b *store.Batch) error {
	rec, err := s.record(st, place)
	if err != nil {
		return err
	}
	if err := b.Set(store.KindSequence, []byte(s.id), rec); err != nil {
		return err
	}
	return b.Commit(ctx)
}

// replaceLog commits state next with a new log that holds its tail. The caller
// holds write. Whatever else b holds is committed with it.
func (s *sequence) replaceLog(ctx context.Context, next *state, b *store.Batch) error {
	place := logPlace{Gen: s.place.Gen + 1}
	log, err := taillog.Create(s.srv.opt.FS, s.logPath(place.Gen), s.logName(place.Gen))
	if errors.Is(err, fs.ErrExist) { // left by a change that failed
		if err = s.srv.opt.FS.Remove(s.logPath(place.Gen)); err == nil {
			log, err = taillog.Create(s.srv.opt.FS, s.logPath(place.Gen), s.logName(place.Gen))
		}
	}
	if err != nil {
		return err
	}
	if err := s.fillLog(log, next); err != nil {
		return errors.Join(err, log.Remove())
	}
	if err := s.commitState(ctx, next, place, b); err != nil {
		return errors.Join(err, log.Remove())
	}
	old := s.log
	s.log, s.place = log, place
	if old != nil {
		if err := old.Remove(); err != nil {
			s.srv.log.Warn("remove an old log", "err", err) // recovery removes it
		}
	}
	s.settle(next)
	return nil
}

// settle makes next, all of whose tail is power-safe, the sequence's state.
func (s *sequence) settle(next *state) {
	s.mu.Lock()
	defer s.mu.Unlock()
	next.crashSafe = next.accepted
	// A query may have lowered it meanwhile; of a truncation it counts what is left.
	if next.cuts == s.mu.cuts || s.mu.exactUntil < next.accepted {
		next.exactUntil = min(next.exactUntil, s.mu.exactUntil)
	}
	next.names = s.mu.names
	s.mu.power, s.mu.powerPos = next.accepted, nil
	s.setStateLocked(*next)
}

// fillLog writes the tail of st and makes it power-safe.
func (s *sequence) fillLog(log *taillog.Log, st *state) error {
	if _, err := s.logTokens(log, st, st.sealed(), st.accepted); err != nil {
		return err
	}
	if err := log.Sync(); err != nil {
		return err
	}
	return s.srv.opt.FS.SyncDir(s.srv.tailDir())
}

// dropLow drops the low planes of spans whose sequences all outgrew reading
// everything.
func (srv *Server) dropLow(ctx context.Context, s *sequence) error {
	if s.profile != tiers.ProfileBalanced {
		return nil
	}
	srv.commits.Lock() // spans do not go meanwhile
	defer srv.commits.Unlock()
	st := s.snapshot()
	if st.accepted <= uint64(srv.opt.ReadAllTokens) {
		return nil
	}
	b := srv.store.NewBatch()
	defer b.Close()
	some := false
	for _, ref := range st.spans {
		if !srv.outgrown(ref.span) {
			continue
		}
		for _, h := range ref.segments {
			if srv.store.HasLow(h.ID) {
				some = true
				b.DropLow(h)
			}
		}
	}
	if !some {
		return nil
	}
	return b.Commit(ctx)
}

// outgrown says whether every sequence that uses a span is too long to read everything.
func (srv *Server) outgrown(sp *span) bool {
	for _, s := range srv.spans.users(sp) {
		s.mu.RLock()
		short := s.mu.accepted <= uint64(srv.opt.ReadAllTokens)
		s.mu.RUnlock()
		if short {
			return false
		}
	}
	return true
}
