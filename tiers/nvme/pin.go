package nvme

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"

	"kvtier/tiers"
)

const (
	// gapBlocks is how many unwanted blocks between two wanted ones are read
	// along: less than a second read costs.
	gapBlocks = 2
	// readBlocks is where joining stops, so that reads can go in parallel.
	readBlocks = 256
)

// want is one range of one request, in blocks of its part.
type want struct {
	st          *stored
	h           *tiers.Header
	part        tiers.Part
	first, end  int  // blocks
	req, at     int  // which request, which of its ranges
	ranged      bool // the request is for ranges, not for the whole piece
	off, length int  // bytes, from the start of block first
}

// Pin reads ranges of the pieces that are held and verifies every block read.
func (t *Tier) Pin(ctx context.Context, reqs []tiers.Request) ([]tiers.Pin, error) {
	held, wants, found, err := t.prepare(ctx, reqs)
	if err != nil {
		return nil, fmt.Errorf("nvme: pin: %w", err)
	}
	defer t.ops.Done()
	defer t.done(held)
	reads := join(wants)
	if err := t.readAll(ctx, reads, nil); err != nil {
		freeReads(reads, nil)
		freeCopies(found)
		return nil, t.failed(err)
	}
	t.keep(reads, nil)
	return t.hand(reqs, held, reads, found, nil), nil
}

// prepare begins an operation, and says what is held, what has to be read, and
// what was in memory. Without an error, end it with t.done(held) and t.ops.Done.
func (t *Tier) prepare(ctx context.Context, reqs []tiers.Request) (held []*stored, wants []want, found []copied, err error) {
	if err := ctx.Err(); err != nil {
		return nil, nil, nil, err
	}
	for i := range reqs {
		if err := check(&reqs[i]); err != nil {
			return nil, nil, nil, err
		}
	}
	if err := t.begin(); err != nil {
		return nil, nil, nil, err
	}
	if held, wants, err = t.find(reqs); err != nil {
		t.corruptions.Add(1)
		t.done(held)
		t.ops.Done()
		return nil, nil, nil, err
	}
	wants, found = t.cached(wants)
	return held, wants, found, nil
}

// freeReads gives the buffers of reads back, of those that came, or, if came is nil, of all.
func freeReads(reads []read, came []bool) {
	for i := range reads {
		if (came == nil || came[i]) && reads[i].buf != nil {
			reads[i].buf.free()
		}
	}
}

// failed counts what reading failed with, and says that it was a pin's.
func (t *Tier) failed(err error) error {
	if errors.Is(err, tiers.ErrCorrupt) {
		t.corruptions.Add(1)
	}
	return fmt.Errorf("nvme: pin: %w", err)
}

// find takes a reference to the part of every request that is held, and lists
// what to read. held has one element a request, nil for a miss. The error is
// ErrCorrupt: a location that is not that of its segment.
func (t *Tier) find(reqs []tiers.Request) (held []*stored, wants []want, err error) {
	held = make([]*stored, len(reqs))
	wants = make([]want, 0, len(reqs))
	t.mu.Lock()
	defer t.mu.Unlock()
	for i := range reqs {
		r := &reqs[i]
		off, n, ok := r.Header.Piece(r.Head, r.Plane)
		s := t.mu.segments[r.Header.ID]
		if !ok || s == nil || s.hidden.Has(r.Plane) {
			continue
		}
		part := r.Plane.Part()
		st := s.parts[part]
		if st == nil {
			continue
		}
		if int(st.run.Blocks) != r.Header.Blocks(part) {
			return held, nil, fmt.Errorf("segment %v: part %d has %d blocks, its location %d: %w",
				r.Header.ID, part, r.Header.Blocks(part), st.run.Blocks, tiers.ErrCorrupt)
		}
		st.refs++
		held[i] = st
		add := func(at int, g tiers.Range) {
			if g.Len == 0 {
				return
			}
			from := off + g.Off
			first := from / tiers.BlockSize
			wants = append(wants, want{st, r.Header, part, first, (from+g.Len-1)/tiers.BlockSize + 1,
				i, at, len(r.Ranges) > 0, from - first*tiers.BlockSize, g.Len})
		}
		if len(r.Ranges) == 0 {
			add(0, tiers.Range{Off: 0, Len: n})
		}
		for at, g := range r.Ranges {
			add(at, g)
		}
	}
	return held, wants, nil
}

