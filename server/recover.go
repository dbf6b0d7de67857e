package server

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sync/semaphore"

	kvtierv1 "kvtier/proto/kvtier/v1"
	"kvtier/tiers"
	"kvtier/tiers/files"
	"kvtier/tiers/store"
	"kvtier/tiers/taillog"
)

// recover takes up spans and sequences from the catalogue, and tails from their logs.
func (srv *Server) recover(ctx context.Context) error {
	if err := srv.store.Records(store.KindSpan, func(_, v []byte) error { return srv.spans.load(v) }); err != nil {
		return err
	}
	var records []*sequenceRecord
	err := srv.store.Records(store.KindSequence, func(k, v []byte) error {
		r, err := parseSequence(k, v)
		records = append(records, r)
		return err
	})
	if err != nil {
		return err
	}
	seqs, err := srv.recoverSequences(ctx, records)
	if err != nil {
		return err
	}
	logs := map[string]bool{}
	for _, s := range seqs {
		srv.spans.refer(s, s.mu.spans)
		srv.addSequence(s)
		s.nameAll()
		logs[filepath.Base(s.logPath(s.place.Gen))] = true
	}
	if err := srv.removeStrayLogs(logs); err != nil {
		return err
	}
	if err := srv.removeStraySpans(ctx); err != nil {
		return err
	}
	// Not before: what sealing makes, a log or a span, would look stray.
	for _, s := range srv.list() {
		srv.sealer.consider(s)
	}
	return nil
}

// removeStrayLogs removes logs that no sequence names: left by a crash.
func (srv *Server) removeStrayLogs(keep map[string]bool) error {
	names, err := srv.opt.FS.List(srv.tailDir())
	if err != nil {
		return err
	}
	for _, name := range names {
		if !keep[name] && filepath.Ext(name) == logSuffix {
			if err := srv.opt.FS.Remove(filepath.Join(srv.tailDir(), name)); err != nil {
				return err
			}
		}
	}
	return nil
}

func (srv *Server) removeStraySpans(ctx context.Context) error {
	stray := srv.spans.unreferenced()
	srv.commits.Lock()
	defer srv.commits.Unlock()
	return srv.releaseSpans(ctx, nil, stray)
}

// logsAtOnce is the share of the memory for tails that the logs which are read at the same time may have together; a larger
// one is read alone. So what is read besides the rows that are kept is bounded, too.
const logsAtOnce = .125

// recoverSequences takes up sequences, several at the same time; in what order is up to the machine, but the result is not: it has
// the records' order, and of several errors the first of that. Rows are kept in RAM of those that were used last, as far as
// they fit.
func (srv *Server) recoverSequences(ctx context.Context, records []*sequenceRecord) ([]*sequence, error) {
	seqs, errs := make([]*sequence, len(records)), make([]error, len(records))
	newest := make([]int, len(records))
	for i := range newest {
		newest[i] = i
	}
	slices.SortStableFunc(newest, func(a, b int) int { return cmp.Compare(records[b].Used, records[a].Used) })
	room := max(1, int64(logsAtOnce*float64(srv.opt.TailBytes)))
	reading := semaphore.NewWeighted(room)
	var g errgroup.Group
	g.SetLimit(srv.opt.RecoverAtOnce)
	for _, i := range newest {
		n := min(room, srv.logBytes(records[i]))
		if err := reading.Acquire(ctx, n); err != nil {
			errs[i] = err
			break
		}
		g.Go(func() error {
			defer reading.Release(n)
			seqs[i], errs[i] = srv.recoverSequence(ctx, records[i])
			return nil
		})
	}
	_ = g.Wait() // errors are in errs
	for i, err := range errs {
		if err == nil {
			continue
		}
		for _, s := range seqs {
			if s != nil {
				err = errors.Join(err, s.log.Close())
			}
		}
		return nil, fmt.Errorf("recover sequence %s: %w", records[i].ID, err)
	}
	return seqs, nil
}

// logBytes is the size of a sequence's log; 0 if it is not there or cannot be read, which recovery then finds.
func (srv *Server) logBytes(r *sequenceRecord) int64 {
	f, err := srv.opt.FS.Open(filepath.Join(srv.tailDir(), logName(r.ID, r.Gen)+logSuffix), files.Read)
	if err != nil {
		return 0
	}
	defer f.Close()
	n, err := f.Size()
	if err != nil {
		return 0
	}
	return n
}

