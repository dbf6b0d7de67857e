package server

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"time"
	"unicode/utf8"

	"google.golang.org/grpc/codes"

	kvtierv1 "kvtier/proto/kvtier/v1"
	"kvtier/tiers"
	"kvtier/tiers/store"
)

const maxNameBytes = 256

// open makes a sequence, forks one, or opens one that exists. The caller holds it, and its use ends with release.
func (srv *Server) open(ctx context.Context, r *kvtierv1.OpenSequenceRequest) (s *sequence, release func(), err error) {
	switch {
	case r.SequenceId != "":
		if s, err = srv.openExisting(r); err != nil {
			return nil, nil, err
		}
		release, err = s.hold()
	case len(r.Name) > maxNameBytes || !utf8.ValidString(r.Name):
		err = invalid(ReasonArgument, "a name is at most %d bytes of UTF-8", maxNameBytes)
	case r.ForkOf != "":
		s, release, err = srv.fork(ctx, r)
	default:
		s, release, err = srv.create(ctx, r)
	}
	if err != nil {
		return nil, nil, err
	}
	return s, release, nil
}

// create makes a sequence that is empty.
func (srv *Server) create(ctx context.Context, r *kvtierv1.OpenSequenceRequest) (s *sequence, release func(), err error) {
	sp, err := newSpec(r.Spec)
	if err != nil {
		return nil, nil, err
	}
	p, err := profileOf(r.Profile)
	if err != nil {
		return nil, nil, err
	}
	s = srv.newSequence(newSequenceID(), sp, p)
	s.name = r.Name
	release, err = srv.commitNew(ctx, s, s.snapshot())
	return s, release, err
}

func newSequenceID() string {
	b := make([]byte, 12)
	_, _ = rand.Read(b) // never fails
	return hex.EncodeToString(b)
}

func (srv *Server) openExisting(r *kvtierv1.OpenSequenceRequest) (*sequence, error) {
	s, err := srv.sequence(r.SequenceId)
	if err != nil {
		return nil, err
	}
	if err := s.sameModel(r); err != nil {
		return nil, err
	}
	s.touch()
	return s, nil
}

// sameModel compares what a request says of spec and profile, if it says
// anything, with the sequence that it opens or forks.
func (s *sequence) sameModel(r *kvtierv1.OpenSequenceRequest) error {
	if r.Spec != nil {
		sp, err := newSpec(r.Spec)
		if err != nil {
			return err
		}
		if err := s.spec.equal(sp); err != nil {
			return err
		}
	}
	p, err := profileOf(r.Profile)
	if err != nil {
		return err
	}
	if r.Profile != kvtierv1.Profile_PROFILE_UNSPECIFIED && p != s.profile {
		return fail(codes.FailedPrecondition, ReasonSpecDiffers, "the sequence's profile is %d: name that one, or none", s.profile)
	}
	return nil
}

// commitNew makes a new sequence with state st durable and known. It is held before anybody can see it.
func (srv *Server) commitNew(ctx context.Context, s *sequence, st state) (release func(), err error) {
	b := srv.store.NewBatch()
	defer b.Close()
	s.write.Lock()
	defer s.write.Unlock()
	if err := s.replaceLog(ctx, &st, b); err != nil {
		srv.spans.drop(s, st.spans)
		return nil, err
	}
	if release, err = s.hold(); err != nil {
		return nil, err
	}
	srv.addSequence(s)
	return release, nil
}

// fork makes a sequence that begins with another one's first tokens.
func (srv *Server) fork(ctx context.Context, r *kvtierv1.OpenSequenceRequest) (s *sequence, release func(), err error) {
	from, err := srv.sequence(r.ForkOf)
	if err != nil {
		return nil, nil, err
	}
	if err := from.sameModel(r); err != nil {
		return nil, nil, err
	}
	// The origin's write lock keeps its spans from being removed meanwhile.
	from.write.Lock()
	defer from.write.Unlock()
	if err := from.usable(); err != nil {
		return nil, nil, err
	}
	if err := from.beginsWith(r.ForkPrefix); err != nil {
		return nil, nil, err
	}
	st, err := from.wholeLocked()
	if err != nil {
		return nil, nil, err
	}
	at := r.ForkAt
	if at == 0 {
		at = st.accepted
	}
	if at > st.accepted {
		return nil, nil, fail(codes.OutOfRange, ReasonPastEnd, "fork at %d: the sequence has %d tokens", at, st.accepted)
	}
	s = srv.newSequence(newSequenceID(), from.spec, from.profile)
	s.name, s.parent = r.Name, from.id
	if st, err = from.cut(ctx, st, at); err != nil {
		return nil, nil, err
	}
	for l, r := range st.rows {
		st.rows[l] = r.forked(s.spec, r.end())
	}
	srv.spans.refer(s, st.spans)
	s.mu.exactUntil = st.exactUntil
	from.mu.RLock()
	for l := range from.mu.queries {
		for h, q := range from.mu.queries[l] {
			s.mu.queries[l][h] = q.Clone()
		}
		s.mu.sample[l] = from.mu.sample[l]
	}
	from.mu.RUnlock()
	s.steering.from(&from.steering)
	st.names = nil
	if release, err = srv.commitNew(ctx, s, st); err != nil {
		return nil, nil, err
	}
	s.nameAll()
	return s, release, nil
}

