package million

import (
	"context"
	"fmt"
	"slices"
	"time"

	"kvtier/bench/synth"
	kvtierv1 "kvtier/proto/kvtier/v1"
)

// DecodeReport is what decode steps took. A step is one call a layer.
type DecodeReport struct {
	Budget         int // tokens
	Steps          int
	MedianMs       float64
	P95Ms, P99Ms   float64
	MostMs         float64
	PerSecond      float64 // by the mean
	GPUBytes       float64 // read in a GPU's memory a step, mean
	RAMBytes       float64 // transferred from the RAM tier a step, mean
	NVMeBytes      float64 // and from the NVMe tier
	ZoneBytes      float64 // and of unquantised rows
	NVMeMost       int64
	FullBytes      float64 // what all sealed tokens of all layers take at 4 bits
	HitRate        float64 // share of transferred bytes that RAM gave
	Scanned, Read  float64 // tokens a step, mean, summed over KV heads and layers
	LateCalls      float64 // share of calls of which some read was late
	LateTokens     float64 // that are known less well for that, a step, as Scanned and Read
	LateBytes      float64 // that they lack, a step
	EstimatedError float64 // stated, mean over calls
	CodecError     float64
	Stages         Stages
	Warm           []float64 // milliseconds of steps before, tenths of them: how caches fill
	WarmNVMe       []float64 // bytes of these from the NVMe tier
	Audit          AuditReport
	Strong         StrongReport
}

// StrongReport says how many sealed tokens had much of a query head's attention, and of how many of them the value was not read.
// It is of each budget's last step, in a few layers.
type StrongReport struct{ Layers, Tokens, Unread int }

// strong is the least share of a query head's attention that is much.
const strong = .03 // of at most 33 tokens

// Stages is where a step's time goes, milliseconds, means: of all KV heads' together, so that with two cores they add up to about twice the
// step's; but for Total, which is the calls' as the daemon sees them.
type Stages struct{ Zone, Score, Scan, Fetch, Total float64 }

// asked is a call that can be checked later.
type asked struct {
	budget, position, layer int
	read                    int       // tokens of the body, by a KV head, mean
	q                       []float32 // [kvHeads][group][d]
	out                     []float32
}

// step asks all layers at one position.
func (r *run) step(ctx context.Context, block *synth.Block, position int, b *kvtierv1.Budget) (*stepResult, error) {
	t := position - block.First
	items := make([]*kvtierv1.AttendRequest, r.m.Layers)
	queries := make([][]float32, r.m.Layers)
	for layer := range items {
		x := r.m.Hidden(block, layer)
		k, v := make([]byte, r.m.RowBytes()), make([]byte, r.m.RowBytes())
		r.m.Rows(k, v, layer, position, position+1, synth.HiddenAt(x, t))
		queries[layer] = r.m.Query(block, t, layer)
		item := &kvtierv1.AttendItem{SequenceId: r.id, Start: uint64(position), Q: packed(queries[layer]), K: k, V: v}
		if layer == 0 {
			item.TokenIds = block.Words(t, t+1)
		}
		items[layer] = &kvtierv1.AttendRequest{Layer: uint32(layer), Dtype: kvtierv1.ElementType_ELEMENT_TYPE_BF16, Budget: b, Items: []*kvtierv1.AttendItem{item}}
	}
	out := &stepResult{queries: queries}
	for layer, in := range items {
		begin := time.Now()
		res, err := r.d.Seq.Attend(ctx, in)
		if err != nil {
			return nil, fmt.Errorf("layer %d at %d: %w", layer, position, err)
		}
		out.ms += float64(time.Since(begin).Nanoseconds()) / 1e6
		out.add(res.Results[0].Account)
		out.outputs = append(out.outputs, floats(res.Results[0].Output))
	}
	return out, nil
}

// stepResult is what a step took, summed over layers.
type stepResult struct {
	ms               float64
	acc              []*kvtierv1.Account
	nvme             int64
	queries, outputs [][]float32 // by layer
}

