package crash

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	kvtierv1 "kvtier/proto/kvtier/v1"
)

// sequence is what a worker knows of one of its sequences.
type sequence struct {
	id, name string
	kind     int // of model
	profile  kvtierv1.Profile
	tokens   []uint64 // acknowledged as accepted
	safe     uint64   // acknowledged as safe from what the harness does
	sealed   uint64   // acknowledged as sealed
	cuts     []cut    // truncations that a power cut may undo
	damaged  bool     // it cannot be read, and says so

	// A call whose fate a crash left open.
	appending []uint64 // tokens that may follow
	cutting   bool     // to cutTo
	cutTo     int
	making    bool // it may not exist
	deleting  bool // it may not exist any more
}

// open says whether the fate of a call is.
func (s *sequence) open() bool {
	return s.appending != nil || s.cutting || s.making || s.deleting
}

// cut is a truncation that is not power-safe yet: until it is, the sequence may
// come back as it was before.
type cut struct {
	to, safe uint64   // before it
	tokens   []uint64 // before it
}

// size of what a worker does.
type size struct {
	sequences, tokens int // at most; no sequence is longer but by its last append
	bulk              int // tokens of a bulk append, at most
	segment           int // tokens of one that fills a whole segment
}

// worker changes its own sequences, one call at a time.
type worker struct {
	number  int
	size    size
	power   bool // the harness cuts power: only what is power-safe is safe
	faulty  bool // the disk has faults: calls may fail
	lying   bool // it does not write what it says: no truncation is sure
	lies    lies
	specs   []*kvtierv1.ModelSpec
	p       clients
	rng     *rand.Rand
	made    int
	seqs    []*sequence
	deleted map[string]bool // ids whose deletion was acknowledged
	tally
}

// tally counts what was seen.
type tally struct {
	acked             uint64 // positions acknowledged as safe
	lost              uint64
	answers, wrong    int
	rows, wrongRows   int // rows read back
	seals, ops, forks int
	failed            int // calls that failed on a faulty disk
	damaged           int // sequences that a lying disk damaged, and that said so
}

// lies are what a disk lied about.
type lies struct {
	logs    map[string]bool // sequences whose logs it did not write as it said
	extents bool
}

func (t *tally) add(o tally) {
	t.acked += o.acked
	t.lost += o.lost
	t.answers += o.answers
	t.wrong += o.wrong
	t.rows += o.rows
	t.wrongRows += o.wrongRows
	t.seals += o.seals
	t.ops += o.ops
	t.forks += o.forks
	t.failed += o.failed
	t.damaged += o.damaged
}

var profiles = []kvtierv1.Profile{kvtierv1.Profile_PROFILE_BALANCED, kvtierv1.Profile_PROFILE_NEUTRAL, kvtierv1.Profile_PROFILE_EXACT}

var (
	// errKilled ends a worker's run: the daemon is gone.
	errKilled = errors.New("the daemon was killed")
	// errFault is a call that failed on a faulty disk.
	errFault = errors.New("the disk has faults")
	// errDamaged is a call for what a lying disk did not store.
	errDamaged = errors.New("the disk lied")
)

// outcome sorts a call's error: nil, one of those above, or a failure of the test.
func (w *worker) outcome(what string, err error) error {
	switch c := status.Code(err); {
	case c == codes.OK:
		return nil
	case w.faulty:
		w.failed++
		return errFault
	case w.lies.extents && (c == codes.DataLoss || c == codes.FailedPrecondition): // the latter of a window
		return errDamaged
	case c == codes.Unavailable || c == codes.Canceled:
		return errKilled
	}
	return fmt.Errorf("worker %d: %s: %w", w.number, what, err)
}

// run works until the daemon is killed.
func (w *worker) run(ctx context.Context) error {
	for {
		w.ops++
		if err := w.step(ctx); err != nil {
			if errors.Is(err, errKilled) {
				return nil
			}
			return err
		}
	}
}

