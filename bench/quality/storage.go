package quality

import (
	"context"

	"kvtier/attention"
	"kvtier/compress"
	"kvtier/tiers"
	"kvtier/tiers/seal"
)

// Stored is what full segments take, in bits a key or value: image, header,
// and 64 bytes for their place in the catalogue.
type Stored struct {
	Profile string  `json:"profile"`
	Bits    float64 `json:"bits"`
	// Lossless are the bits of the planes that hold rows exactly; they are part of Bits.
	Lossless float64 `json:"lossless,omitempty"`
}

// locationBytes is what the catalogue keeps beside a header.
const locationBytes = 64

// Storage seals the first full segment of each dump by every profile.
func Storage(ctx context.Context, dumps []string) ([]Stored, error) {
	names := []string{"exact", "neutral", "balanced"}
	out := make([]Stored, len(names))
	var values float64
	for _, file := range dumps {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		d, err := ReadDump(file, 0)
		if err != nil {
			return nil, err
		}
		o := seal.Options{Sinks: tiers.SinkTokens}
		n := min(tiers.SegmentTokens, d.Tokens)
		for h := range d.Heads {
			s := attention.NewQuerySum(d.Dim)
			s.Add(d.sampled(h, 0, n))
			o.Metrics = append(o.Metrics, s.Metric())
		}
		values += float64(2 * n * d.Heads * d.Dim)
		for i, name := range names {
			o.Profile = tiers.ProfileExact + tiers.Profile(i)
			h, _ := seal.Segment(d.rows(0, n, compress.BF16), o)
			bytes := h.Bytes(tiers.PartMain) + h.Bytes(tiers.PartLow) + int64(len(h.Marshal())) + locationBytes
			out[i].Profile, out[i].Bits = name, out[i].Bits+8*float64(bytes)
			for head := range h.Heads {
				for _, p := range []tiers.Plane{tiers.PlaneKX, tiers.PlaneVX} {
					if _, n, ok := h.Piece(head, p); ok {
						out[i].Lossless += 8 * float64(n)
					}
				}
			}
		}
	}
	for i := range out {
		out[i].Bits, out[i].Lossless = out[i].Bits/values, out[i].Lossless/values
	}
	return out, nil
}
