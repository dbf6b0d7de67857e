package planted

import (
	"context"
	"fmt"
	"slices"

	"golang.org/x/sync/errgroup"

	"kvtier/bench/stats"
)

// outcome is what one method made of one question.
type outcome struct {
	trials []trial
	hops   []bool    // of a chain: whether its hops were decoded right
	errors []float64 // by row that looks
	lse    []float64 // |error|, likewise
	bytes  float64   // share of the 4-bit bytes, a call
	// stated and true error of a call, means over its rows; stated is negative if there is none.
	stated, actual float64
	peaks          [2]float64 // weight of what was asked about: read, all
	strong, unread [len(strongWeights)]int
}

// trial is one thing asked: whether dense attention and the method decoded it.
type trial struct{ dense, got bool }

// trials pairs what was decoded of dense attention's output and of the method's.
func trials(dense, got []bool) (out []trial) {
	for i := range dense {
		out = append(out, trial{dense[i], got[i]})
	}
	return out
}

// Run plants, seals, asks and measures. Budgets are shares of the sealed
// tokens' bytes at 4 bits. say may be nil.
func Run(ctx context.Context, o Options, budgets []float64, comparators bool, say Progress) (*Report, error) {
	if say == nil {
		say = func(string, ...any) {}
	}
	for _, b := range budgets {
		if !(b > 0 && b <= 1) {
			return nil, fmt.Errorf("budget %g: a share of the bytes lies in (0, 1]", b)
		}
	}
	say("%d tokens, head dimension %d: keys and values", o.Tokens, o.Shape.HeadDim)
	h, err := New(o)
	if err != nil {
		return nil, err
	}
	s, err := h.seal(ctx, say)
	if err != nil {
		return nil, err
	}
	questions, err := h.ask(ctx, say)
	if err != nil {
		return nil, err
	}
	rep := h.report(questions)
	for _, m := range s.methods(budgets, comparators) {
		outcomes, err := s.try(ctx, m, questions)
		if err != nil {
			return nil, fmt.Errorf("%s at %g: %w", m.name, m.budget, err)
		}
		say("%s at %g: %s", m.name, m.budget, rep.add(m, questions, outcomes))
	}
	return rep, nil
}

// try asks a method all questions. Chains go hop by hop, all of them together.
func (s *sealed) try(ctx context.Context, m method, questions []*question) ([]*outcome, error) {
	out := make([]*outcome, len(questions))
	direction := make([][]float32, len(questions)) // of a chain's next query
	for i, qu := range questions {
		out[i], direction[i] = &outcome{stated: -1}, qu.starts
	}
	for level := range hops {
		var at []int
		var queries [][]float32
		for i, qu := range questions {
			if qu.task == Chain {
				at, queries = append(at, i), append(queries, qu.hopQuery(s.h, level, direction[i]))
			} else if level == 0 {
				at, queries = append(at, i), append(queries, qu.q)
			}
		}
		answers, err := m.all(ctx, queries, s.h.w.d)
		if err != nil {
			return nil, err
		}
		for j, i := range at {
			o, a := out[i], answers[j]
			o.bytes += float64(a.bytes) / float64(s.full) / float64(max(1, len(questions[i].chain)))
			if qu := questions[i]; qu.task == Chain {
				s.takeHop(o, a, qu, level)
				direction[i] = s.h.plan.toContent(s.h.w, a.out[qu.row])
			} else {
				s.take(o, a, qu)
			}
		}
	}
	return out, nil
}

// hopQuery is the group's queries at a hop of a chain.
func (qu *question) hopQuery(h *Haystack, hop int, direction []float32) []float32 {
	d := h.w.d
	q := append([]float32(nil), qu.q...)
	copy(q[qu.row*d:(qu.row+1)*d], qu.chain[hop].query(h, direction))
	return q
}

// all answers queries, each [rows][d]. A method that reads everything reads it once.
func (m *method) all(ctx context.Context, queries [][]float32, d int) ([]*answer, error) {
	out := make([]*answer, len(queries))
	if m.whole {
		a, err := m.answer(ctx, slices.Concat(queries...))
		if err != nil {
			return nil, err
		}
		at := 0
		for i, q := range queries {
			part, n := *a, len(q)/d
			part.out, part.lse = a.out[at:at+n], a.lse[at:at+n]
			out[i] = &part
			at += n
		}
		return out, nil
	}
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(workers)
	for i, q := range queries {
		g.Go(func() (err error) { out[i], err = m.answer(ctx, q); return err })
	}
	return out, g.Wait()
}

// take measures the answer to a question that is no chain.
func (s *sealed) take(o *outcome, a *answer, qu *question) {
	o.stated = a.stated
	for entry, r := range qu.looks {
		o.look(a, r, qu.truth[r], qu.peaksOf(entry))
		if qu.task != Ordinary {
			o.trials = append(o.trials, trials(s.h.decode(qu.sample, entry, narrow(qu.truth[r].out)),
				s.h.decode(qu.sample, entry, a.out[r]))...)
		}
	}
	for r, t := range qu.truth {
		o.actual += stats.RelativeError(a.out[r], t.out) / float64(len(qu.truth))
	}
}

// takeHop measures a hop. Errors are against the chain that dense attention
// follows, so they contain what the hops before did; the hop's question is
// another one then, which is why its stated error is not compared. What counts
// is what the last hop finds.
func (s *sealed) takeHop(o *outcome, a *answer, qu *question, hop int) {
	t := qu.chain[hop].truth
	o.look(a, qu.row, t, qu.peaks[hop])
	got := s.h.decode(qu.sample, hop, a.out[qu.row])
	o.hops = append(o.hops, got[0])
	o.trials = trials(s.h.decode(qu.sample, hop, narrow(t.out)), got)
}

func (s *sample) peaksOf(entry int) []int {
	if s.task == Ordinary {
		return nil
	}
	return s.peaks[entry]
}

// look measures row r of an answer.
func (o *outcome) look(a *answer, r int, t *truth, peaks []int) {
	o.errors = append(o.errors, stats.RelativeError(a.out[r], t.out))
	e := float64(a.lse[r]) - t.lse
	o.lse = append(o.lse, max(e, -e))
	for i, p := range peaks {
		o.peaks[1] += t.peaks[i]
		if a.read == nil || a.read[p] {
			o.peaks[0] += t.peaks[i]
		}
	}
	for i, least := range strongWeights {
		for _, x := range t.strong {
			if x.weight <= least {
				continue
			}
			o.strong[i]++
			if a.read != nil && !a.read[x.position] {
				o.unread[i]++
			}
		}
	}
}