// step does one thing.
func (w *worker) step(ctx context.Context) error {
	if len(w.seqs) == 0 {
		return w.create(ctx)
	}
	s := w.seqs[w.rng.IntN(len(w.seqs))]
	if s.open() || s.damaged { // until the daemon starts again
		if s.damaged || len(s.tokens) == 0 || s.cutting || s.making || s.deleting {
			return nil
		}
		return w.query(ctx, s)
	}
	crowded := len(w.seqs) >= w.size.sequences
	switch x := w.rng.IntN(100); {
	case x < 8 && !crowded:
		return w.create(ctx)
	case x < 16 && !crowded && len(s.tokens) > 0:
		return w.fork(ctx, s)
	case x < 22 && len(s.tokens) > 0:
		return w.truncate(ctx, s)
	case x < 36:
		return w.flush(ctx, s, w.rng.IntN(4) > 0)
	case x < 42 && (crowded || len(s.tokens) > w.size.tokens):
		return w.remove(ctx, s)
	case x < 70 && len(s.tokens) <= w.size.tokens:
		return w.appendBulk(ctx, s, w.fresh(w.bulk()))
	case x < 90 && len(s.tokens) <= w.size.tokens:
		return w.appendSteps(ctx, s)
	case len(s.tokens) > 0:
		return w.query(ctx, s)
	}
	return nil
}

// bulk is a number of tokens: mostly some, now and then enough for a whole segment, or for two, so that
// sealing the first goes on with the log.
func (w *worker) bulk() int {
	if w.rng.IntN(12) == 0 {
		return w.size.segment*(1+w.rng.IntN(4)/3) + w.rng.IntN(700)
	}
	return 1 + w.rng.IntN(w.size.bulk)
}

func (w *worker) fresh(n int) []uint64 {
	out := make([]uint64, n)
	for i := range out {
		out[i] = w.rng.Uint64() >> 1
	}
	return out
}

func (w *worker) newSequence(kind int, p kvtierv1.Profile) *sequence {
	w.made++
	s := &sequence{name: fmt.Sprintf("w%d-%d", w.number, w.made), kind: kind, profile: p, making: true}
	w.seqs = append(w.seqs, s)
	return s
}

// create makes a sequence; some are begun with another's tokens, so that
// spans are sealed twice under one name.
func (w *worker) create(ctx context.Context) error {
	kind, profile := w.rng.IntN(len(w.specs)), profiles[w.rng.IntN(len(profiles))]
	var like *sequence
	if len(w.seqs) > 0 && w.rng.IntN(2) == 0 {
		like = w.seqs[w.rng.IntN(len(w.seqs))]
		kind, profile = like.kind, like.profile
	}
	s := w.newSequence(kind, profile)
	r, err := w.p.seq.OpenSequence(ctx, &kvtierv1.OpenSequenceRequest{Spec: w.specs[kind], Profile: profile, Name: s.name})
	if err := w.outcome("create", err); err != nil {
		return err
	}
	s.id, s.making = r.SequenceId, false
	if like == nil || len(like.tokens) == 0 {
		return nil
	}
	return w.appendBulk(ctx, s, slices.Clone(like.tokens[:1+w.rng.IntN(len(like.tokens))]))
}

func (w *worker) fork(ctx context.Context, from *sequence) error {
	at := 1 + w.rng.IntN(len(from.tokens))
	if w.rng.IntN(3) == 0 {
		at = len(from.tokens)
	}
	s := w.newSequence(from.kind, from.profile)
	s.tokens = slices.Clone(from.tokens[:at])
	r, err := w.p.seq.OpenSequence(ctx, &kvtierv1.OpenSequenceRequest{ForkOf: from.id, ForkAt: uint64(at), Name: s.name})
	if status.Code(err) == codes.FailedPrecondition && len(w.specs[s.kind].LayerKinds) > 0 {
		w.forget(s) // a sliding window cannot continue there
		return nil
	}
	if err := w.outcome("fork", err); err != nil {
		return err
	}
	w.forks++
	s.id, s.making = r.SequenceId, false
	return w.acked(s, r.Ack)
}

// acked takes in an acknowledgement of all tokens.
func (w *worker) acked(s *sequence, a *kvtierv1.Ack) error {
	if a.Accepted != uint64(len(s.tokens)) || a.CrashSafe > a.Accepted || a.PowerSafe > a.CrashSafe || a.Sealed > a.Accepted {
		return fmt.Errorf("worker %d: %s has %d tokens, acknowledged are %v", w.number, s.name, len(s.tokens), a)
	}
	safe := a.CrashSafe
	if w.power {
		safe = a.PowerSafe
	}
	if w.power && !w.lying {
		// What was appended behind a truncation is in the log behind it, and sealing
		// begins a new log.
		s.cuts = slices.DeleteFunc(s.cuts, func(c cut) bool { return safe > c.to || a.Sealed > s.sealed })
	}
	s.sealed = a.Sealed
	if safe > s.safe {
		w.tally.acked += safe - s.safe
	}
	s.safe = safe
	return nil
}

