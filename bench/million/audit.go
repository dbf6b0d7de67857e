package million

import (
	"context"
	"math"
	"slices"

	"golang.org/x/sync/errgroup"

	"kvtier/attention"
	"kvtier/bench/stats"
	"kvtier/bench/synth"
	"kvtier/compress"
	"kvtier/tiers"
)

// AuditReport is how far answers lay from dense attention over the unquantised rows.
type AuditReport struct {
	Calls    int // of one layer each
	Rows     int // query heads of all calls
	Mean     float64
	Median   float64
	P95, Max float64
	ByLayer  map[int]float64 // mean
	// Of dense attention, means over rows: what gets how much of it.
	Sink, Recent, Body float64
}

// auditPlan chooses calls: [step, layer], of few layers, because each layer's rows have to be made again.
func (r *run) auditPlan() map[[2]int]bool {
	plan := map[[2]int]bool{}
	layers := min(r.m.Layers, max(1, r.o.Audits/4))
	for i := range r.o.Audits {
		layer := i % layers * r.m.Layers / layers
		plan[[2]int{i / layers * max(1, r.o.Steps*layers/max(1, r.o.Audits)) % r.o.Steps, layer}] = true
	}
	return plan
}

// audit makes the rows of the chosen layers again and compares.
func (r *run) audit(ctx context.Context) error {
	byLayer := map[int][]asked{}
	for _, a := range r.asked {
		byLayer[a.layer] = append(byLayer[a.layer], a)
	}
	errs := make([][]float64, len(r.rep.Decode)) // by budget
	for layer, calls := range byLayer {
		r.o.Say("layer %d: dense attention for %d calls", layer, len(calls))
		found, err := r.auditLayer(ctx, layer, calls)
		if err != nil {
			return err
		}
		for i, rows := range found {
			a := &r.rep.Decode[calls[i].budget].Audit
			if a.ByLayer == nil {
				a.ByLayer = map[int]float64{}
			}
			a.Calls++
			for _, row := range rows {
				a.add(row)
				a.ByLayer[layer] += row.err
				errs[calls[i].budget] = append(errs[calls[i].budget], row.err)
			}
		}
	}
	for i := range r.rep.Decode {
		r.rep.Decode[i].Audit.finish(errs[i])
	}
	return nil
}

// audited is what is found of one row.
type audited struct{ err, sink, recent, body float64 }

func (a *AuditReport) add(row audited) {
	a.Rows++
	a.Mean += row.err
	a.Sink, a.Recent, a.Body = a.Sink+row.sink, a.Recent+row.recent, a.Body+row.body
}

// finish makes means of sums. errs are all rows'.
func (a *AuditReport) finish(errs []float64) {
	if a.Rows == 0 {
		return
	}
	n := float64(a.Rows)
	a.Mean, a.Sink, a.Recent, a.Body = a.Mean/n, a.Sink/n, a.Recent/n, a.Body/n
	for layer := range a.ByLayer {
		a.ByLayer[layer] /= n / float64(len(a.ByLayer))
	}
	slices.Sort(errs)
	a.Median, a.P95, a.Max = errs[len(errs)/2], errs[len(errs)*95/100], errs[len(errs)-1]
}

// zones are the parts of a context that are told apart: the first tokens, the body, and the newest.
const (
	zoneSink = iota
	zoneBody
	zoneRecent
	zones
)

// auditLayer compares a layer's calls, row by row.
func (r *run) auditLayer(ctx context.Context, layer int, calls []asked) ([][]audited, error) {
	g, d := r.m.Group, r.m.HeadDim
	last := 0
	for _, c := range calls {
		last = max(last, c.position)
	}
	blocks := last/synth.BlockTokens + 1
	const workers = 2
	partials := make([][][]attention.Partial, workers) // [worker][zone][call][kvHead][group]
	e, ctx := errgroup.WithContext(ctx)
	for w := range workers {
		partials[w] = make([][]attention.Partial, zones)
		for z := range zones {
			partials[w][z] = attention.NewPartials(len(calls)*r.m.KVHeads*g, d)
		}
		e.Go(func() error {
			for b := w; b < blocks && ctx.Err() == nil; b += workers {
				r.attendBlock(partials[w], layer, calls, b)
			}
			return ctx.Err()
		})
	}
	if err := e.Wait(); err != nil {
		return nil, err
	}
	out := make([][]audited, len(calls))
	for i := range calls {
		for row := range r.m.KVHeads * g {
			at := i*r.m.KVHeads*g + row
			sum, lse := attention.NewPartials(1, d), [zones]float64{}
			for z := range zones {
				for w := 1; w < workers; w++ {
					partials[0][z][at].Merge(&partials[w][z][at])
				}
				lse[z] = float64(partials[0][z][at].LSE())
				sum[0].Merge(&partials[0][z][at])
			}
			share := func(zone int) float64 { return math.Exp(lse[zone] - float64(sum[0].LSE())) }
			want := make([]float32, d)
			sum[0].Output(want)
			out[i] = append(out[i], audited{stats.RelativeError(calls[i].out[row*d:(row+1)*d], want),
				share(zoneSink), share(zoneRecent), share(zoneBody)})
		}
	}
	return out, nil
}

// attendBlock attends to one block's tokens.
func (r *run) attendBlock(ps [][]attention.Partial, layer int, calls []asked, number int) {
	block := r.m.Block(number)
	lo, n := block.First, synth.BlockTokens
	row := r.m.RowBytes()
	k, v := make([]byte, n*row), make([]byte, n*row)
	r.m.Rows(k, v, layer, lo, lo+n, r.m.Hidden(block, layer))
	g, d := r.m.Group, r.m.HeadDim
	for i, c := range calls {
		end := c.position + 1
		cuts := [zones + 1]int{0, min(tiers.SinkTokens, end), max(tiers.SinkTokens, end-recentTokens), end}
		for head := range r.m.KVHeads {
			q := c.q[head*g*d : (head+1)*g*d]
			for z := range zones {
				from, to := max(cuts[z], lo), min(cuts[z+1], lo+n)
				if from >= to {
					continue
				}
				at := (from-lo)*row + head*d*compress.BF16.Size()
				to -= from
				rows := ps[z][(i*r.m.KVHeads+head)*g:][:g]
				attention.AttendBF16(rows, q, k[at:], v[at:], to, row/compress.BF16.Size(), d, 0)
			}
		}
	}
}

// recentTokens is how many of the newest tokens the daemon leaves unsealed.
const recentTokens = 256

// rounded returns x as it is after a bfloat16.
func rounded(x []float32) []float32 {
	out := make([]float32, len(x))
	compress.ToFloat32(out, packed(x), compress.BF16)
	return out
}

func floats(b []byte) []float32 {
	out := make([]float32, len(b)/4)
	compress.ToFloat32(out, b, compress.F32)
	return out
}
