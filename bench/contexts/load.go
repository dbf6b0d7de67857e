package contexts

import (
	"context"
	"math/rand/v2"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"
)

// Phase is what a load showed.
type Phase struct {
	Turns, Calls int
	Rate         float64   // turns a second that were made, at most those asked for
	Attend       Quantiles // of calls: each appends a row to a layer and answers
	First        Quantiles // of the first call of each turn, which finds the context as it was left
	PutOff       int64     // calls that the daemon put off (RESOURCE_EXHAUSTED); they are made again
	// Unfair is the 99th percentile that a tenth of the contexts exceed with
	// theirs, over that which half of them exceed.
	Unfair  float64
	Visited int // contexts that had a turn
	Audit   Audit
	Samples []Sample // of the daemon, over time
}

// Quantiles are in milliseconds.
type Quantiles struct{ P50, P90, P99, Max float64 }

func quantiles(seconds []float64) Quantiles {
	x := slices.Sorted(slices.Values(seconds))
	return Quantiles{1e3 * percentile(x, .5), 1e3 * percentile(x, .9), 1e3 * percentile(x, .99), 1e3 * percentile(x, 1)}
}

// samples is about how many samples of the daemon a phase keeps.
const samples = 40

// load gives contexts turns at the fixed rate.
func (w *world) load(ctx context.Context, what string, all []*sequence) (p Phase, err error) {
	w.o.Say("load on %s for %v", what, w.o.Time)
	w.putOff.Store(0)
	begin := time.Now()
	every := time.Duration(float64(time.Second) / w.o.Rate)
	work := make(chan uint64) // a turn's number
	g, ctx := errgroup.WithContext(ctx)
	var first []float64
	for range w.o.Workers {
		g.Go(func() error {
			for turn := range work {
				took, err := w.turn(ctx, all, turn, &p.Audit)
				if err != nil {
					return err
				}
				auditing.Lock()
				p.Turns++
				first = append(first, took)
				auditing.Unlock()
			}
			return nil
		})
	}
	g.Go(func() error {
		defer close(work)
		next := begin
		for turn := uint64(0); time.Since(begin) < w.o.Time; turn++ {
			if err := sleep(ctx, time.Until(next)); err != nil {
				return err
			}
			next = next.Add(every)
			if late := time.Now().Add(-every); next.Before(late) {
				next = late // what cannot be done in time is not made up for
			}
			select {
			case work <- turn:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		return nil
	})
	stop := make(chan struct{})
	sampled := make(chan error, 1)
	go func() { sampled <- w.watch(ctx, begin, stop, &p) }()
	err = g.Wait()
	took := time.Since(begin)
	close(stop)
	if e := <-sampled; err == nil {
		err = e
	}
	if err != nil {
		return p, err
	}
	p.PutOff, p.Rate = w.putOff.Load(), float64(p.Turns)/took.Seconds()
	p.First = quantiles(first)
	w.sum(all, &p)
	return p, nil
}

// watch samples the daemon until stop.
func (w *world) watch(ctx context.Context, begin time.Time, stop chan struct{}, p *Phase) error {
	t := time.NewTicker(max(w.o.Time/samples, 10*time.Millisecond))
	defer t.Stop()
	for {
		s, err := sample(context.WithoutCancel(ctx), w.d, begin)
		if err != nil {
			return err
		}
		p.Samples = append(p.Samples, s)
		select {
		case <-stop:
			return nil
		case <-t.C:
		}
	}
}

// turn decodes some tokens of a context. It returns the seconds of the first call.
func (w *world) turn(ctx context.Context, all []*sequence, turn uint64, audit *Audit) (first float64, err error) {
	rng := rand.New(rand.NewPCG(w.o.Seed, 100+turn))
	q := all[rng.IntN(len(all))]
	q.mu.Lock()
	defer q.mu.Unlock()
	if rng.Float64() < w.o.Reopen {
		if err := w.reopen(ctx, q); err != nil {
			return 0, err
		}
	}
	at := len(q.took)
	for range w.o.Steps {
		if err := w.step(ctx, q); err != nil {
			return 0, err
		}
	}
	if rng.Float64() < w.o.Audit {
		if err := w.audit(ctx, q, rng.IntN(w.o.Layers), audit); err != nil {
			return 0, err
		}
	}
	return q.took[at], nil
}

// sum takes what the contexts' calls took into the phase.
func (w *world) sum(all []*sequence, p *Phase) {
	var calls, slow []float64
	for _, q := range all {
		if len(q.took) == 0 {
			continue
		}
		calls = append(calls, q.took...)
		slow = append(slow, percentile(slices.Sorted(slices.Values(q.took)), .99))
		q.took = nil
	}
	slices.Sort(slow)
	p.Calls, p.Visited, p.Attend = len(calls), len(slow), quantiles(calls)
	if len(slow) > 0 {
		p.Unfair = percentile(slow, .9) / percentile(slow, .5)
	}
}
