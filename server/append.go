package server

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"slices"
	"time"

	"google.golang.org/grpc/codes"

	"kvtier/compress"
	kvtierv1 "kvtier/proto/kvtier/v1"
	"kvtier/tiers"
	"kvtier/tiers/taillog"
)

// appendRequest is an append of one layer's rows, from either front end.
type appendRequest struct {
	layer   int
	start   uint64
	k, v    []byte // [n][kvHeads][headDim] of typ
	typ     compress.ElementType
	convert bool
	sparse  bool
	ids     []uint64 // n, or none
	texts   [][]byte // n, or none
	labels  []*kvtierv1.Span
	queries []byte // [m][queryHeads][headDim] of typ
}

// limits of labels, and of tokens' texts, which are for people: they lie in RAM, in logs and in the catalogue.
const (
	maxLabels       = 1 << 16
	maxLabelText    = 1024
	maxTokenText    = 4 << 10  // bytes of one token
	maxRequestTexts = 16 << 20 // bytes of all tokens of a request
)

// append takes in rows. What it refuses changes nothing, but for tokens that were logged before the log took no more: those stay.
func (s *sequence) append(ctx context.Context, r *appendRequest) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	in, err := s.checkAppend(r)
	if err != nil {
		return err
	}
	s.write.Lock()
	defer s.write.Unlock()
	if err := s.usable(); err != nil {
		return err
	}
	if err := s.appendRows(in); err != nil {
		return err
	}
	s.learn(in)
	s.srv.metrics.appended.Add(1)
	s.srv.sealer.consider(s)
	return nil
}

// usable says whether the sequence may still be changed.
func (s *sequence) usable() error {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.mu.deleted {
		return s.errDeleted()
	}
	return nil
}

func (s *sequence) errDeleted() error {
	return fail(codes.NotFound, ReasonUnknown, "sequence %s was deleted", s.id)
}

// checked is an append whose sizes and values are in order.
type checked struct {
	*appendRequest
	n       int
	queries []float32 // unscaled
}

func (s *sequence) checkAppend(r *appendRequest) (*checked, error) {
	sp := s.spec
	if r.typ == 0 {
		r.typ = sp.typ
	}
	in := &checked{appendRequest: r}
	if len(r.k) != len(r.v) {
		return nil, invalid(ReasonShape, "k has %d bytes and v %d: give both, of one size", len(r.k), len(r.v))
	}
	if len(r.k) > 0 || len(r.queries) > 0 {
		if r.layer < 0 || r.layer >= sp.layers {
			return nil, invalid(ReasonShape, "layer %d: the model has %d", r.layer, sp.layers)
		}
	}
	row := sp.kvHeads * sp.headDim * r.typ.Size()
	if row == 0 || len(r.k)%row != 0 {
		return nil, invalid(ReasonShape, "k has %d bytes, not a multiple of a token's %d (kv_heads %d x head_dim %d)", len(r.k), row, sp.kvHeads, sp.headDim)
	}
	in.n = len(r.k) / row
	n := in.n // or, with ids alone, how many tokens they are for
	if n == 0 {
		n = len(r.ids)
	}
	if len(r.ids) != 0 && len(r.ids) != n {
		return nil, invalid(ReasonShape, "%d token ids for %d tokens", len(r.ids), n)
	}
	if len(r.texts) != 0 && len(r.texts) != len(r.ids) {
		return nil, invalid(ReasonShape, "%d token texts for %d token ids", len(r.texts), len(r.ids))
	}
	if r.start > 1<<40 {
		return nil, invalid(ReasonArgument, "start %d is out of range", r.start)
	}
	var err error
	if r.k, err = convertRows("k", r.k, r.typ, sp.typ, r.convert); err != nil {
		return nil, err
	}
	if r.v, err = convertRows("v", r.v, r.typ, sp.typ, r.convert); err != nil {
		return nil, err
	}
	if in.queries, err = toFloats("queries", r.queries, r.typ); err != nil {
		return nil, err
	}
	if len(in.queries)%(sp.queryHeads*sp.headDim) != 0 {
		return nil, invalid(ReasonShape, "queries has %d elements, not a multiple of query_heads x head_dim = %d", len(in.queries), sp.queryHeads*sp.headDim)
	}
	if err := checkTexts(r.texts); err != nil {
		return nil, err
	}
	return in, s.checkLabels(r.labels)
}

