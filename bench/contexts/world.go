package contexts

import (
	"context"
	"fmt"
	"math"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"kvtier/bench/daemon"
	kvtierv1 "kvtier/proto/kvtier/v1"
)

// sequence is one context as the measurement knows it.
type sequence struct {
	mu     sync.Mutex // held during a turn
	rows   rows
	length int       // to be built
	tokens int       // that every layer has
	from   *sequence // whose prefix it shares, or nil
	id     string
	took   []float64 // seconds of each call of the load
}

// world is the daemon and what is asked of it.
type world struct {
	o      *Options
	rep    *Report
	d      *daemon.Daemon
	putOff atomic.Int64 // calls put off since the phase began
}

// plan lists all contexts; the first of each group has the prefix of the others.
func (w *world) plan(lengths []int) []*sequence {
	all := make([]*sequence, len(lengths))
	for i, n := range lengths {
		all[i] = &sequence{rows: rows{seed: mix(w.o.Seed, uint64(i)), prefix: mix(w.o.Seed, 1<<41, uint64(i/w.o.Group)), shared: w.o.prefix()}, length: n}
		if first := i / w.o.Group * w.o.Group; first != i {
			all[i].from = all[first]
		}
	}
	return all
}

// builders is how many contexts are built at once.
const builders = 2

// build makes contexts: those that others share the prefix of first.
func (w *world) build(ctx context.Context, all []*sequence) ([]*sequence, error) {
	done, said := atomic.Int64{}, time.Now()
	var mu sync.Mutex
	for _, forks := range []bool{false, true} {
		g, ctx := errgroup.WithContext(ctx)
		g.SetLimit(builders)
		for _, q := range all {
			if (q.from != nil) != forks {
				continue
			}
			g.Go(func() error {
				if err := w.make(ctx, q); err != nil {
					return err
				}
				n := done.Add(1)
				mu.Lock()
				defer mu.Unlock()
				if time.Since(said) > 5*time.Second {
					said = time.Now()
					w.o.Say("%d of %d contexts made", n, len(all))
				}
				return nil
			})
		}
		if err := g.Wait(); err != nil {
			return nil, err
		}
	}
	return all, w.settle(ctx)
}

// settle waits until nothing is to be sealed.
func (w *world) settle(ctx context.Context) error {
	for {
		st, err := w.d.Look.GetStatus(ctx, &kvtierv1.GetStatusRequest{})
		if err != nil || st.SealsPending == 0 {
			return err
		}
		if err := sleep(ctx, 50*time.Millisecond); err != nil {
			return err
		}
	}
}

// buildTokens is how many tokens a bulk append has.
const buildTokens = 512

// make opens a context, if it is not open, and appends its tokens.
func (w *world) make(ctx context.Context, q *sequence) error {
	if q.id == "" {
		if err := w.open(ctx, q); err != nil {
			return err
		}
	}
	for q.tokens < q.length {
		end := min(q.tokens+buildTokens, q.length)
		for l := range w.o.Layers {
			k, v := q.rows.bytes(l, q.tokens, end)
			a := &kvtierv1.AppendRequest{SequenceId: q.id, Layer: uint32(l), Start: uint64(q.tokens), K: k, V: v}
			if err := w.patiently(ctx, func() error { _, err := w.d.Seq.Append(ctx, a); return err }); err != nil {
				return fmt.Errorf("append to context %s at %d: %w", q.id, q.tokens, err)
			}
		}
		w.count(end - q.tokens)
		q.tokens = end
	}
	return nil
}

// open opens a context, as a fork if it shares a prefix.
func (w *world) open(ctx context.Context, q *sequence) error {
	r := &kvtierv1.OpenSequenceRequest{}
	if q.from != nil {
		r.ForkOf, r.ForkAt = q.from.id, uint64(q.rows.shared)
		q.tokens = q.rows.shared
	} else {
		r.Spec = &kvtierv1.ModelSpec{Layers: uint32(w.o.Layers), QueryHeads: queryHeads, KvHeads: kvHeads, HeadDim: headDim,
			KvDtype: kvtierv1.ElementType_ELEMENT_TYPE_BF16, Fingerprint: []byte("kvbench contexts")}
	}
	var got *kvtierv1.OpenSequenceResponse
	err := w.patiently(ctx, func() (err error) { got, err = w.d.Seq.OpenSequence(ctx, r); return err })
	if err != nil {
		return err
	}
	q.id = got.SequenceId
	return nil
}

var counting sync.Mutex

func (w *world) count(tokens int) {
	counting.Lock()
	w.rep.BuildTokens += tokens
	counting.Unlock()
}

// patiently calls f again where the daemon puts a call off, after the delay that
// it names, and counts how often.
func (w *world) patiently(ctx context.Context, f func() error) error {
	for {
		err := f()
		if status.Code(err) != codes.ResourceExhausted {
			return err
		}
		delay := time.Duration(0)
		for _, d := range status.Convert(err).Details() {
			if r, ok := d.(*errdetails.RetryInfo); ok {
				delay = r.RetryDelay.AsDuration()
			}
		}
		if delay <= 0 {
			return err
		}
		w.putOff.Add(1)
		if err := sleep(ctx, delay); err != nil {
			return err
		}
	}
}

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}