// beginsWith says whether the sequence begins with what was found there before; nil is nothing.
func (s *sequence) beginsWith(p *kvtierv1.Prefix) error {
	if p == nil {
		return nil
	}
	if p.Tokens == 0 || p.Tokens%blockTokens != 0 || len(p.Name) != len(name{}) {
		return invalid(ReasonArgument, "fork_prefix has %d tokens and a name of %d bytes: give what MatchPrefix returned", p.Tokens, len(p.Name))
	}
	s.mu.RLock()
	defer s.mu.RUnlock()
	if !s.namedLocked(p.Tokens, name(p.Name)) {
		return fail(codes.NotFound, ReasonPrefixGone, "sequence %s does not begin with the tokens that were matched any more: match again", s.id)
	}
	return nil
}

// namedLocked says whether the sequence's first n tokens, whole blocks, have that name.
func (s *sequence) namedLocked(n uint64, of name) bool {
	at := n / blockTokens
	return at > 0 && at <= uint64(len(s.mu.names)) && s.mu.names[at-1] == of
}

// cut returns the state of a sequence's first n tokens.
func (s *sequence) cut(ctx context.Context, st state, n uint64) (state, error) {
	if n >= st.sealed() {
		st.cutTail(n, s.spec)
		return st, nil
	}
	spans := st.spans
	for len(spans) > 0 && spans[len(spans)-1].Start >= n {
		spans = spans[:len(spans)-1]
	}
	st.spans = append([]spanRef(nil), spans...)
	if len(st.spans) > 0 {
		last := &st.spans[len(st.spans)-1]
		last.limit = min(last.limit, int(n-last.Start))
	}
	st.rows, st.spilled = make([]layerRows, s.spec.layers), false
	st.lens = make([]uint64, s.spec.layers)
	for l, w := range s.spec.window {
		st.rows[l].base, st.lens[l] = n, n
		if w == 0 || n == 0 {
			continue
		}
		r, err := s.window(ctx, st.spans, l)
		if errors.Is(err, tiers.ErrNotFound) {
			return st, fail(codes.FailedPrecondition, ReasonForkPoint, "the model's sliding-window layers cannot continue at token %d: fork at a multiple of %d, or in the open tail (%v)", n, tiers.SegmentTokens, err)
		}
		if err != nil {
			return st, err
		}
		st.rows[l] = r
	}
	st.accepted, st.crashSafe = n, n
	st.cuts++
	st.ids, st.texts = nil, nil
	st.cutLabels(n)
	if st.exactUntil >= n {
		st.exactUntil = allExact
	}
	return st, nil
}

// truncate keeps the first n tokens.
func (s *sequence) truncate(ctx context.Context, n uint64) error {
	s.write.Lock()
	defer s.write.Unlock()
	if err := s.usable(); err != nil {
		return err
	}
	st := s.snapshot()
	if longest := st.lens[0]; n > longest && n > st.accepted {
		return fail(codes.OutOfRange, ReasonPastEnd, "truncate to %d: the sequence has %d tokens", n, st.accepted)
	}
	if n >= st.sealed() {
		return s.truncateTail(st, n)
	}
	next, err := s.cut(ctx, st, n)
	if err != nil {
		return err
	}
	b := s.srv.store.NewBatch()
	defer b.Close()
	s.srv.commits.Lock()
	defer s.srv.commits.Unlock()
	var gone []*span
	for _, ref := range st.spans[len(next.spans):] {
		gone = append(gone, ref.span)
	}
	if err := s.replaceLog(ctx, &next, b); err != nil {
		return err
	}
	s.nameAll()
	return s.srv.releaseSpans(ctx, s, gone)
}

// releaseSpans drops s's use of spans; the caller holds commits.
func (srv *Server) releaseSpans(ctx context.Context, s *sequence, spans []*span) error {
	if len(spans) == 0 {
		return nil
	}
	b := srv.store.NewBatch()
	defer b.Close()
	return srv.spans.release(ctx, s, spans, b)
}

