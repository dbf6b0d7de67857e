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
	if t.sealing.Late() {
		return nil, fmt.Errorf("gpu: seal: %w", ErrStuck)
	}
	in := sealPatience * t.attender.patience
	patient, cancel := context.WithTimeout(ctx, in)
	defer cancel()
	out, err := t.sealing.Seal(patient, rows, options)
	if err != nil && ctx.Err() == nil && patient.Err() != nil {
		err = fmt.Errorf("gpu: seal: %w: nothing came in %v", ErrStuck, in)
	}
	return out, asTier(err)
}

// sealPatience is how many times as long as an answer segments are waited for: all layers of a span come together.
const sealPatience = 6
