package nvme

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"

	"kvtier/tiers"
)

// batch is the reads of one PinWithin. A goroutine of its own performs them, so that the reader can leave; then they go on
// without it, for the cache.
type batch struct {
	held  []*stored // references of its own
	reads []read
	limit atomic.Int64  // reads from here on are not begun
	over  chan struct{} // closed when none is under way any more
	kept  chan struct{} // closed when, of a batch that was left, the cache has what came
	mu    struct {
		sync.Mutex
		ended bool   // before over is closed
		err   error  // then
		came  []bool // what the reader took with it when it left; nil: it has not
		late  int    // reads that count in Tier.late since then
	}
}

// most returns how many of so many reads may be begun.
func (b *batch) most(n int) int {
	if b == nil {
		return n
	}
	return min(n, int(b.limit.Load()))
}

// late is what goes on of batches that were left.
type late struct {
	sync.Mutex
	reads  int                 // to be done
	blocks map[blockKey]*batch // that they bring into the cache
}

// PinWithin is Pin for a reader that waits no longer than p lets it. Ranges that have not come by then are nil, and a pin's
// Late counts their bytes. They are read on in the background, and lie in the cache when they are wanted next; of one that
// fails there failed tells, if the reader was not told. A disk that is stuck does not pile up more than Options.LateReads
// of them: beyond that nothing is begun, and what the cache does not have is late at once.
func (t *Tier) PinWithin(ctx context.Context, reqs []tiers.Request, p *tiers.Patience, failed func(error)) ([]tiers.Pin, error) {
	held, wants, found, err := t.prepare(ctx, reqs)
	if err != nil {
		return nil, fmt.Errorf("nvme: pin: %w", err)
	}
	defer t.ops.Done()
	defer t.done(held)
	wants, coming, from := t.coming(wants)
	reads := join(wants)
	b, came := t.startBatch(held, reads, failed)
	wait(ctx, b, from, p)
	if b != nil {
		came, err = t.leave(b)
	}
	if err == nil {
		err = ctx.Err()
	}
	if err != nil {
		freeReads(reads, came)
		freeCopies(found)
		return nil, t.failed(err)
	}
	t.keep(reads, came)
	coming, more := t.cached(coming)
	pins := t.hand(reqs, held, reads, append(found, more...), came)
	for i := range coming {
		pins[coming[i].req].Late += coming[i].length
	}
	return pins, nil
}

// startBatch begins reads in the background. If there are none, or too many are late, b is nil; came is then as leave has it.
func (t *Tier) startBatch(held []*stored, reads []read, failed func(error)) (b *batch, came []bool) {
	if len(reads) == 0 {
		return nil, nil
	}
	t.late.Lock()
	stuck := t.late.reads >= t.o.LateReads
	t.late.Unlock()
	if stuck {
		t.lateReads.Add(int64(len(reads)))
		return nil, make([]bool, len(reads))
	}
	b = &batch{held: held, reads: reads, over: make(chan struct{}), kept: make(chan struct{})}
	b.limit.Store(int64(len(reads)))
	t.hold(held)
	t.ops.Add(1) // the caller has one: Close cannot have passed
	go t.perform(b, failed)
	return b, nil
}

// wait waits for a batch, if there is one, and for others that were left, as long as p and ctx last.
func wait(ctx context.Context, b *batch, from []*batch, p *tiers.Patience) {
	if b == nil && len(from) == 0 {
		return
	}
	p.Begin()
	defer p.End()
	inTime := func(done <-chan struct{}) bool {
		select {
		case <-done:
			return true
		case <-p.Over():
		case <-ctx.Done():
		}
		return false
	}
	if b != nil && !inTime(b.over) {
		return
	}
	for _, o := range from {
		if !inTime(o.kept) {
			return
		}
	}
}

// perform reads a batch, and ends it if its reader has left.
func (t *Tier) perform(b *batch, failed func(error)) {
	defer t.ops.Done()
	defer t.done(b.held)
	err := t.readAll(t.closing, b.reads, b)
	if t.closing.Err() != nil && err != nil {
		err = tiers.ErrClosed
	}
	b.mu.Lock()
	b.mu.ended, b.mu.err = true, err
	came := b.mu.came
	b.mu.Unlock()
	close(b.over)
	if came == nil {
		return // the reader has all of it
	}
	t.keep(b.reads, nil)
	t.arrived(b)
	for i := range b.reads {
		if r := &b.reads[i]; r.ready.Load() && !came[i] {
			t.read.Add(int64(len(r.buf.bytes)))
		}
	}
	freeReads(b.reads, nil)
	if err != nil {
		failed(t.failed(err))
	}
}

// leave is the reader's end of a batch. came says which reads it has, of a batch that goes on, with a reference to the
// buffer of each; nil says that it has all of them, and what became of them.
func (t *Tier) leave(b *batch) (came []bool, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.mu.ended {
		return nil, b.mu.err
	}
	came = make([]bool, len(b.reads))
	next, missing := 0, len(b.reads)
	for i := range b.reads {
		if r := &b.reads[i]; r.ready.Load() {
			r.buf.refs.Add(1)
			came[i] = true
			next, missing = i+1, missing-1
		}
	}
	b.mu.came = came
	t.lateReads.Add(int64(missing))
	t.late.Lock()
	defer t.late.Unlock()
	end := min(len(b.reads), next+max(0, t.o.LateReads-t.late.reads))
	b.limit.Store(int64(end))
	for i := range b.reads[:end] {
		if !came[i] {
			b.mu.late++
			t.expectLocked(b, &b.reads[i])
		}
	}
	t.late.reads += b.mu.late
	return came, nil
}

// expectLocked notes which blocks a late read brings into the cache. Tier.late is locked.
func (t *Tier) expectLocked(b *batch, r *read) {
	if t.cache == nil {
		return
	}
	for i := range r.wants {
		w := &r.wants[i]
		for block := w.first; block < w.end && w.ranged; block++ {
			t.late.blocks[w.key(block)] = b
		}
	}
}

// arrived takes a batch that was left out of what is late.
func (t *Tier) arrived(b *batch) {
	t.late.Lock()
	t.late.reads -= b.mu.late // the reader is gone: nobody changes it
	for i := range b.reads {
		for j := range b.reads[i].wants {
			w := &b.reads[i].wants[j]
			for block := w.first; block < w.end; block++ {
				if k := w.key(block); t.late.blocks[k] == b {
					delete(t.late.blocks, k)
				}
			}
		}
	}
	t.late.Unlock()
	close(b.kept)
}

// coming takes out of wants those that need a block which late reads bring: it is not read twice at once. from are their batches.
func (t *Tier) coming(wants []want) (rest, coming []want, from []*batch) {
	t.late.Lock()
	defer t.late.Unlock()
	if len(t.late.blocks) == 0 {
		return wants, nil, nil
	}
	rest = wants[:0]
	for _, w := range wants {
		var b *batch
		for block := w.first; block < w.end && w.ranged && b == nil; block++ {
			b = t.late.blocks[w.key(block)]
		}
		if b == nil {
			rest = append(rest, w)
			continue
		}
		coming = append(coming, w)
		if !slices.Contains(from, b) {
			from = append(from, b)
		}
	}
	return rest, coming, from
}

// hold takes another reference to each part; give it back by done.
func (t *Tier) hold(held []*stored) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, st := range held {
		if st != nil {
			st.refs++
		}
	}
}