// done gives the references of find back.
func (t *Tier) done(held []*stored) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, st := range held {
		if st == nil {
			continue
		}
		if st.refs--; st.refs == 0 && st.dead {
			t.freeLocked(st)
		}
	}
}

// join sorts wants by place and makes one read of those that touch, overlap,
// or nearly touch.
func join(wants []want) []read {
	slices.SortFunc(wants, func(a, b want) int {
		return cmp.Or(cmp.Compare(a.st.run.Extent, b.st.run.Extent),
			cmp.Compare(a.st.run.First, b.st.run.First), cmp.Compare(a.first, b.first))
	})
	var reads []read
	for i := range wants {
		w := &wants[i]
		if n := len(reads); n > 0 {
			r := &reads[n-1]
			near := r.wants[0].st == w.st && w.first <= r.end+gapBlocks
			// Overlapping wants are joined whatever the length: a block is read once.
			if near && (w.first < r.end || max(w.end, r.end)-r.first <= readBlocks) {
				r.wants = wants[i-len(r.wants) : i+1]
				r.end = max(r.end, w.end)
				continue
			}
		}
		reads = append(reads, read{wants: wants[i : i+1], first: w.first, end: w.end})
	}
	return reads
}

// hand makes the pins, of the reads that came, or, if came is nil, of all. A block counts for the first range that needed it, a
// gap for the range after it, so that the pins together count what was read.
func (t *Tier) hand(reqs []tiers.Request, held []*stored, reads []read, found []copied, came []bool) []tiers.Pin {
	type hold struct {
		views         [][]byte
		bufs          []*buffer
		carried, late int
	}
	holds := make([]hold, len(reqs))
	hits, ranges := int64(0), 0
	for i, st := range held {
		if st != nil {
			ranges += max(len(reqs[i].Ranges), 1)
			hits++
		}
	}
	views := make([][]byte, ranges)
	for i, st := range held {
		if st != nil {
			n := max(len(reqs[i].Ranges), 1)
			holds[i].views, views = views[:n:n], views[n:]
		}
	}
	fromCache := make([]int, len(reqs))
	for _, c := range found {
		o := &holds[c.req]
		o.views[c.at] = c.bytes
		if n := len(o.bufs); n > 0 && o.bufs[n-1] == c.buf {
			c.buf.free() // one reference a pin is enough
		} else {
			o.bufs = append(o.bufs, c.buf)
		}
		fromCache[c.req] += (len(c.bytes) + tiers.LineSize - 1) / tiers.LineSize * tiers.LineSize
	}
	total := 0
	for i := range reads {
		r := &reads[i]
		if came != nil && !came[i] {
			for _, w := range r.wants {
				holds[w.req].late += w.length
			}
			continue
		}
		counted := r.first
		for _, w := range r.wants {
			o := &holds[w.req]
			from := (w.first-r.first)*tiers.BlockSize + w.off
			o.views[w.at] = r.buf.bytes[from : from+w.length : from+w.length]
			if n := len(o.bufs); n == 0 || o.bufs[n-1] != r.buf {
				r.buf.refs.Add(1)
				o.bufs = append(o.bufs, r.buf)
			}
			o.carried += max(w.end-counted, 0) * tiers.BlockSize
			counted = max(counted, w.end)
		}
		r.buf.free() // the read's own reference
		total += (r.end - r.first) * tiers.BlockSize
	}
	pins := make([]tiers.Pin, len(reqs))
	for i, st := range held {
		if st == nil {
			continue
		}
		bufs := holds[i].bufs
		pins[i] = tiers.NewPin(holds[i].views, holds[i].carried, func(float32) {
			for _, b := range bufs {
				b.free()
			}
		})
		pins[i].Cached, pins[i].Late = fromCache[i], holds[i].late
	}
	t.hits.Add(hits)
	t.misses.Add(int64(len(reqs)) - hits)
	t.read.Add(int64(total))
	return pins
}

// check says whether a request names a piece of its segment and lies inside it.
func check(r *tiers.Request) error {
	_, n, ok := r.Header.Piece(r.Head, r.Plane)
	if !ok && len(r.Ranges) == 0 {
		return nil // a piece that the segment does not have is a miss
	}
	for _, g := range r.Ranges {
		if g.Off < 0 || g.Len < 0 || g.Off > n || g.Len > n-g.Off {
			return fmt.Errorf("%v, head %d, %v: range %d+%d outside %d bytes",
				r.Header.ID, r.Head, r.Plane, g.Off, g.Len, n)
		}
	}
	return nil
}
