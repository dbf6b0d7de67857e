package speed

import (
	"context"
	"fmt"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"kvtier/attention"
	"kvtier/bench/memtier"
	"kvtier/bench/planted"
	"kvtier/bench/stats"
	"kvtier/compress"
	"kvtier/server/sparse"
	"kvtier/tiers"
)

// layer is a context as one layer has it: all KV heads hold the same tokens,
// but each in memory of its own, since what they shared would be in the cache.
type layer struct {
	plain  *planted.Plain
	d      int
	heads  []layerHead
	mapped []byte // what all heads hold
}

// layerHead is what one KV head has.
type layerHead struct {
	tier *memtier.Tier
	k, v []byte // bfloat16 [tokens][d]
}

// newLayer copies a context of so many tokens for each head, to huge pages as in the RAM tier.
func newLayer(plain *planted.Plain, o AttendOptions, tokens int) (*layer, error) {
	k, v := plain.Rows(0, tokens)
	size := 2 * aligned(len(k))
	segments, _ := plain.Segments(tokens)
	for _, s := range segments {
		for p := range tiers.NumParts {
			size += aligned(int(s.Header.Bytes(p)))
		}
	}
	mapped, err := mmap(max(1, o.KVHeads*size))
	if err != nil {
		return nil, err
	}
	l := &layer{plain: plain, d: o.HeadDim, mapped: mapped}
	place := func(b []byte) []byte {
		at := mapped[:len(b):len(b)]
		mapped = mapped[aligned(len(b)):]
		copy(at, b)
		return at
	}
	for range o.KVHeads {
		l.heads = append(l.heads, layerHead{k: place(k), v: place(v), tier: plain.Tier.Clone(place)})
	}
	return l, nil
}

// aligned rounds up to cache lines.
func aligned(n int) int { return (n + 63) / 64 * 64 }

func (l *layer) close() { _ = unix.Munmap(l.mapped) } // it ends with the process at the latest

// queries returns what each KV head's group asks at the last position.
func (l *layer) queries(tokens, repeat int) (q [][]float32) {
	for h := range l.heads {
		q = append(q, l.plain.Query(tokens-1, uint64(repeat*len(l.heads)+h)))
	}
	return q
}

// layerAnswer is an answer of all KV heads.
type layerAnswer struct {
	heads []headAnswer
	ms    float64
}

type headAnswer struct {
	ps                               []attention.Partial
	zone, score, scan, fetch, attend int64 // nanoseconds; attend is all but the zone
	moved                            int64 // bytes of the sealed body
}

// answer answers from the first so many tokens, so many heads at a time; densely if there is no budget.
func (l *layer) answer(ctx context.Context, tokens int, queries [][]float32, b *sparse.Budget, threads int) (*layerAnswer, error) {
	a := &layerAnswer{heads: make([]headAnswer, len(l.heads))}
	begin := time.Now()
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(threads)
	for i, h := range l.heads {
		g.Go(func() (err error) {
			if b == nil {
				a.heads[i].ps = attention.NewPartials(len(queries[i])/l.d, l.d)
				l.rows(h, a.heads[i].ps, queries[i], 0, tokens)
				return ctx.Err()
			}
			a.heads[i], err = l.sparse(ctx, h, tokens, queries[i], *b)
			return err
		})
	}
	err := g.Wait()
	a.ms = float64(time.Since(begin).Nanoseconds()) / 1e6
	return a, err
}

// sparse answers for one head as the service does: the exact zone, then the sealed segments.
func (l *layer) sparse(ctx context.Context, h layerHead, tokens int, q []float32, b sparse.Budget) (headAnswer, error) {
	segments, covered := l.plain.Segments(tokens)
	a := headAnswer{ps: attention.NewPartials(len(q)/l.d, l.d)}
	begin := time.Now()
	l.rows(h, a.ps, q, 0, min(tiers.SinkTokens, covered))
	l.rows(h, a.ps, q, covered, tokens)
	a.zone = time.Since(begin).Nanoseconds()
	if covered == 0 {
		return a, nil
	}
	begin = time.Now()
	acc, err := sparse.Attend(ctx, h.tier, segments, sparse.Query{Q: q, Partials: a.ps}, b, nil)
	a.attend = time.Since(begin).Nanoseconds()
	if err != nil {
		return a, fmt.Errorf("attend: %w", err)
	}
	a.score, a.scan, a.fetch, a.moved = acc.NsScore, acc.NsScan, acc.NsFetch, acc.Moved.RAM
	return a, nil
}