func (s *stepResult) add(a *kvtierv1.Account) {
	s.acc = append(s.acc, a)
	s.nvme += int64(a.BytesNvme)
}

// decode asks the steps before, which fill caches, and those that are measured, of every budget.
func (r *run) decode(ctx context.Context) error {
	position := r.first
	block := r.m.Block(position / synth.BlockTokens)
	if position%synth.BlockTokens+r.o.steps() > synth.BlockTokens {
		return fmt.Errorf("%d steps do not fit behind token %d: a block has %d", r.o.steps(), position, synth.BlockTokens)
	}
	for i, tokens := range r.o.Budgets {
		if err := r.decodeWith(ctx, block, position, i, tokens); err != nil {
			return err
		}
		position += r.o.Warm + r.o.Steps
	}
	return nil
}

func (r *run) decodeWith(ctx context.Context, block *synth.Block, first, number, tokens int) error {
	var steps, warm []*stepResult
	audits := r.auditPlan()
	b := budget(tokens)
	b.ReadWaitUs = uint32(r.o.ReadWait.Microseconds())
	for i := range r.o.Warm + r.o.Steps {
		s, err := r.step(ctx, block, first+i, b)
		if err != nil {
			return err
		}
		if i < r.o.Warm {
			warm = append(warm, s)
		} else {
			steps = append(steps, s)
		}
		if i%16 == 15 {
			r.sample(ctx)
			r.o.Say("budget %d, step %d of %d: %.0f ms", tokens, i+1, r.o.Warm+r.o.Steps, s.ms)
		}
		for layer := range r.m.Layers {
			if audits[[2]int{i - r.o.Warm, layer}] {
				r.asked = append(r.asked, asked{budget: number, position: first + i, layer: layer, read: int(s.acc[layer].TokensRead) / r.m.KVHeads,
					q: rounded(s.queries[layer]), out: s.outputs[layer]})
			}
		}
	}
	d := DecodeReport{Budget: tokens}
	d.sum(steps)
	for at := range min(10, len(warm)) {
		part := warm[at*len(warm)/min(10, len(warm)) : (at+1)*len(warm)/min(10, len(warm))]
		d.Warm = append(d.Warm, meanOf(part, func(s *stepResult) float64 { return s.ms }))
		d.WarmNVMe = append(d.WarmNVMe, meanOf(part, func(s *stepResult) float64 { return float64(s.nvme) }))
	}
	if err := d.Strong.count(ctx, r); err != nil {
		return err
	}
	r.rep.Decode = append(r.rep.Decode, d)
	r.sample(ctx)
	return nil
}

// count has the daemon explain what it answered last.
func (x *StrongReport) count(ctx context.Context, r *run) error {
	x.Layers = min(r.o.Audits, r.m.Layers, 2)
	for i := range x.Layers {
		e, err := r.d.Look.Explain(ctx, &kvtierv1.ExplainRequest{SequenceId: r.id, Layer: uint32(i * r.m.Layers / x.Layers), Top: 34})
		if err != nil {
			return fmt.Errorf("explain: %w", err)
		}
		for _, h := range e.Heads {
			for _, t := range h.Tokens {
				if t.Weight < strong || t.How == "exact" {
					continue
				}
				if x.Tokens++; t.How != "read" {
					x.Unread++
				}
			}
		}
	}
	return nil
}

func meanOf(steps []*stepResult, of func(*stepResult) float64) (mean float64) {
	for _, s := range steps {
		mean += of(s) / float64(len(steps))
	}
	return mean
}

