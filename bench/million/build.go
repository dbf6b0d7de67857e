package million

import (
	"context"
	"fmt"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"kvtier/bench/synth"
	"kvtier/compress"
	kvtierv1 "kvtier/proto/kvtier/v1"
	"kvtier/tiers"
)

// BuildReport is what making the context took.
type BuildReport struct {
	Seconds       float64 // streaming in, and sealing
	PerSecond     float64 // tokens of all layers
	TokenHeads    float64 // sealed a second: tokens x layers x KV heads
	Bytes         int64   // of bfloat16 rows that were streamed in
	Disk          int64   // bytes of the folder
	SealedBytes   int64   // bytes of segments
	BitsPerValue  float64 // that segments take, everything included
	PutOff        int     // appends that had to wait for room
	PutOffSeconds float64
	Sealed        uint64 // tokens
}

// sampledEvery is how far apart the positions are whose queries go with a prefill.
const sampledEvery = 64

// layerRows is one block of one layer.
type layerRows struct {
	layer         int
	k, v, queries []byte
}

// build streams the context in, block by block, and waits until it is sealed.
func (r *run) build(ctx context.Context) error {
	open, err := r.d.Seq.OpenSequence(ctx, &kvtierv1.OpenSequenceRequest{Spec: r.spec(), Profile: kvtierv1.Profile_PROFILE_BALANCED, Name: sequenceName})
	if err != nil {
		return err
	}
	r.id, r.first = open.SequenceId, r.m.Tokens
	begin, said, b := time.Now(), time.Now(), &r.rep.Build
	for lo := 0; lo < r.m.Tokens; lo += synth.BlockTokens {
		hi := min(lo+synth.BlockTokens, r.m.Tokens)
		if err := r.stream(ctx, lo, hi); err != nil {
			return err
		}
		b.Bytes += int64(2 * (hi - lo) * r.m.Layers * r.m.RowBytes())
		if done := time.Since(begin); time.Since(said) > 10*time.Second || hi == r.m.Tokens {
			said = time.Now()
			r.sample(ctx)
			left := time.Duration(float64(done) * float64(r.m.Tokens-hi) / float64(hi))
			r.o.Say("%d of %d tokens streamed in, %.0f a second, about %v left", hi, r.m.Tokens, float64(hi)/done.Seconds(), left.Round(time.Second))
		}
	}
	if err := r.sealed(ctx); err != nil {
		return err
	}
	b.Seconds = time.Since(begin).Seconds()
	b.PerSecond = float64(r.m.Tokens) / b.Seconds
	b.TokenHeads = float64(b.Sealed) * float64(r.m.Layers*r.m.KVHeads) / b.Seconds
	r.stored(ctx)
	return nil
}

// stored notes what the context takes.
func (r *run) stored(ctx context.Context) {
	b := &r.rep.Build
	b.Disk = r.diskBytes()
	b.BitsPerValue = float64(b.SealedBytes) * 8 / (float64(b.Sealed) * float64(2*r.m.Layers*r.m.KVHeads*r.m.HeadDim))
	r.sample(ctx)
}

// take finds the context that an earlier run made.
func (r *run) take(ctx context.Context) error {
	list, err := r.d.Look.ListSequences(ctx, &kvtierv1.ListSequencesRequest{})
	if err != nil {
		return err
	}
	for _, s := range list.Sequences {
		if s.Name != sequenceName {
			continue
		}
		// A spec is given, so that another geometry or seed is refused.
		open, err := r.d.Seq.OpenSequence(ctx, &kvtierv1.OpenSequenceRequest{SequenceId: s.SequenceId, Spec: r.spec()})
		if err != nil {
			return err
		}
		if n := int(open.Ack.Accepted); n < r.m.Tokens {
			return fmt.Errorf("the folder's context has %d tokens, not %d", n, r.m.Tokens)
		}
		r.id, r.first = s.SequenceId, int(open.Ack.Accepted)
		if err := r.sealed(ctx); err != nil {
			return err
		}
		r.stored(ctx)
		return nil
	}
	return fmt.Errorf("%s holds no context of such a run", r.dir)
}

