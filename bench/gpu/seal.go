package gpu

import (
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"time"

	"kvtier/attention"
	"kvtier/bench/stats"
	"kvtier/tiers"
	"kvtier/tiers/gpu/cuda"
	"kvtier/tiers/gpu/kernels"
	"kvtier/tiers/seal"
)

// Sealed is how fast segments of so many layers are made, beside one core of the host: a token-head is a token of a KV head.
type Sealed struct {
	HeadDim, Heads, Layers, Tokens int
	Profile                        string
	Kernel                         stats.Spread // µs on the device
	Whole                          stats.Spread // µs from rows in host memory to images there; metrics are given
	Host                           float64      // µs of one core for one layer
	KernelRate, WholeRate          float64      // token-heads a second, of the medians
	HostRate                       float64
	Metric                         float64 // µs of one core for one head's metric, which the host makes in either case
}

// sealQueries are the queries of a head on which the codec's error is measured, as many as the daemon keeps.
const sealQueries = 16

// sealing measures one shape with several numbers of layers. Of each the first segment has to be the host's, byte for byte.
func sealing(ctx context.Context, d *cuda.Device, o *Options, headDim, heads int, profile string) (out []Sealed, err error) {
	layers, tokens := []int{1, 8, 32}, tiers.SegmentTokens
	if o.Short {
		layers, tokens, heads = []int{1, 2}, 300, 1
	}
	s, err := kernels.NewSealing(ctx, d)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, s.Close(context.WithoutCancel(ctx))) }()
	l := &layer{heads: heads, d: headDim}
	rng := rand.New(rand.NewPCG(o.Seed, 5))
	l.centres = normal(rng, heads*centres*headDim, 1.2)
	options := seal.Options{Profile: profileOf(profile)}
	begin := time.Now()
	for range heads {
		sum := attention.NewQuerySum(headDim)
		sum.Add(normal(rng, headDim*headDim, 1))
		begin = time.Now()
		options.Metrics = append(options.Metrics, sum.Metric())
		options.Queries = append(options.Queries, normal(rng, sealQueries*headDim, 3/math.Sqrt(float64(headDim))))
	}
	metric := float64(time.Since(begin)) / 1e3
	made := l.rows(tokens, 0, o.Seed)
	begin = time.Now()
	want, _ := seal.Segment(made, options)
	host := float64(time.Since(begin)) / 1e3
	for _, n := range layers {
		row := Sealed{HeadDim: headDim, Heads: heads, Layers: n, Tokens: tokens, Profile: profile, Host: host, Metric: metric}
		rows, all := make([]*seal.Rows, n), make([]seal.Options, n)
		for i := range rows {
			r := *made
			r.Layer = i
			rows[i], all[i] = &r, options
		}
		var us, wall []float64
		for i := range o.Repeats + 2 {
			begin := time.Now()
			got, took, err := s.SealTimed(ctx, rows, all)
			if errors.Is(err, cuda.ErrOutOfMemory) {
				return out, nil
			}
			if err != nil {
				return out, err
			}
			if got[0].Header.ID != want.ID {
				return out, fmt.Errorf("d %d: the device seals other bytes than the host", headDim)
			}
			if i >= 2 {
				us, wall = append(us, float64(took.Kernels)/1e3), append(wall, float64(time.Since(begin))/1e3)
			}
		}
		row.Kernel, row.Whole = stats.SpreadOf(us), stats.SpreadOf(wall)
		of := float64(tokens * heads)
		row.KernelRate, row.WholeRate = of*float64(n)/row.Kernel.Median*1e6, of*float64(n)/row.Whole.Median*1e6
		row.HostRate = of / host * 1e6
		o.Say("seal d %d, %d heads, %d layers, %s: kernels %.0f µs, %.2g token-heads a second; whole %.0f µs, %.2g; one core of the host %.2g, and %.0f µs a head for the metric", headDim,
			heads, n, profile, row.Kernel.Median, row.KernelRate, row.Whole.Median, row.WholeRate, row.HostRate, metric)
		out = append(out, row)
	}
	return out, nil
}