func (w *worker) forget(s *sequence) {
	w.seqs = slices.DeleteFunc(w.seqs, func(o *sequence) bool { return o == s })
}

// rowsOf returns a layer's rows of tokens that follow s's.
func (w *worker) rowsOf(s *sequence, tokens []uint64, layer, what int) []float32 {
	sp := w.specs[s.kind]
	heads := int(sp.KvHeads)
	if what == queries {
		heads = int(sp.QueryHeads)
	}
	return rows(tokens, len(s.tokens), layer, heads, int(sp.HeadDim), what)
}

func (w *worker) appendBulk(ctx context.Context, s *sequence, tokens []uint64) error {
	s.appending = tokens
	var ack *kvtierv1.Ack
	for l := range int(w.specs[s.kind].Layers) {
		r := &kvtierv1.AppendRequest{SequenceId: s.id, Layer: uint32(l), Start: uint64(len(s.tokens)), Dtype: kvtierv1.ElementType_ELEMENT_TYPE_BF16,
			K: bf16(w.rowsOf(s, tokens, l, keys)), V: bf16(w.rowsOf(s, tokens, l, values)), Queries: bf16(w.rowsOf(s, tokens[:min(len(tokens), 4)], l, queries))}
		if l == 0 {
			r.TokenIds = tokens
			r.Spans = []*kvtierv1.Span{{Start: uint64(len(s.tokens)), End: uint64(len(s.tokens) + len(tokens)), Label: "bulk"}}
		}
		resp, err := w.p.seq.Append(ctx, r)
		for status.Code(err) == codes.ResourceExhausted {
			if w.faulty {
				break
			}
			time.Sleep(20 * time.Millisecond)
			resp, err = w.p.seq.Append(ctx, r)
		}
		if err := w.outcome("append", err); err != nil {
			return err
		}
		ack = resp.Ack
	}
	s.tokens, s.appending = append(s.tokens, tokens...), nil
	return w.acked(s, ack)
}

// appendSteps is decoding: one token at a time, each layer appended and
// attended in one call.
func (w *worker) appendSteps(ctx context.Context, s *sequence) error {
	for range 1 + w.rng.IntN(8) {
		s.appending = w.fresh(1)
		var last *kvtierv1.AttendResult
		for l := range int(w.specs[s.kind].Layers) {
			it := &kvtierv1.AttendItem{SequenceId: s.id, Start: uint64(len(s.tokens)), Q: bf16(w.rowsOf(s, s.appending, l, queries)),
				K: bf16(w.rowsOf(s, s.appending, l, keys)), V: bf16(w.rowsOf(s, s.appending, l, values)), TokenIds: s.appending}
			ask := &kvtierv1.AttendRequest{Layer: uint32(l), Dtype: kvtierv1.ElementType_ELEMENT_TYPE_BF16, Items: []*kvtierv1.AttendItem{it}}
			r, err := w.p.seq.Attend(ctx, ask)
			for status.Code(err) == codes.ResourceExhausted {
				time.Sleep(20 * time.Millisecond)
				r, err = w.p.seq.Attend(ctx, ask)
			}
			if err := w.outcome("step", err); err != nil {
				return err
			}
			last = r.Results[0]
		}
		s.tokens, s.appending = append(s.tokens, s.appending...), nil
		if err := w.acked(s, last.Ack); err != nil {
			return err
		}
	}
	return nil
}

func (w *worker) truncate(ctx context.Context, s *sequence) error {
	if w.power { // what was sealed in the background decides what a truncation is
		d, err := w.p.look.DescribeSequence(ctx, &kvtierv1.DescribeSequenceRequest{SequenceId: s.id})
		if err := w.outcome("describe", err); err != nil {
			return err
		}
		if err := w.acked(s, d.Info.Ack); err != nil {
			return err
		}
	}
	s.cutting, s.cutTo = true, max(0, len(s.tokens)-1-w.rng.IntN(100))
	if w.rng.IntN(3) == 0 {
		s.cutTo = w.rng.IntN(len(s.tokens))
	}
	r, err := w.p.seq.Truncate(ctx, &kvtierv1.TruncateRequest{SequenceId: s.id, Length: uint64(s.cutTo)})
	if status.Code(err) == codes.FailedPrecondition && len(w.specs[s.kind].LayerKinds) > 0 {
		s.cutting = false
		return nil
	}
	if err := w.outcome("truncate", err); err != nil {
		return err
	}
	w.cut(s)
	return w.acked(s, r.Ack)
}

