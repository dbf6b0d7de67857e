package server

import (
	"context"
	"errors"
	"sync"

	"google.golang.org/grpc/codes"

	"kvtier/compress"
	"kvtier/server/sparse"
	"kvtier/tiers"
	"kvtier/tiers/store"
)

// pinTable counts the pins of segments: what is pinned stays in RAM, and its
// sequence is not evicted.
type pinTable struct {
	sync.Mutex
	next     uint64
	pins     map[uint64]*pin
	segments map[tiers.ID]int
}

type pin struct {
	seq      *sequence
	segments []tiers.ID // that it holds
	detach   func()     // from its lease; nil until it holds any
}

// pin keeps the segments of positions [start, end) in RAM until unpin, or the lease's end.
func (srv *Server) pin(s *sequence, lease, start, end uint64) (id uint64, bytes int64, err error) {
	if err := s.keep(&s.mu.pins); err != nil {
		return 0, 0, err
	}
	t := &srv.pins
	id = t.add(&pin{seq: s})
	defer func() {
		if err != nil {
			_ = srv.unpin(id)
			id, bytes = 0, 0
		}
	}()
	st := s.snapshot()
	if end == 0 {
		end = st.accepted
	}
	if start >= end || end > st.accepted {
		return id, 0, fail(codes.OutOfRange, ReasonPastEnd, "pin %d to %d: the sequence has %d tokens", start, end, st.accepted)
	}
	detach, err := srv.leases.attach(lease, func() { _ = srv.unpin(id) })
	if err != nil {
		return id, 0, err
	}
	bytes, err = t.hold(id, lease, detach, st.segmentsIn(start, end), srv.store)
	return id, bytes, err
}

// segmentsIn returns the segments of all layers that hold positions of [start, end).
func (st *state) segmentsIn(start, end uint64) (out []*tiers.Header) {
	for _, ref := range st.spans {
		if ref.Start < end && ref.Start+uint64(ref.limit) > start {
			out = append(out, ref.segments...)
		}
	}
	return out
}

// add makes a pin known, of which nothing is held yet.
func (t *pinTable) add(p *pin) (id uint64) {
	t.Lock()
	defer t.Unlock()
	t.next++
	t.pins[t.next] = p
	return t.next
}

// hold keeps segments in RAM for a pin; bytes of them are not there yet. The pin may have ended meanwhile, with its lease.
func (t *pinTable) hold(id, lease uint64, detach func(), segments []*tiers.Header, st *store.Store) (bytes int64, err error) {
	t.Lock()
	defer t.Unlock()
	p := t.pins[id]
	if p == nil {
		return 0, errNoLease(lease)
	}
	p.detach = detach
	for _, h := range segments {
		n, err := st.Hold(h.ID, true, tiers.AllPlanes&^tiers.LowPlanes)
		if err != nil {
			return 0, err
		}
		t.segments[h.ID]++
		p.segments = append(p.segments, h.ID)
		bytes += n
	}
	return bytes, nil
}

// unpin ends a pin.
func (srv *Server) unpin(id uint64) error {
	t := &srv.pins
	t.Lock()
	p := t.pins[id]
	if p == nil {
		t.Unlock()
		return fail(codes.NotFound, ReasonUnknown, "no pin %d: it ended or was never made", id)
	}
	delete(t.pins, id)
	for _, seg := range p.segments { // nobody pins them anew before they are let go
		if t.segments[seg]--; t.segments[seg] == 0 {
			delete(t.segments, seg)
			_, _ = srv.store.Hold(seg, false, 0) // a segment that is gone is not held
		}
	}
	detach := p.detach
	t.Unlock()
	if detach != nil {
		detach()
	}
	p.seq.mu.Lock()
	p.seq.mu.pins--
	p.seq.mu.Unlock()
	return nil
}

// holdUntilClose keeps a use of the sequence that only CloseSequence ends.
func (s *sequence) holdUntilClose(release func()) {
	s.mu.Lock()
	s.mu.releases = append(s.mu.releases, release)
	s.mu.Unlock()
}

// closeOne ends one such use.
func (s *sequence) closeOne() {
	s.mu.Lock()
	var release func()
	if n := len(s.mu.releases); n > 0 {
		release, s.mu.releases = s.mu.releases[n-1], s.mu.releases[:n-1]
	}
	s.mu.Unlock()
	if release != nil {
		release()
	}
}

