package million

import (
	"context"
	"time"

	"kvtier/bench/stats"
	"kvtier/bench/synth"
	kvtierv1 "kvtier/proto/kvtier/v1"
)

// ReopenReport is what coming back after kill -9 took.
type ReopenReport struct {
	ReadySeconds float64 // until the daemon answers at all
	FirstSeconds float64 // from the start, until the first answer of a layer
	StepSeconds  float64 // and until all layers have answered
	Accepted     uint64  // tokens that are there
	Expected     uint64
	Difference   float64   // relative, of the first answers against the same queries' before, largest
	NVMeBytes    float64   // that these answers read
	LaterMs      []float64 // of the same step, asked again
	LaterNVMe    []float64
}

// reopen kills the daemon, starts it again, and asks what was asked last.
func (r *run) reopen(ctx context.Context) error {
	asks := r.lastAsks(budget(r.o.Budgets[len(r.o.Budgets)-1]))
	before, err := r.again(ctx, asks)
	if err != nil {
		return err
	}
	rep := &r.rep.Reopen
	rep.Expected = uint64(r.first + r.o.steps())
	r.d.Kill()
	r.o.Say("killed; starting again")
	begin := time.Now()
	if err := r.start(ctx); err != nil {
		return err
	}
	rep.ReadySeconds = time.Since(begin).Seconds()
	open, err := r.d.Seq.OpenSequence(ctx, &kvtierv1.OpenSequenceRequest{SequenceId: r.id})
	if err != nil {
		return err
	}
	rep.Accepted = open.Ack.Accepted
	for i := range asks {
		res, err := r.again(ctx, asks[i:i+1])
		if err != nil {
			return err
		}
		if i == 0 {
			rep.FirstSeconds = time.Since(begin).Seconds()
		}
		rep.NVMeBytes += float64(res[0].Account.BytesNvme)
		rep.Difference = max(rep.Difference, stats.RelativeError(floats(res[0].Output), floats(before[i].Output)))
	}
	rep.StepSeconds = time.Since(begin).Seconds()
	for range laterSteps {
		t, nvme := time.Now(), 0.
		res, err := r.again(ctx, asks)
		if err != nil {
			return err
		}
		for _, a := range res {
			nvme += float64(a.Account.BytesNvme)
		}
		rep.LaterMs = append(rep.LaterMs, float64(time.Since(t).Nanoseconds())/1e6)
		rep.LaterNVMe = append(rep.LaterNVMe, nvme)
	}
	r.sample(ctx)
	return nil
}

// laterSteps are asked after the first one, to see how fast it comes back.
const laterSteps = 8

// again asks all layers what they were asked last.
func (r *run) again(ctx context.Context, asks []*kvtierv1.AttendRequest) (out []*kvtierv1.AttendResult, err error) {
	for _, in := range asks {
		res, err := r.d.Seq.Attend(ctx, in)
		if err != nil {
			return nil, err
		}
		out = append(out, res.Results[0])
	}
	return out, nil
}

// lastAsks are the queries of all layers at the last token, which is there.
func (r *run) lastAsks(b *kvtierv1.Budget) (asks []*kvtierv1.AttendRequest) {
	position := r.first + r.o.steps() - 1
	block := r.m.Block(position / synth.BlockTokens)
	for layer := range r.m.Layers {
		q := packed(r.m.Query(block, position-block.First, layer))
		asks = append(asks, &kvtierv1.AttendRequest{Layer: uint32(layer), Dtype: kvtierv1.ElementType_ELEMENT_TYPE_BF16, Budget: b,
			Items: []*kvtierv1.AttendItem{{SequenceId: r.id, Start: uint64(position), Q: q}}})
	}
	return asks
}
