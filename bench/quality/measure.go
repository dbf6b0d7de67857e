package quality

import (
	"context"
	"fmt"
	"math"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sync/errgroup"

	"kvtier/bench/stats"
	"kvtier/tiers"
)

// Options of a measurement.
type Options struct {
	Profile tiers.Profile
	Shares  []float64 // of the sealed body's 4-bit bytes
	Step    int       // every Step-th of a dump's queries asks
	Methods []string  // empty: all
	// Scale multiplies queries; 0 means 1/sqrt(dim).
	Scale float64
	// Progress is told of every head that is done; may be nil.
	Progress func(done, of int)
}

// Result is what one method did with one budget, over all layers, heads and queries.
type Result struct {
	Method string  `json:"method"`
	Share  float64 `json:"share"` // that was given
	// Bytes transferred for the sealed body, in cache lines and in the disk's
	// blocks, over its bytes at 4 bits and in bfloat16.
	RAM  float64 `json:"ram_of_k4v4"`
	Disk float64 `json:"disk_of_k4v4"`
	BF16 float64 `json:"ram_of_bf16"`
	// Relative error of the output against exact attention over unquantised rows, by query head.
	Error Quantiles `json:"error"`
	// Error that the method stated beforehand, mean over query heads; NaN is null.
	Stated *float64 `json:"stated,omitempty"`
	// KL is that of the answer's weights to the true ones, in nats.
	KL Quantiles `json:"kl"`
	// Strong tokens, by the least weight of one: how many, and how many of them had their value unread.
	Strong10, Strong3 Strong
	ByLayer           map[string]float64 `json:"error_by_layer"`
}

// Quantiles of a figure.
type Quantiles struct {
	Mean float64 `json:"mean"`
	P50  float64 `json:"p50"`
	P95  float64 `json:"p95"`
	P99  float64 `json:"p99"`
	Max  float64 `json:"max"`
}

// Strong counts sealed tokens that carry much of a query head's weight.
type Strong struct {
	Tokens int `json:"tokens"`
	Unread int `json:"unread"`
	// Low and High bound the share that is unread, at 95 % (Wilson's interval).
	Low  float64 `json:"low"`
	High float64 `json:"high"`
}

// Share is the share of strong tokens whose value was not read.
func (s Strong) Share() float64 { return float64(s.Unread) / float64(max(1, s.Tokens)) }

// tally collects a Result.
type tally struct {
	errs, kl, stated      []float64
	byLayer               map[string][]float64
	ram, disk, k4v4, bf16 float64
	strong10, strong3     Strong
}

type key struct {
	method string
	share  float64
}