// rows attends to the rows of tokens [lo, hi).
func (l *layer) rows(h layerHead, ps []attention.Partial, q []float32, lo, hi int) {
	a, b := lo*l.d*compress.BF16.Size(), hi*l.d*compress.BF16.Size()
	attention.AttendBF16(ps, q, h.k[a:b], h.v[a:b], l.d, 0)
}

// report makes the rows of one length: ours, the first of which is dense, then ggml's if it was measured.
func (l *layer) report(tokens int, ways []way, ours [][]*layerAnswer, theirs [][]PeerTime) (out []AttendRow) {
	_, covered := l.plain.Segments(tokens)
	full := float64(l.plain.Full(tokens)) * float64(len(l.heads))
	row := func(what string, ms func(repeat int) float64) AttendRow {
		r := AttendRow{Tokens: tokens, Sealed: covered, What: what}
		r.Ms = spreadOf(len(ours[0]), ms)
		r.Dense = spreadOf(len(ours[0]), func(i int) float64 { return ms(i) / ours[0][i].ms })
		return r
	}
	for i, w := range ways {
		r := row(w.what, func(repeat int) float64 { return ours[i][repeat].ms })
		if w.budget != nil {
			r.Stages, r.Error, r.Read = stagesOf(ours[i]), errorOf(ours[i], ours[0]), readOf(ours[i], full)
		}
		out = append(out, r)
	}
	for i, w := range besideAttend {
		if len(theirs[i]) > 0 {
			r := row("ggml "+w.Type+", "+w.Layout, func(repeat int) float64 { return 1e3 * theirs[i][repeat].Seconds })
			r.Error = theirs[i][0].Error
			out = append(out, r)
		}
	}
	return out
}

// readOf is the mean share of the sealed bytes that was moved.
func readOf(answers []*layerAnswer, full float64) float64 {
	if full == 0 {
		return 0
	}
	var moved int64
	for _, a := range answers {
		for h := range a.heads {
			moved += a.heads[h].moved
		}
	}
	return float64(moved) / full / float64(len(answers))
}

// stagesOf takes medians of each stage's sum over the heads.
func stagesOf(answers []*layerAnswer) *Stages {
	of := func(ns func(h *headAnswer) int64) float64 {
		return spreadOf(len(answers), func(i int) (ms float64) {
			for h := range answers[i].heads {
				ms += float64(ns(&answers[i].heads[h])) / 1e6
			}
			return ms
		}).Median
	}
	return &Stages{
		Zone:  of(func(h *headAnswer) int64 { return h.zone }),
		Score: of(func(h *headAnswer) int64 { return h.score }),
		Scan:  of(func(h *headAnswer) int64 { return h.scan }),
		Fetch: of(func(h *headAnswer) int64 { return h.fetch }),
		Rest:  of(func(h *headAnswer) int64 { return h.attend - h.score - h.scan - h.fetch }),
	}
}

// errorOf is the mean relative error of all rows against dense attention.
func errorOf(got, dense []*layerAnswer) (mean float64) {
	n := 0
	for i, a := range got {
		for h := range a.heads {
			for r := range a.heads[h].ps {
				mean += stats.RelativeError(output(&a.heads[h].ps[r]), output(&dense[i].heads[h].ps[r]))
				n++
			}
		}
	}
	return mean / float64(n)
}

func output(p *attention.Partial) []float32 {
	out := make([]float32, len(p.Out))
	p.Output(out)
	return out
}

// spreadOf is the spread of n numbers.
func spreadOf(n int, of func(i int) float64) Spread {
	x := make([]float64, n)
	for i := range x {
		x[i] = of(i)
	}
	return spread(x)
}
