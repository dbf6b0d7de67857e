package server

import (
	"context"
	"fmt"
	"math/rand/v2"

	"golang.org/x/sync/errgroup"

	"kvtier/tiers/seal"
	"kvtier/tiers/store"
)

// onDevice has a GPU make the segments of a span's full layers, all of them together, which b is to commit. It returns a place for each layer, nil without a GPU that is to seal; what the GPU
// did not make is left for the host.
func (z *sealer) onDevice(ctx context.Context, s *sequence, st *state, start, end uint64, b *store.Batch) []toSeal {
	if z.srv.opt.SealOnHost || !z.srv.store.HasDevice() {
		return nil
	}
	layers := make([]toSeal, s.spec.layers)
	var g errgroup.Group
	g.SetLimit(z.workers(st, s.spec))
	for l := range layers {
		if s.spec.window[l] == 0 {
			g.Go(func() error { layers[l] = s.toSeal(st, l, start, end); return nil })
		}
	}
	_ = g.Wait() // none fails
	// Layers whose samples differ in number go apart.
	alike := map[int][]*toSeal{}
	for l := range layers {
		if x := &layers[l]; x.rows != nil {
			n := len(x.options.Queries[0])
			alike[n] = append(alike[n], x)
		}
	}
	for _, some := range alike {
		if err := z.makeOnDevice(ctx, b, some); err != nil {
			for l := range layers {
				layers[l].made.Header = nil
			}
			z.srv.auditor.sealedWrongly(s.id, err)
			break
		}
	}
	return layers
}

// makeOnDevice makes segments on a GPU, if it can. Of each it checks one leaf a head against the rows, and a share of them is also made by the
// host: that they differ is an error.
func (z *sealer) makeOnDevice(ctx context.Context, b *store.Batch, layers []*toSeal) error {
	rows, options := make([]*seal.Rows, len(layers)), make([]seal.Options, len(layers))
	for i, x := range layers {
		rows[i], options[i] = x.rows, x.options
	}
	made, err := b.Seal(ctx, rows, options)
	if err != nil || made == nil {
		return err
	}
	var g errgroup.Group
	g.SetLimit(max(1, z.srv.opt.Cores/2))
	for i, x := range layers {
		g.Go(func() error {
			if err := seal.Spot(made[i].Header, made[i].Parts, x.rows, rand.IntN); err != nil {
				return fmt.Errorf("layer %d, tokens from %d: %w", x.rows.Layer, x.rows.Start, err)
			}
			if rand.Float32() >= z.srv.opt.GPUAuditShare {
				return nil
			}
			if h, _ := seal.Segment(x.rows, x.options); h.ID != made[i].Header.ID {
				return fmt.Errorf("layer %d, tokens from %d: another segment than the host's", x.rows.Layer, x.rows.Start)
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	for i, x := range layers {
		x.made = made[i]
	}
	z.madeOnDevice.Add(int64(len(layers)))
	return nil
}
