package seal

import (
	"fmt"
	"math"

	"kvtier/compress"
	"kvtier/tiers"
)

// Spot checks a segment that something else than this package made of rows: that queries can read all of it, that each token has one
// place, and that in one leaf of each head keys and values are those of the rows, as far as their codes say. Which leaf of
// so many that is, pick says. The error is tiers.ErrCorrupt.
func Spot(h *tiers.Header, parts [tiers.NumParts][]byte, r *Rows, pick func(leaves int) int) error {
	if err := Check(h); err != nil {
		return err
	}
	for part := range parts {
		if err := CheckImage(h, tiers.Part(part), parts[part]); err != nil {
			return err
		}
	}
	if h.HeadDim != r.HeadDim || len(h.Heads) != r.Heads || h.Tokens != r.Tokens() || h.Start != r.Start || h.Layer != r.Layer {
		return fmt.Errorf("segment %v: layer %d, %d tokens from %d, %d heads of %d are not what was to be sealed: %w",
			h.ID, h.Layer, h.Tokens, h.Start, len(h.Heads), h.HeadDim, tiers.ErrCorrupt)
	}
	for i := range h.Heads {
		v := View{D: h.HeadDim, Info: h.Heads[i]}
		c, err := v.Codes(WithoutLow(func(p tiers.Plane) []byte { return piece(h, parts, i, p) }))
		if err == nil {
			err = c.holds(pick(v.Leaves()), r, i)
		}
		if err != nil {
			return fmt.Errorf("segment %v: head %d: %w: %w", h.ID, i, err, tiers.ErrCorrupt)
		}
	}
	return nil
}

// holds says whether leaf l stands for the rows of its tokens.
func (c *Codes) holds(l int, r *Rows, head int) error {
	d := c.D
	steps, keys, value := compress.NewKeySteps(d), make([]float32, tiers.LeafTokens*d), make([]float32, d)
	if err := c.Steps(steps, c.StepGroup(l)); err != nil {
		return err
	}
	layout := c.Layout(l)
	planes, _ := c.Leaves(l)
	layout.Unpack(keys, steps, planes[:])
	levels, at := layout.Levels(), r.HeadDim*r.Type.Size()
	row := make([]float32, d)
	for t := range c.LeafTokens(l) {
		place := l*tiers.LeafTokens + t
		from := (c.Position(c.planes[tiers.PlaneOrder], place)*r.Heads + head) * at
		compress.ToFloat32(row, r.K[from:from+at], r.Type)
		for j, channel := range c.order.Channels[:layout.Known()] {
			// Half a bin, what draws 2-bit midpoints to the centre, and what rounding makes up for of other channels'.
			bin := steps.Step[j] * float32(int(1)<<(8-2*levels[j/16]))
			if off := keys[t*d+j] - row[channel]; !(abs(off) <= bin+8*steps.Step[j]) {
				return fmt.Errorf("place %d: channel %d of the key is off by %v, of bins of %v", place, channel, off, bin)
			}
		}
		compress.ToFloat32(row, r.V[from:from+at], r.Type)
		compress.Rotate(row, d)
		scale, high, low := c.Value(place)
		compress.UnpackValue(value, scale, high, low, d)
		span := float32(0) // of the values and 0
		for _, x := range row {
			span = max(span, abs(x))
		}
		for j, x := range row {
			if off := value[j] - x; !(abs(off) <= span/8+math.SmallestNonzeroFloat32) {
				return fmt.Errorf("place %d: channel %d of the rotated value is off by %v, of at most %v", place, j, off, span)
			}
		}
	}
	return nil
}

func abs(x float32) float32 { return float32(math.Abs(float64(x))) }
