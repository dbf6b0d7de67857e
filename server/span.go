package server

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sync"

	"kvtier/server/sparse"
	"kvtier/tiers"
	"kvtier/tiers/store"
)

// span is a sealed span: one segment for each layer. It is immutable but for
// its low planes, which are dropped once no young sequence refers to it.
type span struct {
	spanRecord
	segments []*tiers.Header // by layer
	// guarded by the table:
	end       name // name of its last block, if all its tokens are named and it ends on a block
	committed bool // the catalogue has it
	leaving   bool // a change is being committed that removes it
}

// spanRecord is what the catalogue keeps of a span.
type spanRecord struct {
	ID       string   `json:"id"`
	Start    uint64   `json:"start"`
	Tokens   int      `json:"tokens"`
	Segments []string `json:"segments"` // ids, by layer
	TokenIDs []uint64 `json:"token_ids"`
	Texts    []byte   `json:"texts,omitempty"` // packed
}

func marshalSpan(sp *span) ([]byte, error) { return json.Marshal(&sp.spanRecord) }

func newSpanID() string {
	b := make([]byte, 16)
	_, _ = rand.Read(b) // never fails
	return hex.EncodeToString(b)
}

// spanTable counts who refers to spans and segments. Segments are counted too:
// equal rows sealed twice are one segment.
type spanTable struct {
	store *store.Store
	mu    struct {
		sync.Mutex
		refs     map[string]map[*sequence]bool
		spans    map[string]*span
		segments map[tiers.ID]int // spans that use it
		byEnd    map[name]*span   // the first span sealed under a name
	}
}

func newSpanTable(st *store.Store) *spanTable {
	t := &spanTable{store: st}
	t.mu.refs, t.mu.spans = map[string]map[*sequence]bool{}, map[string]*span{}
	t.mu.segments, t.mu.byEnd = map[tiers.ID]int{}, map[name]*span{}
	return t
}

// parseSpan reads a span's record, and the ids of its segments.
func parseSpan(value []byte) (r spanRecord, segments []tiers.ID, err error) {
	if err := json.Unmarshal(value, &r); err != nil {
		return r, nil, fmt.Errorf("span record: %w: %w", tiers.ErrCorrupt, err)
	}
	if r.Tokens < 1 || r.Tokens > tiers.SegmentTokens || len(r.TokenIDs) != r.Tokens {
		return r, nil, fmt.Errorf("span record %s: %w", r.ID, tiers.ErrCorrupt)
	}
	for _, s := range r.Segments {
		var id tiers.ID
		if b, err := hex.DecodeString(s); err != nil || copy(id[:], b) != len(id) {
			return r, nil, fmt.Errorf("span record %s: segment id: %w", r.ID, tiers.ErrCorrupt)
		}
		segments = append(segments, id)
	}
	return r, segments, nil
}

// load takes up a span from the catalogue.
func (t *spanTable) load(value []byte) error {
	r, segments, err := parseSpan(value)
	if err != nil {
		return err
	}
	sp := &span{spanRecord: r}
	for _, id := range segments {
		h, err := t.store.Header(id)
		if err != nil {
			return fmt.Errorf("span %s: %w", sp.ID, err)
		}
		sp.segments = append(sp.segments, h)
	}
	t.add(sp)
	sp.committed = true
	return nil
}

// add makes a span known.
func (t *spanTable) add(sp *span) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.mu.spans[sp.ID] = sp
	t.mu.refs[sp.ID] = map[*sequence]bool{}
	for _, h := range sp.segments {
		t.mu.segments[h.ID]++
	}
}

// find returns a span by id.
func (t *spanTable) find(id string) *span {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.mu.spans[id]
}

// setEnd notes the name that a span ends under.
func (t *spanTable) setEnd(sp *span, end name) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.unnameLocked(sp)
	sp.end = end
	if t.mu.byEnd[end] == nil {
		t.mu.byEnd[end] = sp
	}
}

func (t *spanTable) unnameLocked(sp *span) {
	if t.mu.byEnd[sp.end] == sp {
		delete(t.mu.byEnd, sp.end)
	}
}

// adopt returns the span that was sealed under a name before, and refers to it for s.
func (t *spanTable) adopt(s *sequence, end name, start uint64, tokens int) *span {
	t.mu.Lock()
	defer t.mu.Unlock()
	sp := t.mu.byEnd[end]
	if sp == nil || sp.leaving || sp.Start != start || sp.Tokens != tokens {
		return nil
	}
	for _, h := range sp.segments {
		if t.store.Damage(h.ID) != "" {
			return nil
		}
	}
	t.mu.refs[sp.ID][s] = true
	return sp
}

