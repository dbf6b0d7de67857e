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
// none if there are no kernels for them. Nothing of it stays on the device. If the device does not answer, the
// error is ErrStuck. An error is of the device, and of all layers.
func (t *Tier) Seal(ctx context.Context, rows []*seal.Rows, options []seal.Options) ([]Sealed, error) {
	if t.sealing == nil || len(rows) == 0 {
		return nil, nil
	}
	for i := range rows {
		if !kernels.Seals(rows[i], &options[i]) {
			return nil, nil
		}
	}
	if err := t.usable(ctx); err != nil {
		return nil, fmt.Errorf("gpu: seal: %w", err)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel() // what is left begins no more batches
	var made []Sealed
	err := t.patiently(ctx, sealPatience*t.patience, func() (err error) { made, err = t.sealing.Seal(ctx, rows, options); return err }, nil)
	if err != nil {
		return nil, fmt.Errorf("gpu: seal: %w", asTier(err))
	}
	return made, nil
}

// sealPatience is how many times as long as an answer segments are waited for: all layers of a span come together.
const sealPatience = 6
