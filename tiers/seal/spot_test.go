package seal

import (
	"errors"
	"fmt"
	"slices"
	"testing"

	"kvtier/compress"
	"kvtier/tiers"
)

// TestSpot: whatever the sealer makes passes, leaf by leaf; a segment of other rows, with a key, a value or a place that is wrong, does not.
func TestSpot(t *testing.T) {
	for _, d := range []int{64, 128, 256} {
		for _, o := range []Options{{Profile: tiers.ProfileBalanced}, {Profile: tiers.ProfileNeutral, Sinks: tiers.SinkTokens}, {Profile: tiers.ProfileBalanced, Low: true}} {
			t.Run(fmt.Sprintf("d%d/profile%d/low%v", d, o.Profile, o.Low), func(t *testing.T) {
				r := madeUp(413, 2, d, compress.BF16)
				o.Metrics = metrics(r.Heads, d)
				h, parts := Segment(r, o)
				spot := func(h *tiers.Header, parts [tiers.NumParts][]byte, leaf int) error {
					return Spot(h, parts, r, func(n int) int { return min(leaf, n-1) })
				}
				leaves := View{D: d, Info: h.Heads[0]}.Leaves()
				for l := range leaves {
					if err := spot(h, parts, l); err != nil {
						t.Fatal(err)
					}
				}
				// one is a segment with one byte of a plane of head 1 changed.
				one := func(p tiers.Plane, at int, change byte) (changed [tiers.NumParts][]byte) {
					for i := range parts {
						changed[i] = slices.Clone(parts[i])
					}
					piece(h, changed, 1, p)[at] ^= change
					return changed
				}
				row := compress.ValueRowBytes(d)
				v := View{D: d, Info: h.Heads[1]}
				_, codes := v.ValueRanges(5*tiers.LeafTokens + 3)
				for what, parts := range map[string][tiers.NumParts][]byte{
					"key":   one(tiers.PlaneK1, 5*compress.KeyPlaneBytes(d)[0]+6, 3),
					"value": one(tiers.PlaneV4, codes.Off+row/2, 0x80),
					"place": one(tiers.PlaneOrder, 2*(5*tiers.LeafTokens+3), 1),
				} {
					if err := spot(h, parts, 5); !errors.Is(err, tiers.ErrCorrupt) {
						t.Errorf("%s: %v", what, err)
					}
				}
				other := madeUp(413, 2, d, compress.BF16)
				slices.Reverse(other.K)
				slices.Reverse(other.V)
				if err := Spot(h, parts, other, func(int) int { return 0 }); !errors.Is(err, tiers.ErrCorrupt) {
					t.Errorf("other rows: %v", err)
				}
				if err := Spot(h, parts, madeUp(412, 2, d, compress.BF16), func(int) int { return 0 }); !errors.Is(err, tiers.ErrCorrupt) {
					t.Errorf("fewer rows: %v", err)
				}
			})
		}
	}
}