// recoverSequence takes up one sequence. It is not known to the server yet.
func (srv *Server) recoverSequence(ctx context.Context, r *sequenceRecord) (*sequence, error) {
	sp, labels, err := r.model()
	if err != nil {
		return nil, err
	}
	s := srv.newSequence(r.ID, sp, r.Profile)
	s.name, s.parent, s.place = r.Name, r.Parent, r.logPlace
	s.created, s.mu.used = time.Unix(r.Created, 0), time.Unix(r.Used, 0)
	s.mu.exactUntil = r.ExactUntil
	s.mu.labels = labels
	if err := s.takeSpans(r.Spans); err != nil {
		return nil, err
	}
	if err := s.loadWindows(ctx); err != nil {
		s.damage(err) // the sealed part of full layers may still be read
	}
	if err := s.replay(); err != nil {
		return nil, err
	}
	s.mu.cutLabels(s.mu.accepted) // the step they came with may not have been whole
	s.mu.power, s.mu.crashSafe = s.mu.accepted, s.mu.accepted
	return s, nil
}

// damage notes that stored bytes of the sequence are gone.
func (s *sequence) damage(err error) {
	s.srv.log.Error("a sequence is damaged", "sequence", s.id, "err", err)
	s.mu.Lock()
	s.mu.damaged = err.Error()
	s.mu.Unlock()
}

func (s *sequence) takeSpans(refs []spanRefRecord) (err error) {
	var at uint64
	if s.mu.spans, at, err = joinSpans(refs, s.spec.layers, s.srv.spans.find); err != nil {
		return err
	}
	for l := range s.mu.lens {
		s.mu.lens[l] = at
		s.mu.rows[l].base = at
	}
	s.mu.accepted = at
	return nil
}

// joinSpans finds a sequence's spans, which must follow each other from its
// first token on, and says where they end.
func joinSpans(refs []spanRefRecord, layers int, find func(id string) *span) (spans []spanRef, end uint64, err error) {
	for _, ref := range refs {
		sp := find(ref.Span)
		if sp == nil || sp.Start != end || ref.Limit < 1 || ref.Limit > sp.Tokens || len(sp.segments) != layers {
			return nil, end, fmt.Errorf("span %s: %w", ref.Span, tiers.ErrCorrupt)
		}
		spans = append(spans, spanRef{sp, ref.Limit})
		end += uint64(ref.Limit)
	}
	return spans, end, nil
}

// loadWindows reads the windows of sliding-window layers, as they were at the
// end of the sealed part.
func (s *sequence) loadWindows(ctx context.Context) error {
	for l, w := range s.spec.window {
		if w == 0 || len(s.mu.spans) == 0 {
			continue
		}
		r, err := s.window(ctx, s.mu.spans, l)
		if err != nil {
			return err
		}
		s.mu.rows[l] = r
	}
	return nil
}

// window reads the rows of a sliding-window layer that a query behind spans may see.
func (s *sequence) window(ctx context.Context, spans []spanRef, layer int) (layerRows, error) {
	used, err := s.spec.windowSpans(spans, layer)
	if err != nil {
		return layerRows{}, err
	}
	out := layerRows{base: spans[len(spans)-1].end()}
	if n := len(used); n > 0 {
		out.base = used[n-1].end() - uint64(s.spec.windowTokens(used[n-1].segments[layer]))
	}
	for _, ref := range slices.Backward(used) {
		k, v, err := s.windowRows(ctx, ref, layer)
		if err != nil {
			return layerRows{}, err
		}
		out.add(s.spec, k, v, asNeeded)
	}
	return out, nil
}

// windowSpans returns the spans, from the last one back, whose windows hold the
// rows of a layer that a query behind spans may see.
func (sp *spec) windowSpans(spans []spanRef, layer int) (used []spanRef, err error) {
	last := spans[len(spans)-1]
	end := last.end()
	if last.limit != last.Tokens {
		return nil, fmt.Errorf("layer %d keeps its window at token %d, not at %d: %w", layer, last.Start+uint64(last.Tokens), end, tiers.ErrNotFound)
	}
	base, want := end, end-min(end, uint64(sp.window[layer]))
	for i := len(spans) - 1; i >= 0 && base > want; i-- {
		n := sp.windowTokens(spans[i].segments[layer])
		if spans[i].Start+uint64(spans[i].Tokens) != base || n == 0 {
			break
		}
		used, base = append(used, spans[i]), base-min(base, uint64(n))
	}
	if base > want {
		return nil, fmt.Errorf("layer %d: the window from token %d on is not stored: %w", layer, want, tiers.ErrNotFound)
	}
	return used, nil
}