// sequenceName is what the context is called in the daemon.
const sequenceName = "million"

func (r *run) spec() *kvtierv1.ModelSpec {
	g := r.m.Geometry
	return &kvtierv1.ModelSpec{Layers: uint32(g.Layers), QueryHeads: uint32(g.KVHeads * g.Group), KvHeads: uint32(g.KVHeads), HeadDim: uint32(g.HeadDim),
		Scale: 1, KvDtype: kvtierv1.ElementType_ELEMENT_TYPE_BF16, Fingerprint: fmt.Appendf(nil, "kvbench million, seed %d", r.o.Seed)}
}

// stream appends tokens [lo, hi) of one block, while the next layers' rows are made.
func (r *run) stream(ctx context.Context, lo, hi int) error {
	block := r.m.Block(lo / synth.BlockTokens)
	rows := make(chan *layerRows)
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		defer close(rows)
		for layer := range r.m.Layers {
			select {
			case rows <- r.rows(block, layer, lo, hi):
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		return nil
	})
	g.Go(func() error {
		for l := range rows {
			in := &kvtierv1.AppendRequest{SequenceId: r.id, Layer: uint32(l.layer), Start: uint64(lo), K: l.k, V: l.v,
				Dtype: kvtierv1.ElementType_ELEMENT_TYPE_BF16, Queries: l.queries, Convert: true}
			if l.layer == 0 {
				in.TokenIds = block.Words(0, hi-lo)
			}
			if err := r.append(ctx, in); err != nil {
				return fmt.Errorf("tokens %d to %d of layer %d: %w", lo, hi, l.layer, err)
			}
		}
		return nil
	})
	return g.Wait()
}

func (r *run) rows(block *synth.Block, layer, lo, hi int) *layerRows {
	n := (hi - lo) * r.m.RowBytes()
	out := &layerRows{layer: layer, k: make([]byte, n), v: make([]byte, n)}
	r.m.Rows(out.k, out.v, layer, lo, hi, r.m.Hidden(block, layer))
	for t := sampledEvery - 1; t < hi-lo; t += sampledEvery {
		out.queries = append(out.queries, packed(r.m.Query(block, t, layer))...)
	}
	return out
}

// packed returns x as bfloat16.
func packed(x []float32) []byte {
	b := make([]byte, len(x)*compress.BF16.Size())
	compress.FromFloat32(b, x, compress.BF16)
	return b
}

// append appends, and waits as long as the daemon asks for.
func (r *run) append(ctx context.Context, in *kvtierv1.AppendRequest) error {
	for {
		_, err := r.d.Seq.Append(ctx, in)
		st, ok := status.FromError(err)
		if err == nil || !ok || st.Code() != codes.ResourceExhausted {
			return err
		}
		wait := time.Duration(0)
		for _, d := range st.Details() {
			if retry, ok := d.(*errdetails.RetryInfo); ok {
				wait = retry.RetryDelay.AsDuration()
			}
		}
		if wait == 0 {
			return err // waiting does not help
		}
		r.rep.Build.PutOff++
		r.rep.Build.PutOffSeconds += wait.Seconds()
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// sealed waits until all full segments behind the recent window are sealed.
func (r *run) sealed(ctx context.Context) error {
	want := uint64(max(0, r.m.Tokens-recentTokens) / tiers.SegmentTokens * tiers.SegmentTokens)
	for {
		d, err := r.d.Look.DescribeSequence(ctx, &kvtierv1.DescribeSequenceRequest{SequenceId: r.id})
		if err != nil {
			return err
		}
		if r.rep.Build.Sealed = d.Info.Ack.Sealed; r.rep.Build.Sealed >= want {
			r.rep.Build.SealedBytes = int64(d.Info.SealedBytes)
			return nil
		}
		select {
		case <-time.After(100 * time.Millisecond):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