// cut takes in a truncation. One of sealed tokens is a change of the catalogue.
func (w *worker) cut(s *sequence) {
	if w.power && (w.lying || uint64(s.cutTo) >= s.sealed) {
		s.cuts = append(s.cuts[:len(s.cuts):len(s.cuts)], cut{uint64(s.cutTo), s.safe, slices.Clip(s.tokens)})
	} else {
		s.cuts = nil
	}
	s.tokens, s.cutting = s.tokens[:s.cutTo:s.cutTo], false
	s.safe = min(s.safe, uint64(s.cutTo))
}

func (w *worker) flush(ctx context.Context, s *sequence, seal bool) error {
	r, err := w.p.seq.Flush(ctx, &kvtierv1.FlushRequest{SequenceId: s.id, Seal: seal})
	if err := w.outcome("flush", err); err != nil {
		return err
	}
	w.seals++
	if r.Ack.PowerSafe != r.Ack.Accepted {
		return fmt.Errorf("worker %d: %s is flushed, but not power-safe: %v", w.number, s.name, r.Ack)
	}
	if !w.lying {
		s.cuts = nil
	}
	return w.acked(s, r.Ack)
}

func (w *worker) remove(ctx context.Context, s *sequence) error {
	s.deleting = true
	_, err := w.p.seq.DeleteSequence(ctx, &kvtierv1.DeleteSequenceRequest{SequenceId: s.id})
	if err := w.outcome("delete", err); err != nil {
		return err
	}
	w.deleted[s.id] = true
	w.forget(s)
	return nil
}

// query asks at the newest position, exactly or not.
func (w *worker) query(ctx context.Context, s *sequence) error {
	modes := []*kvtierv1.Budget{{Mode: kvtierv1.AttendMode_ATTEND_MODE_EXACT}, {Mode: kvtierv1.AttendMode_ATTEND_MODE_BUDGET, Share: .3},
		{Mode: kvtierv1.AttendMode_ATTEND_MODE_TARGET, TargetError: .1}}
	for l := range int(w.specs[s.kind].Layers) {
		if err := w.ask(ctx, s, l, modes[w.rng.IntN(len(modes))]); err != nil {
			return err
		}
	}
	return nil
}

// tolerance of an answer. A query that reads everything is only as far off as
// the codec; a sparse one, by its worst head, about as far as it says (it
// speaks of the mean head).
func tolerance(p kvtierv1.Profile, b *kvtierv1.Budget, a *kvtierv1.Account) float64 {
	switch {
	case b.Mode != kvtierv1.AttendMode_ATTEND_MODE_EXACT:
		return .5 + 5*float64(a.GetEstimatedError())
	case p == kvtierv1.Profile_PROFILE_EXACT:
		return 1e-4
	case p == kvtierv1.Profile_PROFILE_NEUTRAL:
		return .02
	}
	return .2
}

func (w *worker) ask(ctx context.Context, s *sequence, layer int, b *kvtierv1.Budget) error {
	sp := w.specs[s.kind]
	pos := len(s.tokens) - 1
	q := rows(s.tokens[pos:], pos, layer, int(sp.QueryHeads), int(sp.HeadDim), queries)
	r, err := w.p.seq.Attend(ctx, &kvtierv1.AttendRequest{Layer: uint32(layer), Dtype: kvtierv1.ElementType_ELEMENT_TYPE_BF16, Budget: b,
		Items: []*kvtierv1.AttendItem{{SequenceId: s.id, Start: uint64(pos), Q: bf16(q)}}})
	if err := w.outcome("attend", err); err != nil {
		return err
	}
	w.answers++
	got := fromF32(r.Results[0].Output)
	if e := apart(got, dense(sp, layer, s.tokens), int(sp.HeadDim)); !(e <= tolerance(s.profile, b, r.Results[0].Account)) {
		w.wrong++
		return fmt.Errorf("worker %d: WRONG ANSWER: %s, %v, layer %d, position %d, %v: off by %.3g; %v; %v", w.number, s.name, s.profile, layer, pos, b.Mode, e, r.Results[0].Ack, r.Results[0].Account)
	}
	return nil
}