// windowTokens returns how many rows a window segment has; 0 if it is none.
func (sp *spec) windowTokens(h *tiers.Header) int {
	_, n, _ := h.Piece(0, tiers.PlaneWindow)
	return n / (2 * sp.headDim * sp.typ.Size())
}

// windowRows reads one window segment as rows [n][kvHeads][headDim].
func (s *sequence) windowRows(ctx context.Context, ref spanRef, layer int) (k, v []byte, err error) {
	h, sp := ref.segments[layer], s.spec
	reqs := make([]tiers.Request, sp.kvHeads)
	for i := range reqs {
		reqs[i] = tiers.Request{Header: h, Head: i, Plane: tiers.PlaneWindow}
	}
	pins, _, err := s.srv.store.Pin(ctx, reqs)
	if err != nil {
		return nil, nil, err
	}
	row := sp.headDim * sp.typ.Size()
	n := len(pins[0].Ranges[0]) / (2 * row)
	k, v = make([]byte, n*sp.rowBytes()), make([]byte, n*sp.rowBytes())
	for head := range pins {
		b := pins[head].Ranges[0]
		for t := range n {
			at := t*sp.rowBytes() + head*row
			copy(k[at:at+row], b[t*row:])
			copy(v[at:at+row], b[(n+t)*row:])
		}
		pins[head].Release(0)
	}
	return k, v, nil
}

// replay takes up the tail from its log. If its rows do not fit into the memory for tails, it is a spilled one.
func (s *sequence) replay() error {
	st := &s.mu.state
	lost := lostRecords{keep: allExact}
	kept, tail := s.keepRows(st, 0), newTailReader(s.spec, st.sealed(), s.place)
	log, cut, err := taillog.Replay(s.srv.opt.FS, s.logPath(s.place.Gen), s.logName(s.place.Gen), taillog.Reader{
		Record: func(k taillog.Kind, body []byte) error {
			if err := s.replayRecord(st, tail, k, body, func(int) bool { return !st.spilled }); err != nil {
				return err
			}
			kept = s.keepRows(st, kept)
			return nil
		},
		Behind: lost.note,
	})
	if st.spilled {
		for l := range st.rows {
			st.rows[l] = layerRows{base: st.accepted}
		}
	}
	if errors.Is(err, fs.ErrNotExist) {
		s.damage(fmt.Errorf("the log of the open tail is missing: tokens from %d on are lost", st.accepted))
		log, err = taillog.Create(s.srv.opt.FS, s.logPath(s.place.Gen), s.logName(s.place.Gen))
	}
	if err != nil {
		return err
	}
	if cut > 0 {
		s.srv.log.Warn("the end of a log was not whole", "sequence", s.id, "bytes", cut, "tokens", st.accepted)
	}
	s.log = log
	if tail.mark != 0 { // it is gone, as what else was lost: what comes is newer than the sequence's record
		if err := s.logMark(tail.mark); err != nil {
			return err
		}
	}
	if least := max(lost.keep, st.sealed()); least < st.accepted {
		if err := errors.Join(s.logTruncation(least), log.Sync()); err != nil {
			return err
		}
		st.cutTail(least, s.spec)
		s.keepRows(st, kept)
	}
	if tail.textless != nil {
		s.damage(tail.textless)
	}
	if !lost.damaged {
		return nil
	}
	s.damage(fmt.Errorf("the log of the open tail is damaged: tokens from %d on are lost: append them again", st.accepted))
	return nil
}

// keepRows counts the rows of a tail that is being taken up, of which kept bytes were counted before. If they do not fit, the tail is
// spilled, and what follows is checked, but not kept. It returns what is counted now.
func (s *sequence) keepRows(st *state, kept int64) int64 {
	if st.spilled {
		return 0
	}
	n := st.tailBytes(s.spec)
	if s.srv.tail.Add(n-kept) <= int64(spillTo*float64(s.srv.opt.TailBytes)) {
		return n
	}
	s.srv.tail.Add(-n)
	st.spilled = true
	for l, r := range st.rows {
		st.rows[l] = layerRows{base: r.base}
	}
	return 0
}

