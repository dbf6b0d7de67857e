package million

import (
	"context"
	"math"
	"slices"

	"golang.org/x/sync/errgroup"

	"kvtier/attention"
	"kvtier/attention/kernels"
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
	// Oracle is the mean error of an oracle that knows each query head's heaviest tokens of the body and reads as many of them,
	// unquantised, as the daemon read, and of the others nothing.
	Oracle float64
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
type audited struct{ err, oracle, sink, recent, body float64 }

func (a *AuditReport) add(row audited) {
	a.Rows++
	a.Mean, a.Oracle = a.Mean+row.err, a.Oracle+row.oracle
	a.Sink, a.Recent, a.Body = a.Sink+row.sink, a.Recent+row.recent, a.Body+row.body
}

// finish makes means of sums. errs are all rows'.
func (a *AuditReport) finish(errs []float64) {
	if a.Rows == 0 {
		return
	}
	n := float64(a.Rows)
	a.Mean, a.Oracle, a.Sink, a.Recent, a.Body = a.Mean/n, a.Oracle/n, a.Sink/n, a.Recent/n, a.Body/n
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

// layerAudit is the audit of a layer's calls. Rows of attention are numbered by call, KV head and query head of its group.
type layerAudit struct {
	*run
	layer  int
	calls  []asked
	rows   int // of attention
	blocks int
}

// zonesOf cuts the positions that a call sees.
func zonesOf(c *asked) [zones + 1]int {
	end := c.position + 1
	return [zones + 1]int{0, min(tiers.SinkTokens, end), max(tiers.SinkTokens, end-recentTokens), end}
}

// auditLayer compares a layer's calls, row by row.
func (r *run) auditLayer(ctx context.Context, layer int, calls []asked) ([][]audited, error) {
	a := &layerAudit{run: r, layer: layer, calls: calls, rows: len(calls) * r.m.KVHeads * r.m.Group}
	for i := range calls {
		a.blocks = max(a.blocks, calls[i].position/synth.BlockTokens+1)
	}
	dense, counts, err := a.dense(ctx)
	if err != nil {
		return nil, err
	}
	read, err := a.oracle(ctx, counts)
	if err != nil {
		return nil, err
	}
	d, perCall := r.m.HeadDim, r.m.KVHeads*r.m.Group
	want, got := make([]float32, d), make([]float32, d)
	out := make([][]audited, len(calls))
	for row := range a.rows {
		call := row / perCall
		sum, known := attention.NewPartials(1, d), attention.NewPartials(1, d)
		for z := range zones {
			sum[0].Merge(&dense[z][row])
			if z != zoneBody {
				known[0].Merge(&dense[z][row])
			}
		}
		known[0].Merge(&read[row])
		share := func(zone int) float64 { return math.Exp(float64(dense[zone][row].LSE() - sum[0].LSE())) }
		sum[0].Output(want)
		known[0].Output(got)
		out[call] = append(out[call], audited{
			err:    stats.RelativeError(calls[call].out[row%perCall*d:][:d], want),
			oracle: stats.RelativeError(got, want),
			sink:   share(zoneSink), recent: share(zoneRecent), body: share(zoneBody),
		})
	}
	return out, nil
}

// dense attends to all tokens, by zone and row, and counts the body's tokens of each row by score.
func (a *layerAudit) dense(ctx context.Context) ([][]attention.Partial, []scoreCounts, error) {
	var all [zones][auditors][]attention.Partial
	var counts [auditors][]scoreCounts
	for w := range auditors {
		for z := range zones {
			all[z][w] = attention.NewPartials(a.rows, a.m.HeadDim)
		}
		counts[w] = make([]scoreCounts, a.rows)
	}
	err := a.eachZone(ctx, func(worker, zone, row int, x *zoneRows) {
		if zone == zoneBody {
			for i := range a.m.Group {
				counts[worker][row+i].add(x.scores[i*x.n:][:x.n])
			}
		}
		x.attend(all[zone][worker][row:][:a.m.Group])
	})
	out := make([][]attention.Partial, zones)
	for z := range zones {
		out[z] = merged(all[z])
	}
	for w := 1; w < auditors; w++ {
		for row := range counts[0] {
			counts[0][row].merge(&counts[w][row])
		}
	}
	return out, counts[0], err
}

// oracle attends to those tokens of the body that score most, as many as the daemon read. counts is by row.
func (a *layerAudit) oracle(ctx context.Context, counts []scoreCounts) ([]attention.Partial, error) {
	least := make([]float32, a.rows)
	for row := range least {
		least[row] = counts[row].least(a.calls[row/(a.m.KVHeads*a.m.Group)].read)
	}
	var read [auditors][]attention.Partial
	for w := range auditors {
		read[w] = attention.NewPartials(a.rows, a.m.HeadDim)
	}
	err := a.eachZone(ctx, func(worker, zone, row int, x *zoneRows) {
		if zone != zoneBody {
			return
		}
		for i := range a.m.Group {
			for t, score := range x.scores[i*x.n:][:x.n] {
				if score < least[row+i] {
					x.scores[i*x.n+t] = float32(math.Inf(-1))
				}
			}
		}
		x.attend(read[worker][row:][:a.m.Group])
	})
	return merged(read), err
}

// auditors is how many threads make rows.
const auditors = 2

// merged merges what auditors found of the same rows.
func merged(by [auditors][]attention.Partial) []attention.Partial {
	for w := 1; w < auditors; w++ {
		for row := range by[0] {
			by[0][row].Merge(&by[w][row])
		}
	}
	return by[0]
}

// zoneRows are a block's tokens of a zone, and the scores that a group's query heads give them.
type zoneRows struct {
	scores   []float32 // [group][n]
	v        []byte
	n        int
	pitch, d int
}

// attend takes the tokens into the partials of the group.
func (x *zoneRows) attend(ps []attention.Partial) {
	attention.Weigh(ps, x.scores, x.n, x.n)
	kernels.AxpysBF16(attention.AppendSums(nil, ps), x.scores, x.n, x.v, x.n, x.pitch, x.d)
}

// eachZone makes all rows again, block by block, and has auditors, by number, use each zone's of each call and KV head; row is that of its group's first.
func (a *layerAudit) eachZone(ctx context.Context, use func(worker, zone, row int, x *zoneRows)) error {
	e, ctx := errgroup.WithContext(ctx)
	for w := range auditors {
		e.Go(func() error {
			for b := w; b < a.blocks && ctx.Err() == nil; b += auditors {
				a.useBlock(b, func(zone, row int, x *zoneRows) { use(w, zone, row, x) })
			}
			return ctx.Err()
		})
	}
	return e.Wait()
}

func (a *layerAudit) useBlock(number int, use func(zone, row int, x *zoneRows)) {
	block := a.m.Block(number)
	lo, n, size := block.First, synth.BlockTokens, a.m.RowBytes()
	k, v := make([]byte, n*size), make([]byte, n*size)
	a.m.Rows(k, v, a.layer, lo, lo+n, a.m.Hidden(block, a.layer))
	g, d, pitch := a.m.Group, a.m.HeadDim, size/compress.BF16.Size()
	scores := make([]float32, g*n)
	for i := range a.calls {
		cuts := zonesOf(&a.calls[i])
		for head := range a.m.KVHeads {
			for z := range zones {
				from, to := max(cuts[z], lo), min(cuts[z+1], lo+n)
				if from >= to {
					continue
				}
				at := (from-lo)*size + head*d*compress.BF16.Size()
				x := zoneRows{scores: scores[:g*(to-from)], v: v[at:], n: to - from, pitch: pitch, d: d}
				kernels.DotsBF16(x.scores, x.n, a.calls[i].q[head*g*d:][:g*d], k[at:], x.n, pitch, d)
				use(z, (i*a.m.KVHeads+head)*g, &x)
			}
		}
	}
}

// scoreCounts counts tokens by score, in 64ths of a nat from -128 to 128.
type scoreCounts [1 << 14]int32

const (
	countsPerNat = 64
	countsFrom   = -128
)

func (c *scoreCounts) add(scores []float32) {
	for _, s := range scores {
		c[int(max(0, min((s-countsFrom)*countsPerNat, float32(len(c)-1))))]++
	}
}

func (c *scoreCounts) merge(o *scoreCounts) {
	for i, n := range o {
		c[i] += n
	}
}

// least returns a score that so many tokens reach, those that share its 64th of a nat with the last of them included.
func (c *scoreCounts) least(tokens int) float32 {
	for i := len(c) - 1; i > 0; i-- {
		if tokens -= int(c[i]); tokens <= 0 {
			return countsFrom + float32(i)/countsPerNat
		}
	}
	return float32(math.Inf(-1))
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