func (s *sequence) truncateTail(st state, n uint64) error {
	if n < st.accepted {
		if err := s.logTruncation(n); err != nil {
			return err
		}
		s.noteWritten(n)
	}
	st.cutTail(n, s.spec)
	s.mu.Lock()
	defer s.mu.Unlock()
	// Positions written again later must be synced again.
	s.mu.power = min(s.mu.power, n)
	for i := range s.mu.powerPos {
		s.mu.powerPos[i].tokens = min(s.mu.powerPos[i].tokens, n)
	}
	if keep := int(n / blockTokens); keep < len(s.mu.names) {
		s.srv.names.remove(s, s.mu.names[keep:])
		s.mu.names = s.mu.names[:keep:keep]
	}
	st.names = s.mu.names
	s.setStateLocked(st)
	return nil
}

// dropIncomplete drops rows of tokens that not every layer has, if the worker that
// was appending them is gone. Nobody else has appended any since: who comes to hold the sequence does this first.
func (s *sequence) dropIncomplete() {
	s.mu.RLock()
	abandoned := s.mu.abandoned
	s.mu.RUnlock()
	if !abandoned {
		return
	}
	s.write.Lock()
	defer s.write.Unlock()
	st := s.snapshot()
	st.cutTail(st.accepted, s.spec)
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.mu.abandoned { // another one did it meanwhile
		return
	}
	s.mu.abandoned = false
	st.names, st.exactUntil = s.mu.names, s.mu.exactUntil
	s.setStateLocked(st)
}

// keep counts a holder or a pin. From then on the sequence is not evicted; the error says that it is being, or was deleted.
func (s *sequence) keep(count *int) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.mu.deleted || s.mu.leaving {
		return s.errDeleted()
	}
	*count++
	return nil
}

// hold counts a user of the sequence, and release ends the use. The user finds no rows that another one left incomplete.
func (s *sequence) hold() (release func(), err error) {
	if err := s.keep(&s.mu.holders); err != nil {
		return nil, err
	}
	s.dropIncomplete()
	done := false
	return func() {
		s.mu.Lock()
		if done {
			s.mu.Unlock()
			return
		}
		done = true
		s.mu.holders--
		last := s.mu.holders == 0
		s.mu.abandoned = s.mu.abandoned || last
		s.mu.Unlock()
		if last {
			s.dropIncomplete()
		}
	}, nil
}

// flush makes accepted tokens power-safe, and seals what lies behind the
// recent window if asked.
func (s *sequence) flush(ctx context.Context, sealTail bool) error {
	if sealTail {
		if err := s.sealShort(ctx); err != nil {
			return err
		}
	}
	return s.syncLog()
}

// sealShort seals everything behind the recent window, in whole blocks of 64.
func (s *sequence) sealShort(ctx context.Context) error {
	for {
		st, err := s.whole()
		if err != nil {
			return err
		}
		end, full := st.sealPoint()
		if !full {
			if st.accepted < recentTokens {
				return nil
			}
			end = (st.accepted - recentTokens) / blockTokens * blockTokens
			if end < st.sealed()+blockTokens {
				return nil
			}
		}
		if err := s.srv.sealer.seal(ctx, s, &st, end); err != nil && !errors.Is(err, errStale) {
			return err
		}
	}
}

// delete removes the sequence and what only it holds.
func (s *sequence) delete(ctx context.Context) error {
	s.write.Lock()
	defer s.write.Unlock()
	return s.deleteLocked(ctx)
}

var errInUse = errors.New("the sequence is in use")

// evict is delete, unless somebody came to use the sequence before it had its turn: errInUse.
func (s *sequence) evict(ctx context.Context) error {
	s.write.Lock()
	defer s.write.Unlock()
	s.mu.Lock()
	s.mu.leaving = s.idleLocked()
	leaving := s.mu.leaving
	s.mu.Unlock()
	if !leaving {
		return errInUse
	}
	defer func() {
		s.mu.Lock()
		s.mu.leaving = false
		s.mu.Unlock()
	}()
	return s.deleteLocked(ctx)
}

// idleLocked says whether the sequence may be evicted.
func (s *sequence) idleLocked() bool {
	return s.mu.holders == 0 && s.mu.pins == 0 && !s.mu.sealing && !s.mu.deleted && len(s.mu.spans) > 0
}