// reopen ends the use of a context and opens it again; it has to be as long as before.
func (w *world) reopen(ctx context.Context, q *sequence) error {
	if _, err := w.d.Seq.CloseSequence(ctx, &kvtierv1.CloseSequenceRequest{SequenceId: q.id}); err != nil && status.Code(err) != codes.NotFound && status.Code(err) != codes.FailedPrecondition {
		return err
	}
	got, err := w.d.Seq.OpenSequence(ctx, &kvtierv1.OpenSequenceRequest{SequenceId: q.id})
	if err != nil {
		return err
	}
	if got.Ack.Accepted != uint64(q.tokens) {
		return fmt.Errorf("context %s has %d tokens, not the %d that were acknowledged", q.id, got.Ack.Accepted, q.tokens)
	}
	return nil
}

// step decodes one token of a context: a call a layer. It returns the seconds of each.
func (w *world) step(ctx context.Context, q *sequence) error {
	for l := range w.o.Layers {
		k, v := q.rows.bytes(l, q.tokens, q.tokens+1)
		r := &kvtierv1.AttendRequest{Layer: uint32(l), Items: []*kvtierv1.AttendItem{{SequenceId: q.id, Start: uint64(q.tokens),
			Q: floatBytes(q.rows.query(l, q.tokens)), K: k, V: v}}}
		begin := time.Now() // what was put off counts as waiting, too
		// Rows of bfloat16 beside queries of float32: both go as float32.
		r.Dtype = kvtierv1.ElementType_ELEMENT_TYPE_F32
		r.Items[0].K, r.Items[0].V = widen(k), widen(v)
		if err := w.patiently(ctx, func() error { _, err := w.d.Seq.Attend(ctx, r); return err }); err != nil {
			return fmt.Errorf("attend to context %s at %d: %w", q.id, q.tokens, err)
		}
		q.took = append(q.took, time.Since(begin).Seconds())
	}
	q.tokens++
	return nil
}

// widen turns bfloat16 into float32.
func widen(b []byte) []byte {
	out := make([]byte, 2*len(b))
	for i := 0; i < len(b); i += 2 {
		out[2*i+2], out[2*i+3] = b[i], b[i+1]
	}
	return out
}

// Audit says how answers compare with dense attention over the rows sent.
type Audit struct {
	Answers    int
	Wrong      int
	WorstError float64 // relative, of an output
	WorstMass  float64 // absolute, of a log-sum-exp
}

// difference returns the largest error of a head's output, relative, and of a
// head's log-sum-exp. Other shapes differ infinitely.
func difference(out, want, lse, mass []float64) (worst, off float64) {
	if len(out) != queryLen || len(lse) != queryHeads {
		return math.Inf(1), math.Inf(1)
	}
	for h := range queryHeads {
		var diff, norm float64
		for i := h * headDim; i < (h+1)*headDim; i++ {
			diff += (out[i] - want[i]) * (out[i] - want[i])
			norm += want[i] * want[i]
		}
		worst, off = max(worst, math.Sqrt(diff/norm)), max(off, math.Abs(lse[h]-mass[h]))
	}
	return worst, off
}

// The tolerances of an audit. Four-bit codes give an error of a few percent.
const (
	tolerableError = .15
	tolerableMass  = .1
)

var auditing sync.Mutex

// audit asks a layer at the newest position, in mode exact, and compares.
func (w *world) audit(ctx context.Context, q *sequence, layer int, into *Audit) error {
	at := q.tokens - 1
	query := q.rows.query(layer, at)
	r := &kvtierv1.AttendRequest{Layer: uint32(layer), Budget: &kvtierv1.Budget{Mode: kvtierv1.AttendMode_ATTEND_MODE_EXACT},
		Items: []*kvtierv1.AttendItem{{SequenceId: q.id, Start: uint64(at), Q: floatBytes(query)}}}
	var got *kvtierv1.AttendResponse
	if err := w.patiently(ctx, func() (err error) { got, err = w.d.Seq.Attend(ctx, r); return err }); err != nil {
		return fmt.Errorf("check context %s: %w", q.id, err)
	}
	out, lse := floats(got.Results[0].Output), floats(got.Results[0].Lse)
	want, mass := q.rows.dense(layer, q.tokens, query)
	worst, off := difference(out, want, lse, mass)
	auditing.Lock()
	defer auditing.Unlock()
	into.Answers++
	if !(worst <= tolerableError && off <= tolerableMass) {
		into.Wrong++
		w.o.Say("WRONG: context %s, layer %d, position %d: error %.3f, log-sum-exp off by %.3f", q.id, layer, at, worst, off)
	}
	into.WorstError, into.WorstMass = max(into.WorstError, worst), max(into.WorstMass, off)
	return nil
}
