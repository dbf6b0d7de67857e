package gpu

import (
	"context"
	"fmt"

	"kvtier/tiers/gpu/kernels"
	"kvtier/tiers/seal"
)

// Sealed is a segment that the device made.
type Sealed = kernels.SealedSegment

// Seal makes the segments of a span's layers on the device: the same bytes as seal.Segment. The layers are alike (kernels.Sealing). It returns
// none if there are no kernels for them. Nothing of it stays on the device. An error is of the device, and of all layers.
func (t *Tier) Seal(ctx context.Context, rows []*seal.Rows, options []seal.Options) ([]Sealed, error) {
	if t.sealing == nil || len(rows) == 0 || !kernels.Seals(rows[0], options[0].Sinks) {
		return nil, nil
	}
	if err := t.usable(ctx); err != nil {
		return nil, fmt.Errorf("gpu: seal: %w", err)
	}
	out, err := t.sealing.Seal(ctx, rows, options)
	return out, asTier(err)
}