// deleteLocked is delete; the caller holds write.
func (s *sequence) deleteLocked(ctx context.Context) error {
	if err := s.usable(); err != nil {
		return err
	}
	s.srv.commits.Lock()
	defer s.srv.commits.Unlock()
	st := s.snapshot()
	b := s.srv.store.NewBatch()
	defer b.Close()
	var spans []*span
	for _, r := range st.spans {
		spans = append(spans, r.span)
	}
	if err := b.Delete(store.KindSequence, []byte(s.id)); err != nil {
		return err
	}
	if err := s.srv.spans.release(ctx, s, spans, b); err != nil {
		return err
	}
	s.mu.Lock()
	s.mu.deleted = true
	names := s.mu.names
	s.setStateLocked(state{rows: make([]layerRows, s.spec.layers), lens: make([]uint64, s.spec.layers)})
	s.mu.Unlock()
	s.srv.names.remove(s, names)
	s.srv.removeSequence(s)
	if err := s.log.Remove(); err != nil {
		s.srv.log.Warn("remove a log", "err", err)
	}
	s.log = nil
	return nil
}

// evictOne deletes the sequence that was used longest ago, of those that
// nobody holds or has pinned; not the one that needs the room. Its spans stay where others use them: never a
// parent before its children.
func (srv *Server) evictOne(but *sequence) bool {
	for {
		oldest := srv.oldestIdle(but)
		if oldest == nil {
			return false
		}
		err := oldest.evict(context.Background())
		if errors.Is(err, errInUse) {
			continue
		}
		if err != nil {
			srv.log.Error("evict a sequence", "sequence", oldest.id, "err", err)
			return false
		}
		srv.metrics.evicted.Inc()
		srv.log.Info("evicted the sequence used longest ago: the disk limit is reached", "sequence", oldest.id)
		return true
	}
}

// oldestIdle returns the sequence that was used longest ago, of those that may be evicted; nil if none may.
func (srv *Server) oldestIdle(but *sequence) (oldest *sequence) {
	for _, s := range srv.list() {
		s.mu.RLock()
		idle, used := s != but && s.idleLocked(), s.mu.used
		s.mu.RUnlock()
		if idle && (oldest == nil || used.Before(oldest.usedAt())) {
			oldest = s
		}
	}
	return oldest
}

// matchPrefix finds the longest stored prefix of ids from which every layer can continue, and a sequence that begins with it; nil: none does.
func (srv *Server) matchPrefix(r *kvtierv1.MatchPrefixRequest) (matched *kvtierv1.Prefix, s *sequence, err error) {
	sp, err := newSpec(r.Spec)
	if err != nil {
		return nil, nil, err
	}
	p, err := profileOf(r.Profile)
	if err != nil {
		return nil, nil, err
	}
	n := newNamer(srv.key, sp, p)
	// Stored prefixes are exact up to some block, and sparse from there on; which
	// block it is differs. So every chain that is still alive is followed.
	exact, alive := name{}, true
	var sparse []name
	for at := 0; at+blockTokens <= len(r.TokenIds) && (alive || len(sparse) > 0); at += blockTokens {
		ids, end := r.TokenIds[at:at+blockTokens], uint64(at+blockTokens)
		parents := sparse
		if alive && r.AllowSparse {
			parents = append(parents, exact)
		}
		sparse = nil
		var ends []name // that are known
		if alive {
			exact = n.next(exact, ids, true)
			if alive = len(srv.names.find(exact)) > 0; alive {
				ends = append(ends, exact)
			}
		}
		for _, parent := range parents {
			if next := n.next(parent, ids, false); len(srv.names.find(next)) > 0 {
				sparse = append(sparse, next)
			}
		}
		for _, of := range append(ends, sparse...) {
			if holder := srv.holderOf(sp, end, of); holder != nil {
				matched, s = &kvtierv1.Prefix{Tokens: end, Name: of[:]}, holder
				break
			}
		}
	}
	return matched, s, nil
}

// holderOf returns a sequence that can be continued at end, where a block of that name ends; nil if there is none.
func (srv *Server) holderOf(sp *spec, end uint64, of name) *sequence {
	for _, s := range srv.names.find(of) {
		if s.continuesAt(sp, end, of) {
			return s
		}
	}
	return nil
}

// continuesAt says whether every layer can continue from position end, up to which the tokens have that name.
func (s *sequence) continuesAt(sp *spec, end uint64, of name) bool {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.mu.deleted || s.mu.leaving || !s.namedLocked(end, of) || end > s.mu.accepted || s.mu.damaged != "" || s.spec.equal(sp) != nil {
		return false
	}
	for _, r := range s.mu.spans {
		for _, h := range r.segments {
			if r.Start < end && s.srv.store.AnyDamage() && s.srv.store.Damage(h.ID) != "" {
				return false
			}
		}
	}
	if end >= s.mu.sealed() || !sp.sliding() {
		return true
	}
	for _, r := range s.mu.spans {
		if r.limit == r.Tokens && r.Start+uint64(r.Tokens) == end {
			return true
		}
	}
	return false
}

func (s *sequence) usedAt() time.Time {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.mu.used
}