func (d *DecodeReport) sum(steps []*stepResult) {
	d.Steps = len(steps)
	var ms []float64
	for _, s := range steps {
		ms = append(ms, s.ms)
		d.NVMeMost = max(d.NVMeMost, s.nvme)
	}
	d.PerSecond = 1e3 / meanOf(steps, func(s *stepResult) float64 { return s.ms })
	slices.Sort(ms)
	at := func(p float64) float64 { return ms[min(len(ms)-1, int(p*float64(len(ms))))] }
	d.MedianMs, d.P95Ms, d.P99Ms, d.MostMs = at(.5), at(.95), at(.99), ms[len(ms)-1]
	of := func(f func(a *kvtierv1.Account) float64) float64 {
		return meanOf(steps, func(s *stepResult) (sum float64) {
			for _, a := range s.acc {
				sum += f(a)
			}
			return sum
		})
	}
	layers := float64(len(steps[0].acc))
	d.GPUBytes = of(func(a *kvtierv1.Account) float64 { return float64(a.BytesGpu) })
	d.RAMBytes = of(func(a *kvtierv1.Account) float64 { return float64(a.BytesRam) })
	d.NVMeBytes = of(func(a *kvtierv1.Account) float64 { return float64(a.BytesNvme) })
	d.ZoneBytes = of(func(a *kvtierv1.Account) float64 { return float64(a.BytesExactZone) })
	d.FullBytes = of(func(a *kvtierv1.Account) float64 { return float64(a.BytesFull) })
	d.HitRate = d.RAMBytes / max(1, d.RAMBytes+d.NVMeBytes)
	d.Scanned = of(func(a *kvtierv1.Account) float64 { return float64(a.TokensScanned) })
	d.Read = of(func(a *kvtierv1.Account) float64 { return float64(a.TokensRead) })
	d.LateTokens = of(func(a *kvtierv1.Account) float64 { return float64(a.TokensLate) })
	d.LateBytes = of(func(a *kvtierv1.Account) float64 { return float64(a.BytesLate) })
	d.LateCalls = of(func(a *kvtierv1.Account) float64 { return float64(min(a.TokensLate, 1)) }) / layers
	d.EstimatedError = of(func(a *kvtierv1.Account) float64 { return float64(a.EstimatedError) }) / layers
	d.CodecError = of(func(a *kvtierv1.Account) float64 { return float64(a.CodecError) }) / layers
	ns := func(f func(a *kvtierv1.Account) uint64) float64 {
		return of(func(a *kvtierv1.Account) float64 { return float64(f(a)) }) / 1e6
	}
	d.Stages = Stages{ns((*kvtierv1.Account).GetNsExactZone), ns((*kvtierv1.Account).GetNsScore), ns((*kvtierv1.Account).GetNsScan),
		ns((*kvtierv1.Account).GetNsFetch), ns((*kvtierv1.Account).GetNsTotal)}
}

// DenseReport is what answering from everything stored takes, from the same tiers.
type DenseReport struct {
	Layers    int
	MsPerCall float64
	MsPerStep float64 // if all layers take as long
	NVMeBytes float64 // a call
	Ratio     float64 // over the median of steps with the first budget
}

// dense asks some layers once more, and has everything read.
func (r *run) dense(ctx context.Context) error {
	n := min(r.o.Dense, r.m.Layers)
	if n == 0 {
		return nil
	}
	d := &r.rep.Dense
	asks := r.lastAsks(&kvtierv1.Budget{Mode: kvtierv1.AttendMode_ATTEND_MODE_EXACT})
	for i := range n {
		layer := i * r.m.Layers / n
		begin := time.Now()
		res, err := r.again(ctx, asks[layer:layer+1])
		if err != nil {
			return err
		}
		ms := float64(time.Since(begin).Nanoseconds()) / 1e6
		d.MsPerCall += ms / float64(n)
		d.NVMeBytes += float64(res[0].Account.BytesNvme) / float64(n)
		r.o.Say("layer %d from everything stored: %.0f ms", layer, ms)
	}
	d.Layers, d.MsPerStep = n, d.MsPerCall*float64(r.m.Layers)
	d.Ratio = d.MsPerStep / r.rep.Decode[0].MedianMs
	r.sample(ctx)
	return nil
}
