package contexts

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	kvtierv1 "kvtier/proto/kvtier/v1"
)

// Beside is the load on all contexts while another one asks for as much as it can.
type Beside struct {
	What  string  // what the other one does
	Calls int     // of the other one, that ended
	P50   float64 // milliseconds that they took
	Phase Phase
}

// chunk is how many positions the other context's calls have where they have many.
const chunk = 512

// besides measures the load on all contexts beside each kind of huge calls.
func (w *world) besides(ctx context.Context, all []*sequence) error {
	if w.o.Huge == 0 {
		return nil
	}
	built := w.rep.BuildTokens
	defer func() { w.rep.BuildTokens = built }() // of the others
	w.o.Say("making a context of %d tokens", w.o.Huge)
	big := &sequence{rows: rows{seed: mix(w.o.Seed, 1<<42)}, length: w.o.Huge}
	if _, err := w.build(ctx, []*sequence{big}); err != nil {
		return err
	}
	for _, kind := range []struct {
		what string
		call func(ctx context.Context, n int) error
	}{
		{"everything, 1 position", func(ctx context.Context, n int) error {
			return w.attendTo(ctx, big, n%w.o.Layers, 1, kvtierv1.AttendMode_ATTEND_MODE_EXACT)
		}},
		{"everything, 512 positions", func(ctx context.Context, n int) error {
			return w.attendTo(ctx, big, n%w.o.Layers, chunk, kvtierv1.AttendMode_ATTEND_MODE_EXACT)
		}},
		{"a share, 1 position", func(ctx context.Context, n int) error {
			return w.attendTo(ctx, big, n%w.o.Layers, 1, kvtierv1.AttendMode_ATTEND_MODE_BUDGET)
		}},
		{"appends", w.prefill()},
	} {
		b := Beside{What: kind.what}
		var err error
		if b.Phase, err = w.beside(ctx, all, &b, kind.call); err != nil {
			return fmt.Errorf("%s: %w", kind.what, err)
		}
		w.rep.Beside = append(w.rep.Beside, b)
		if err := w.settle(ctx); err != nil {
			return err
		}
	}
	return nil
}

// beside loads all contexts while call is made again and again.
func (w *world) beside(ctx context.Context, all []*sequence, b *Beside, call func(ctx context.Context, n int) error) (Phase, error) {
	other, stop := context.WithCancel(ctx)
	defer stop()
	done := make(chan error, 1)
	var took []float64
	go func() {
		for n := 0; ; n++ {
			begin := time.Now()
			err := call(other, n)
			if other.Err() != nil {
				done <- nil
				return
			}
			if err != nil {
				done <- err
				return
			}
			took = append(took, time.Since(begin).Seconds())
		}
	}()
	p, err := w.load(ctx, fmt.Sprint(len(all), " contexts beside ", b.What), all)
	stop()
	err = errors.Join(err, <-done)
	slices.Sort(took)
	b.Calls, b.P50 = len(took), 1e3*percentile(took, .5)
	return p, err
}

// attendTo asks a layer of a context at its last positions.
func (w *world) attendTo(ctx context.Context, q *sequence, layer, positions int, mode kvtierv1.AttendMode) error {
	start := q.tokens - positions
	var queries []float32
	for at := start; at < q.tokens; at++ {
		queries = append(queries, q.rows.query(layer, at)...)
	}
	_, err := w.d.Seq.Attend(ctx, &kvtierv1.AttendRequest{Layer: uint32(layer), Budget: &kvtierv1.Budget{Mode: mode},
		Items: []*kvtierv1.AttendItem{{SequenceId: q.id, Start: uint64(start), Q: floatBytes(queries)}}})
	return err
}

// prefill returns what appends to contexts as fast as it can: a call is a chunk of all layers. A context that is as long as the
// huge one is deleted, and the next one made.
func (w *world) prefill() func(ctx context.Context, n int) error {
	var q *sequence
	made := uint64(0)
	return func(ctx context.Context, _ int) error {
		if q != nil && q.tokens+chunk > w.o.Huge {
			if _, err := w.d.Seq.DeleteSequence(ctx, &kvtierv1.DeleteSequenceRequest{SequenceId: q.id}); err != nil {
				return err
			}
			q = nil
		}
		if q == nil {
			made++
			q = &sequence{rows: rows{seed: mix(w.o.Seed, 1<<43, made)}}
		}
		q.length = q.tokens + chunk
		return w.make(ctx, q)
	}
}