// lostRecords is what whole records behind lost ones say of those.
type lostRecords struct {
	damaged bool   // they were synced: no power cut explains it
	keep    uint64 // tokens that stay as they are
}

func (x *lostRecords) note(b taillog.Behind) {
	x.damaged = x.damaged || b.Durable
	x.keep = min(x.keep, untouched(b))
}

// untouched returns how many tokens stay as they are although records before b
// are lost. What a power cut lost was never power-safe, and b knows how much of
// what was it left. Damage may have taken more: of one lost record it is known
// what it left, because rows follow where they belong and a truncation is
// written twice. Of more, nothing is.
func untouched(b taillog.Behind) uint64 {
	switch {
	case !b.Durable:
		return b.Keeps
	case b.Lost > 1:
		return 0
	case (b.Kind == logRows || b.Kind == logTruncate) && len(b.Body) >= 8:
		return binary.LittleEndian.Uint64(b.Body) // both begin with it
	}
	return allExact
}

// replayRecord takes in what a record says; rows of those layers alone that are to be kept.
func (s *sequence) replayRecord(st *state, tail *tailReader, k taillog.Kind, body []byte, keep func(layer int) bool) error {
	rec, err := tail.next(k, body)
	if err != nil {
		return err
	}
	if r := rec.rows; r != nil {
		for l := range st.rows {
			if keep(l) {
				st.rows[l].add(s.spec, r.k[l], r.v[l], doubling)
			}
			st.lens[l] += uint64(r.n)
		}
		st.accepted += uint64(r.n)
		if !rec.old {
			st.exactUntil = r.exactUntil
		}
		st.ids, st.texts = append(st.ids, r.ids...), append(st.texts, r.texts...)
	}
	st.labels = append(st.labels, rec.labels...)
	switch {
	case rec.keeps == nil:
	case rec.old:
		st.cutRows(*rec.keeps, s.spec)
	default:
		st.cutTail(*rec.keeps, s.spec)
	}
	return nil
}

// cutRows keeps the rows and ids of the first n tokens, n not being sealed.
func (st *state) cutRows(n uint64, sp *spec) {
	for l := range st.rows {
		st.rows[l] = st.rows[l].upTo(sp, n)
		st.lens[l] = min(st.lens[l], n)
	}
	st.accepted = min(st.accepted, n)
	st.crashSafe = min(st.crashSafe, n)
	keep := min(uint64(len(st.ids)), n-st.sealed())
	st.ids, st.texts = st.ids[:keep:keep], st.texts[:keep:keep]
}

// cutTail keeps the first n tokens, n not being sealed.
func (st *state) cutTail(n uint64, sp *spec) {
	if next := (st.sealed()/tiers.SegmentTokens + 1) * tiers.SegmentTokens; n < min(st.accepted, next) {
		st.cuts++ // behind the next segment a sealing under way is not concerned
	}
	st.cutRows(n, sp)
	st.cutLabels(n)
	if st.exactUntil >= n {
		st.exactUntil = allExact
	}
}

func (st *state) cutLabels(n uint64) {
	var labels []*kvtierv1.Span
	for _, l := range st.labels {
		if l.End <= n {
			labels = append(labels, l)
		}
	}
	st.labels = labels
}

// nameAll names every whole block from the start, and notes spans' end names.
func (s *sequence) nameAll() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.srv.names.remove(s, s.mu.names)
	var ids []uint64
	for _, r := range s.mu.spans {
		ids = append(ids, r.TokenIDs[:r.limit]...)
	}
	ids = append(ids, s.mu.ids...)
	if uint64(len(ids)) > s.mu.accepted {
		ids = ids[:s.mu.accepted]
	}
	s.mu.names = newNamer(s.srv.key, s.spec, s.profile).chain(nil, ids, s.mu.exactUntil)
	s.srv.names.add(s, s.mu.names)
	for _, r := range s.mu.spans {
		end := r.Start + uint64(r.Tokens)
		if r.limit == r.Tokens && end%blockTokens == 0 && end/blockTokens <= uint64(len(s.mu.names)) {
			s.srv.spans.setEnd(r.span, s.mu.names[end/blockTokens-1])
		}
	}
}