// Measure asks every question of every dump by every method. The result is in
// the order of methods and shares.
func Measure(ctx context.Context, dumps []string, o Options) ([]Result, error) {
	chosen, err := chooseMethods(o.Methods)
	if err != nil {
		return nil, err
	}
	var mu sync.Mutex
	all, done := make(map[key]*tally), 0
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(2)
	for _, file := range dumps {
		g.Go(func() error {
			sums, err := measureLayer(ctx, file, chosen, o)
			if err != nil {
				return err
			}
			mu.Lock()
			defer mu.Unlock()
			for k, t := range sums {
				if all[k] == nil {
					all[k] = &tally{byLayer: make(map[string][]float64)}
				}
				all[k].add(t)
			}
			if done++; o.Progress != nil {
				o.Progress(done, len(dumps))
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	var out []Result
	for _, m := range chosen {
		for _, s := range m.shares(o.Shares) {
			out = append(out, all[key{m.name, s}].result(m.name, s))
		}
	}
	return out, nil
}

func (m method) shares(given []float64) []float64 {
	if m.fixed {
		return []float64{1}
	}
	return given
}

func chooseMethods(names []string) (out []method, err error) {
	for _, m := range methods() {
		if len(names) == 0 && !m.named || slices.Contains(names, m.name) {
			out = append(out, m)
		}
	}
	for _, n := range names {
		if !slices.ContainsFunc(methods(), func(m method) bool { return m.name == n }) {
			return nil, fmt.Errorf("unknown method %q", n)
		}
	}
	return out, nil
}

func measureLayer(ctx context.Context, file string, chosen []method, o Options) (map[key]*tally, error) {
	d, err := ReadDump(file, o.Scale)
	if err != nil {
		return nil, err
	}
	c, err := newContext(d, o.Profile)
	if err != nil {
		return nil, fmt.Errorf("dump %s: %w", file, err)
	}
	sums := make(map[key]*tally)
	for head := range d.Heads {
		h, err := c.forHead(ctx, head)
		if err != nil {
			return nil, err
		}
		for i := 0; i < d.Queries; i += o.Step {
			if err := ctx.Err(); err != nil {
				return nil, err
			}
			x := h.question(i)
			for _, m := range chosen {
				for _, s := range m.shares(o.Shares) {
					a, err := m.answer(ctx, h, x, s)
					if err != nil {
						return nil, err
					}
					k := key{m.name, s}
					if sums[k] == nil {
						sums[k] = &tally{byLayer: make(map[string][]float64)}
					}
					sums[k].take(layerName(file), h, x, a)
				}
			}
		}
	}
	return sums, nil
}

// take adds one answer.
func (t *tally) take(layer string, h *headContext, x *question, a *answer) {
	for r := range x.rows {
		e := stats.RelativeError(a.out[r], x.out[r])
		t.errs = append(t.errs, e)
		t.byLayer[layer] = append(t.byLayer[layer], e)
		t.kl = append(t.kl, divergence(a.weight[r], x.weight[r]))
		for pos := tiers.SinkTokens; pos < h.end; pos++ {
			w := x.weight[r][pos]
			if w > .03 {
				t.strong3.count(a.read[pos])
			}
			if w > .1 {
				t.strong10.count(a.read[pos])
			}
		}
	}
	if !math.IsNaN(a.stated) {
		t.stated = append(t.stated, a.stated)
	}
	t.ram, t.disk = t.ram+float64(a.ram), t.disk+float64(a.disk)
	t.k4v4 += float64(h.bodyK4V4)
	t.bf16 += float64(h.sealedTokens() * 4 * h.d.Dim)
}

func (s *Strong) count(read bool) {
	s.Tokens++
	if !read {
		s.Unread++
	}
}

func (t *tally) add(o *tally) {
	t.errs, t.kl, t.stated = append(t.errs, o.errs...), append(t.kl, o.kl...), append(t.stated, o.stated...)
	for l, e := range o.byLayer {
		t.byLayer[l] = append(t.byLayer[l], e...)
	}
	t.ram, t.disk, t.k4v4, t.bf16 = t.ram+o.ram, t.disk+o.disk, t.k4v4+o.k4v4, t.bf16+o.bf16
	for _, s := range [][2]*Strong{{&t.strong10, &o.strong10}, {&t.strong3, &o.strong3}} {
		s[0].Tokens, s[0].Unread = s[0].Tokens+s[1].Tokens, s[0].Unread+s[1].Unread
	}
}

func (t *tally) result(method string, share float64) Result {
	r := Result{Method: method, Share: share, RAM: t.ram / t.k4v4, Disk: t.disk / t.k4v4, BF16: t.ram / t.bf16,
		Error: quantiles(t.errs), KL: quantiles(t.kl), Strong10: t.strong10.bounded(), Strong3: t.strong3.bounded(),
		ByLayer: make(map[string]float64)}
	if len(t.stated) > 0 {
		m := quantiles(t.stated).Mean
		r.Stated = &m
	}
	for l, e := range t.byLayer {
		r.ByLayer[l] = quantiles(e).Mean
	}
	return r
}

// divergence is KL(a || truth): finite also for answers that leave tokens out.
func divergence(a, truth []float64) (kl float64) {
	for t, w := range a {
		if w > 0 {
			kl += w * math.Log(w/max(truth[t], 1e-300))
		}
	}
	return max(kl, 0)
}

// quantiles sorts x.
func quantiles(x []float64) Quantiles {
	if len(x) == 0 {
		return Quantiles{}
	}
	slices.Sort(x)
	at := func(p float64) float64 { return x[min(len(x)-1, int(p*float64(len(x))))] }
	var sum float64
	for _, v := range x {
		sum += v
	}
	return Quantiles{Mean: sum / float64(len(x)), P50: at(.5), P95: at(.95), P99: at(.99), Max: x[len(x)-1]}
}

// bounded adds the interval of the unread share.
func (s Strong) bounded() Strong {
	s.Low, s.High = stats.Wilson(s.Share(), s.Tokens)
	return s
}

func layerName(file string) string { return strings.TrimSuffix(filepath.Base(file), ".npz") }