func checkTexts(texts [][]byte) error {
	total := 0
	for i, t := range texts {
		if len(t) > maxTokenText {
			return invalid(ReasonArgument, "the text of token %d of %d has %d bytes, more than %d: shorten it, or leave it out", i, len(texts), len(t), maxTokenText)
		}
		total += len(t)
	}
	if total > maxRequestTexts {
		return invalid(ReasonArgument, "the texts of %d tokens have %d bytes, more than %d: append the tokens in several requests", len(texts), total, maxRequestTexts)
	}
	return nil
}

func (s *sequence) checkLabels(labels []*kvtierv1.Span) error {
	for _, l := range labels {
		switch {
		case l.Start >= l.End:
			return invalid(ReasonArgument, "span %q is empty: start %d, end %d", l.Label, l.Start, l.End)
		case len(l.Label) > maxLabelText:
			return invalid(ReasonArgument, "a span's label has %d bytes, more than %d", len(l.Label), maxLabelText)
		}
	}
	return nil
}

// appendRows adds the rows to the tail and, if the step is whole, to the log.
func (s *sequence) appendRows(in *checked) error {
	st, err := s.wholeLocked()
	if err != nil {
		return err
	}
	fresh := 0
	if in.n > 0 {
		if fresh, err = s.overlap(&st, in); err != nil {
			return err
		}
	}
	if end := in.start + uint64(len(in.ids)); in.n == 0 && end > slices.Max(st.lens) {
		return fail(codes.OutOfRange, ReasonPastEnd, "token ids up to %d, but no layer has more than %d tokens: append rows first, or in the same call", end, slices.Max(st.lens))
	}
	for _, l := range in.labels {
		if l.End > max(st.accepted, in.start+uint64(in.n)) {
			return invalid(ReasonArgument, "span %q ends at %d, past the tokens", l.Label, l.End)
		}
	}
	if len(st.labels)+len(in.labels) > maxLabels {
		return invalid(ReasonArgument, "more than %d labelled spans", maxLabels)
	}
	if fresh > 0 {
		if err := s.backlog(&st); err != nil {
			s.srv.sealer.consider(s)
			return err
		}
	}
	release, err := s.srv.reserveTail(int64(2 * fresh * s.spec.rowBytes()))
	if err != nil {
		s.srv.sealer.consider(s)
		return err
	}
	defer release() // by then the rows are counted themselves, or refused
	next := st
	if in.sparse && fresh > 0 { // rows that are there already are what they were
		next.exactUntil = min(next.exactUntil, in.start+uint64(in.n-fresh))
	}
	s.takeIDs(&next, in)
	if fresh > 0 {
		off := (in.n - fresh) * s.spec.rowBytes()
		next.rows[in.layer] = st.rows[in.layer].appended(s.spec, in.k[off:], in.v[off:], s.srv.growthFor(s.spec))
		next.lens[in.layer] += uint64(fresh)
	}
	next.accepted = slices.Min(next.lens)
	logged, err := s.writeLog(&st, &next, in.labels)
	switch {
	case err == nil:
		next.labels = append(st.labels[:len(st.labels):len(st.labels)], in.labels...)
	case logged == st.accepted:
		return err
	default:
		next.keepLogged(&st, logged, in.layer, s.spec)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mu.used = time.Now()
	next.exactUntil = min(next.exactUntil, s.mu.exactUntil) // a query may have lowered it meanwhile
	next.names = s.mu.names
	s.setStateLocked(next)
	s.extendNamesLocked()
	return err
}

// overlap checks rows that are there already and returns how many are new.
func (s *sequence) overlap(st *state, in *checked) (fresh int, err error) {
	have := st.lens[in.layer]
	end := in.start + uint64(in.n)
	switch {
	case in.start > have:
		return 0, fail(codes.OutOfRange, ReasonGap, "layer %d has %d tokens: rows from %d would leave a gap", in.layer, have, in.start)
	case in.start < st.sealed() && end > in.start:
		return 0, fail(codes.AlreadyExists, ReasonSealed, "tokens before %d are sealed: append from there, or truncate first", st.sealed())
	}
	old := min(have, end)
	if old > in.start {
		n := int(old-in.start) * s.spec.rowBytes()
		k, v := st.rows[in.layer].slice(s.spec, in.start, old)
		if !bytes.Equal(k, in.k[:n]) || !bytes.Equal(v, in.v[:n]) {
			return 0, fail(codes.AlreadyExists, ReasonExists, "other rows are stored for positions %d to %d of layer %d: truncate first", in.start, old, in.layer)
		}
	}
	return int(end - old), nil
}

// takeIDs takes in ids and texts of tokens; the first to give them counts.
func (s *sequence) takeIDs(st *state, in *checked) {
	if len(in.ids) == 0 {
		return
	}
	sealed := st.sealed()
	ids, texts := append([]uint64(nil), st.ids...), append([][]byte(nil), st.texts...)
	for i, id := range in.ids {
		pos := in.start + uint64(i)
		if pos < sealed || pos < st.accepted && pos-sealed < uint64(len(ids)) {
			continue
		}
		for uint64(len(ids)) <= pos-sealed {
			ids, texts = append(ids, noToken), append(texts, nil)
		}
		if at := pos - sealed; ids[at] == noToken {
			ids[at] = id
			if i < len(in.texts) {
				texts[at] = in.texts[i]
			}
		}
	}
	st.ids, st.texts = ids, texts
}

// writeLog logs the step that next completes, if it does, and labels. It says up to which token rows are logged, whether or not it fails.
func (s *sequence) writeLog(old, next *state, labels []*kvtierv1.Span) (logged uint64, err error) {
	logged, err = s.logTokens(s.log, next, old.accepted, next.accepted)
	if logged > old.accepted {
		next.crashSafe = logged
		s.noteWritten(logged)
	}
	if err != nil || len(labels) == 0 {
		return logged, err
	}
	// Behind the rows: who repeats a step that failed does not have its labels twice.
	b, err := marshalLabels(labels)
	if err != nil {
		return logged, err
	}
	return logged, s.log.Append(logLabels, b)
}

// keepLogged has st, which grew from old by an append to layer, end at token n: rows from there on could not be logged.
func (st *state) keepLogged(old *state, n uint64, layer int, sp *spec) {
	st.accepted, st.lens[layer] = n, n
	st.rows[layer] = st.rows[layer].upTo(sp, n)
	at := min(n-st.sealed(), uint64(len(st.ids)))
	rest := min(at, uint64(len(old.ids))) // what is known of tokens from n on is what was before
	st.ids, st.texts = slices.Concat(st.ids[:at], old.ids[rest:]), slices.Concat(st.texts[:at], old.texts[rest:])
}

// logChunk bounds what is in one record of tokens, in bytes: of a chunk of a large model's prompt there are many records, so that none
// outgrows what a log takes, and recovery has room for one of them. A token that has more is a record of its own.
const logChunk = 64 << 20

// logTokens writes tokens [lo, hi) of all layers in as many records as they need, and says up to where they were written: a record that
// fails leaves those before it.
func (s *sequence) logTokens(log *taillog.Log, st *state, lo, hi uint64) (logged uint64, err error) {
	for lo < hi {
		end := s.recordEnd(st, lo, hi)
		if err := s.logRecord(log, st, lo, end); err != nil {
			return lo, err
		}
		lo = end
	}
	return lo, nil
}

// recordEnd says where the record of tokens that begins at lo ends, of those up to hi.
func (s *sequence) recordEnd(st *state, lo, hi uint64) uint64 {
	fixed := s.spec.tokenBytes() + 8 + binary.MaxVarintLen32 // rows, id, length of the text
	size := 0
	for pos := lo; pos < hi; pos++ {
		_, text := st.token(pos)
		if size += fixed + len(text); size > logChunk {
			return max(pos, lo+1)
		}
	}
	return hi
}

// token returns the id and the text of a token that is not sealed.
func (st *state) token(pos uint64) (id uint64, text []byte) {
	if at := pos - st.sealed(); at < uint64(len(st.ids)) {
		return st.ids[at], st.texts[at]
	}
	return noToken, nil
}

// logRecord writes tokens [lo, hi) of all layers as one record.
func (s *sequence) logRecord(log *taillog.Log, st *state, lo, hi uint64) error {
	r := rowsRecord{start: lo, n: int(hi - lo), exactUntil: st.exactUntil}
	for pos := lo; pos < hi; pos++ {
		id, text := st.token(pos)
		r.ids, r.texts = append(r.ids, id), append(r.texts, text)
	}
	parts := slices.Grow(r.marshal(), 2*len(st.rows)*int(hi-lo)*s.spec.kvHeads)
	for l := range st.rows {
		parts = st.rows[l].parts(s.spec, parts, lo, hi)
	}
	return log.Append(logRows, parts...)
}

// logTruncation logs that n tokens are kept.
func (s *sequence) logTruncation(n uint64) error {
	return s.log.TakeBack(logTruncate, n, binary.LittleEndian.AppendUint64(nil, n))
}

// noteWritten remembers how far the log must be synced for tokens to be power-safe.
func (s *sequence) noteWritten(tokens uint64) {
	written, _ := s.log.Size()
	s.mu.Lock()
	s.mu.powerPos = append(s.mu.powerPos, synced{s.log, written, tokens})
	s.mu.Unlock()
	s.srv.syncer.dirty(s)
}

// learn takes in the sampled queries.
func (s *sequence) learn(in *checked) {
	if len(in.queries) == 0 {
		return
	}
	s.observe(in.layer, in.queries)
}

// codecRows is about how many of the latest queries of a KV head a layer keeps, to measure the codec on: with 64 a
// segment takes a fifth longer.
const codecRows = 16

// sampleOf returns one query position in eight of an answer's queries, which
// is enough for a metric: [rows][queryHeads][headDim], unscaled.
func sampleOf(q []float32, sp *spec, start uint64) (out []float32) {
	row := sp.queryHeads * sp.headDim
	for i := 0; i*row < len(q); i++ {
		if (start+uint64(i))%8 == 0 {
			out = append(out, q[i*row:(i+1)*row]...)
		}
	}
	return out
}

// observe adds queries [rows][queryHeads][headDim] to a full layer's metric.
func (s *sequence) observe(layer int, q []float32) {
	sp := s.spec
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.mu.queries[layer] == nil || len(q) == 0 {
		return
	}
	d, g := sp.headDim, sp.group()
	row := sp.queryHeads * d
	scaled := make([]float32, len(q))
	for i, x := range q {
		scaled[i] = x * sp.scale
	}
	for at := 0; at < len(scaled); at += row {
		for h := range sp.kvHeads {
			s.mu.queries[layer][h].Add(scaled[at+h*g*d : at+(h+1)*g*d])
		}
	}
	keep := append(s.mu.sample[layer][:len(s.mu.sample[layer]):len(s.mu.sample[layer])], scaled...)
	s.mu.sample[layer] = keep[max(0, len(keep)-max(1, codecRows/g)*row):]
}

// reserveTail reserves memory for rows until release is called. Idle tails are
// spilled for it.
func (srv *Server) reserveTail(need int64) (release func(), err error) {
	if need == 0 {
		return func() {}, nil
	}
	for try := range 2 {
		if srv.tail.Add(need) <= srv.opt.TailBytes {
			return func() { srv.tail.Add(-need) }, nil
		}
		srv.tail.Add(-need)
		if try == 0 {
			srv.makeRoom(need)
		}
	}
	if cause := srv.sealer.lastFailure(); cause != nil {
		return nil, fmt.Errorf("open tails fill their memory, because segments cannot be sealed: %w", cause)
	}
	e := fail(codes.ResourceExhausted, ReasonTailFull,
		"open tails fill their %d bytes of memory: wait until segments are sealed, delete sequences, or raise --tail", srv.opt.TailBytes)
	e.Retry = 200 * time.Millisecond
	return nil, e
}

// Of a large model not more than so many full segments wait to be sealed: what waits is written to another log once more, and fills
// memory that other sequences' tails need.
const (
	mostWaiting = 2
	largeTail   = 256 << 20 // bytes
)

// backlog puts appends off while too much of the sequence waits to be sealed.
func (s *sequence) backlog(st *state) error {
	if st.accepted < st.sealed()+mostWaiting*tiers.SegmentTokens+recentTokens || st.tailBytes(s.spec) < s.srv.largeTail {
		return nil
	}
	if cause := s.srv.sealer.lastFailure(); cause != nil {
		return fmt.Errorf("%d tokens wait, because segments cannot be sealed: %w", st.accepted-st.sealed(), cause)
	}
	e := fail(codes.ResourceExhausted, ReasonTailFull, "%d tokens of sequence %s wait to be sealed: go on when they are", st.accepted-st.sealed(), s.id)
	e.Retry = 50 * time.Millisecond
	return e
}

// growthFor says how rows in RAM may grow: to more than they need only if half of their memory is free, for a chunk of each layer only if it is then, too.
func (srv *Server) growthFor(sp *spec) growth {
	switch used, most := srv.tail.Load(), srv.opt.TailBytes/2; {
	case used >= most:
		return asNeeded
	case used+chunkTokens*int64(sp.tokenBytes()) >= most:
		return doubling
	}
	return prefill
}

// sealPoint returns the end of the next full segment, if it lies behind the
// recent window.
func (st *state) sealPoint() (end uint64, ok bool) {
	end = (st.sealed()/tiers.SegmentTokens + 1) * tiers.SegmentTokens
	return end, st.accepted >= end+recentTokens
}