// refer says that s uses spans, which the catalogue has.
func (t *spanTable) refer(s *sequence, spans []spanRef) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, r := range spans {
		r.committed = true
		t.mu.refs[r.ID][s] = true
	}
}

// drop takes back references of a sequence that did not come to be.
func (t *spanTable) drop(s *sequence, spans []spanRef) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, r := range spans {
		delete(t.mu.refs[r.ID], s)
	}
}

// references returns how many sequences use a span.
func (t *spanTable) references(sp *span) int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.mu.refs[sp.ID])
}

// release commits b, in which s no longer uses spans; those that nobody else uses are removed with it. Meanwhile nobody adopts these, and only once the
// change stands is anything given up. The caller holds commits.
func (t *spanTable) release(ctx context.Context, s *sequence, spans []*span, b *store.Batch) error {
	gone, err := t.prepare(s, spans, b)
	if err == nil {
		err = b.Commit(ctx)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, sp := range gone {
		sp.leaving = false
	}
	if err != nil {
		return err
	}
	for _, sp := range spans {
		delete(t.mu.refs[sp.ID], s)
	}
	for _, sp := range gone {
		t.removeLocked(sp)
	}
	return nil
}

// prepare has b remove those of spans that nobody but s uses, and says which they are: they are leaving.
func (t *spanTable) prepare(s *sequence, spans []*span, b *store.Batch) (gone []*span, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	uses := map[tiers.ID]int{} // by those that go
	for _, sp := range spans {
		if others := len(t.mu.refs[sp.ID]); t.mu.spans[sp.ID] != sp || others > 1 || others == 1 && !t.mu.refs[sp.ID][s] {
			continue
		}
		gone, sp.leaving = append(gone, sp), true
		for _, h := range sp.segments {
			if uses[h.ID]++; uses[h.ID] == t.mu.segments[h.ID] {
				err = errors.Join(err, b.DropSegment(h.ID))
			}
		}
		err = errors.Join(err, b.Delete(store.KindSpan, []byte(sp.ID)))
	}
	return gone, err
}

// removeLocked forgets a span.
func (t *spanTable) removeLocked(sp *span) {
	delete(t.mu.spans, sp.ID)
	delete(t.mu.refs, sp.ID)
	t.unnameLocked(sp)
	for _, h := range sp.segments {
		if t.mu.segments[h.ID]--; t.mu.segments[h.ID] == 0 {
			delete(t.mu.segments, h.ID)
		}
	}
}

// forget takes back a span that was not committed, or s's reference to one
// that it adopted but does not use. It says whether that was the last one.
func (t *spanTable) forget(s *sequence, sp *span) (last bool) {
	st := s.snapshot()
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.mu.spans[sp.ID] == nil || slices.ContainsFunc(st.spans, func(r spanRef) bool { return r.span == sp }) {
		return false
	}
	delete(t.mu.refs[sp.ID], s)
	if len(t.mu.refs[sp.ID]) > 0 {
		return false
	}
	if !sp.committed {
		t.removeLocked(sp)
	}
	return sp.committed
}

// forget is spanTable.forget; a span that nobody uses any more is removed.
func (srv *Server) forget(ctx context.Context, s *sequence, sp *span) {
	if !srv.spans.forget(s, sp) {
		return
	}
	srv.commits.Lock()
	defer srv.commits.Unlock()
	if err := srv.releaseSpans(ctx, nil, []*span{sp}); err != nil {
		srv.log.Warn("remove a span that nobody uses; it goes at the next start", "span", sp.ID, "err", err)
	}
}

// unreferenced returns the spans that no sequence uses.
func (t *spanTable) unreferenced() (out []*span) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for id, refs := range t.mu.refs {
		if len(refs) == 0 {
			out = append(out, t.mu.spans[id])
		}
	}
	return out
}

// users returns the sequences that use a span.
func (t *spanTable) users(sp *span) (out []*sequence) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for s := range t.mu.refs[sp.ID] {
		out = append(out, s)
	}
	return out
}

// segmentsOf returns the segments of a layer that hold positions before end,
// as a query sees them.
func (srv *Server) segmentsOf(st *state, layer int, end uint64) (out []sparse.Segment) {
	for _, r := range st.spans {
		if r.Start >= end {
			break
		}
		limit := min(uint64(r.limit), end-r.Start)
		h := r.segments[layer]
		out = append(out, sparse.Segment{Header: h, Limit: int(limit), Low: srv.store.HasLow(h.ID)})
	}
	return out
}