// maxRead bounds the rows of one ReadKV, in bytes of K.
const maxRead = maxMessage/2 - 1<<20

// readKV returns rows [count][kvHeads][headDim] in the sequence's element
// type, and whether they are what was appended, bit for bit.
func (s *sequence) readKV(ctx context.Context, layer int, start, count uint64) (k, v []byte, exact bool, err error) {
	sp := s.spec
	if layer >= sp.layers {
		return nil, nil, false, invalid(ReasonShape, "layer %d: the model has %d", layer, sp.layers)
	}
	st, err := s.readable(layer)
	if err != nil {
		return nil, nil, false, err
	}
	end := start + count
	switch {
	case count == 0 || end < start || end > st.lens[layer]:
		return nil, nil, false, fail(codes.OutOfRange, ReasonPastEnd, "read %d tokens from %d: layer %d has %d", count, start, layer, st.lens[layer])
	case count*uint64(sp.rowBytes()) > maxRead:
		return nil, nil, false, invalid(ReasonArgument, "%d tokens are more than one call can return: read at most %d", count, maxRead/sp.rowBytes())
	}
	k, v = make([]byte, int(count)*sp.rowBytes()), make([]byte, int(count)*sp.rowBytes())
	exact = true
	rows := st.rows[layer]
	if end > rows.base {
		lo := max(start, rows.base)
		at := int(lo-start) * sp.rowBytes()
		rows.appendTo(sp, k[:at], v[:at], lo, end) // which have room for them
	}
	if start >= rows.base {
		return k, v, exact, nil
	}
	if sp.window[layer] > 0 {
		return nil, nil, false, fail(codes.FailedPrecondition, ReasonForkPoint, "layer %d keeps a window from token %d on", layer, rows.base)
	}
	for _, seg := range s.srv.segmentsOf(&st, layer, min(end, st.sealed())) {
		ok, err := s.readSegment(ctx, seg, k, v, start, end)
		if err != nil {
			return nil, nil, false, err
		}
		exact = exact && ok
	}
	return k, v, exact, nil
}

// readSegment writes the rows of a segment that lie in [start, end).
func (s *sequence) readSegment(ctx context.Context, seg sparse.Segment, k, v []byte, start, end uint64) (exact bool, err error) {
	h := seg.Header
	if h.Start+uint64(seg.Limit) <= start {
		return true, nil
	}
	exact = true
	for head := range s.spec.kvHeads {
		rows, err := s.allRows(ctx, seg, head)
		if err != nil {
			return false, err
		}
		exact = exact && rows.Exact
		for i, off := range rows.Positions {
			if pos := h.Start + uint64(off); pos >= start && pos < end {
				s.putRow(k, rows.K, i, int(pos-start), head)
				s.putRow(v, rows.V, i, int(pos-start), head)
			}
		}
	}
	return exact, nil
}

// allRows returns all rows of one head of a segment, the sinks too, values not rotated.
func (s *sequence) allRows(ctx context.Context, seg sparse.Segment, head int) (*sparse.DecodedRows, error) {
	d := s.spec.headDim
	rows, _, err := sparse.Rows(ctx, s.srv.store, seg, head)
	if errors.Is(err, tiers.ErrNotFound) && seg.Low && !s.srv.store.HasLow(seg.Header.ID) { // they went meanwhile
		seg.Low = false
		rows, _, err = sparse.Rows(ctx, s.srv.store, seg, head)
	}
	if err != nil {
		return nil, err
	}
	if rows.Rotated {
		compress.Unrotate(rows.V, d)
		rows.Rotated = false
	}
	n := seg.Header.Heads[head].Sinks
	if n == 0 {
		return rows, nil
	}
	pins, _, err := s.srv.store.Pin(ctx, []tiers.Request{{Header: seg.Header, Head: head, Plane: tiers.PlaneSinks}})
	if err != nil {
		return nil, err
	}
	defer pins[0].Release(0)
	kv := make([]float32, 2*n*d)
	compress.ToFloat32(kv, pins[0].Ranges[0], s.spec.typ)
	for i := range min(n, seg.Limit) {
		rows.K, rows.V = append(rows.K, kv[i*d:(i+1)*d]...), append(rows.V, kv[(n+i)*d:(n+i+1)*d]...)
		rows.Positions = append(rows.Positions, i)
	}
	return rows, nil
}
