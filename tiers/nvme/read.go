package nvme

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"

	"kvtier/tiers"
)

// read is one read of consecutive blocks for one or more wants.
type read struct {
	wants      []want
	first, end int
	buf        *buffer
	ready      atomic.Bool // buf holds what was asked for, verified
}

// outcome is what became of a read: n and err as ReadAt has them.
type outcome struct {
	read, n int
	err     error
}

// start makes room for the read, and returns its place.
func (r *read) start() (x *extent, off int64) {
	r.buf = newBuffer((r.end - r.first) * tiers.BlockSize)
	return r.place()
}

func (r *read) place() (x *extent, off int64) {
	st := r.wants[0].st
	return st.extent, (int64(st.run.First) + int64(r.first)) * tiers.BlockSize
}

// done verifies the blocks, if n bytes and err are what a read of all of them gives.
func (r *read) done(n int, err error) error {
	w := &r.wants[0]
	if n < len(r.buf.bytes) {
		if err == nil || errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return fmt.Errorf("segment %v: read %d blocks of %s at %d: %w", w.h.ID, r.end-r.first,
			ExtentName(w.st.run.Extent), int64(w.st.run.First)+int64(r.first), err)
	}
	if err := w.h.CheckBlocks(w.part, r.first, r.buf.bytes); err != nil {
		return err
	}
	r.ready.Store(true)
	return nil
}

// readAll performs reads, up to the tier's depth at once, and returns the first
// error. When it returns no read is under way. b is the batch that they are, if
// anybody may leave it, else nil.
func (t *Tier) readAll(ctx context.Context, reads []read, b *batch) error {
	if len(reads) == 0 {
		return nil
	}
	if !queueable(reads) {
		return t.readThreads(ctx, reads, b)
	}
	// The slot comes first, and readQueue keeps one until its end: so there are
	// never more queues than slots.
	if err := t.slot(ctx); err != nil {
		return err
	}
	q := t.takeQueue()
	if q == nil {
		<-t.slots
		return t.readThreads(ctx, reads, b)
	}
	return t.readQueue(ctx, q, reads, b)
}

// queueBlocks is how long reads through a queue may be on average. Of longer
// ones the verifying takes so long that threads, which do it on all cores, are
// as fast.
const queueBlocks = 32

// queueable says whether reads are worth a queue, and their files have it.
func queueable(reads []read) bool {
	if len(reads) == 1 {
		return false
	}
	blocks := 0
	for i := range reads {
		blocks += reads[i].end - reads[i].first
		if reads[i].wants[0].st.extent.direct == nil {
			return false
		}
	}
	return blocks <= queueBlocks*len(reads)
}

// slot waits until one more read may be under way.
func (t *Tier) slot(ctx context.Context) error {
	select {
	case t.slots <- struct{}{}:
		if err := ctx.Err(); err != nil { // where both are so, either is chosen
			<-t.slots
			return err
		}
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// readThreads performs reads by ReadAt, each on a thread of its own.
func (t *Tier) readThreads(ctx context.Context, reads []read, b *batch) error {
	if len(reads) == 1 {
		return t.readOne(ctx, &reads[0])
	}
	var next atomic.Int64
	var failed atomic.Pointer[error]
	var wg sync.WaitGroup
	for range min(len(reads), t.o.Depth) {
		wg.Go(func() {
			for failed.Load() == nil {
				i := int(next.Add(1)) - 1
				if i >= b.most(len(reads)) {
					return
				}
				if err := t.readOne(ctx, &reads[i]); err != nil {
					failed.CompareAndSwap(nil, &err)
				}
			}
		})
	}
	wg.Wait()
	if err := failed.Load(); err != nil {
		return *err
	}
	return nil
}

func (t *Tier) readOne(ctx context.Context, r *read) error {
	if err := t.slot(ctx); err != nil {
		return err
	}
	x, off := r.start()
	n, err := x.file.ReadAt(r.buf.bytes, off)
	<-t.slots // verifying is no I/O
	return r.done(n, err)
}

// readQueue performs reads on the caller's thread by a queue, which it gives
// back. The caller has a slot, which it takes over.
func (t *Tier) readQueue(ctx context.Context, q *queue, reads []read, b *batch) (err error) {
	next, flying, slots := 0, 0, 1
	defer func() {
		for range slots {
			<-t.slots
		}
		t.giveQueue(q)
	}()
	var over []outcome // what was read and is not verified yet
	for {
		if err == nil {
			err = ctx.Err()
		}
		if err != nil {
			reads = reads[:next] // only what is under way is waited for
		}
		reads = reads[:max(next, b.most(len(reads)))]
		for next < len(reads) && (slots > flying || t.trySlot(&slots)) {
			x, off := reads[next].start()
			q.add(next, x.direct, reads[next].buf.bytes, off)
			next, flying = next+1, flying+1
		}
		left := q.submit()
		for i := next - left; i < next; i++ { // ReadAt says why, or does it
			x, off := reads[i].place()
			n, err := x.file.ReadAt(reads[i].buf.bytes, off)
			over = append(over, outcome{i, n, err})
		}
		flying -= left
		for _, o := range over { // while others are under way
			if e := reads[o.read].done(o.n, o.err); err == nil {
				err = e
			}
		}
		if flying == 0 && (next == len(reads) || err != nil) {
			return err
		}
		over = over[:0]
		if flying > 0 {
			var failed error // a read's error found so far, err, stands
			if over, failed = q.wait(over, max(1, flying/4)); failed != nil {
				// Not to be expected. The kernel must not write to buffers that are
				// given away: closing the queue waits for all that is under way.
				err = errors.Join(err, failed, q.close())
				q = nil
				return err
			}
		}
		flying -= len(over)
		keep := flying
		if next < len(reads) {
			keep = max(flying, 1)
		}
		for ; slots > keep; slots-- {
			<-t.slots
		}
	}
}

// trySlot takes a slot if one is free now.
func (t *Tier) trySlot(slots *int) bool {
	select {
	case t.slots <- struct{}{}:
		*slots++
		return true
	default:
		return false
	}
}

// takeQueue returns a queue for as many reads as the tier's depth, nil if there
// is none to be had.
func (t *Tier) takeQueue() *queue {
	select {
	case q := <-t.queues:
		return q
	default:
	}
	q, err := newQueue(t.o.Depth)
	if err != nil {
		return nil // threads do it, too; the next Pin tries again
	}
	return q
}

// giveQueue takes a queue back, on which nothing is under way.
func (t *Tier) giveQueue(q *queue) {
	if q == nil {
		return
	}
	select {
	case t.queues <- q:
	default:
		_ = q.close() // there are as many as can be used
	}
}
