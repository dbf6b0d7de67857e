package seal

import (
	"encoding/binary"
	"slices"

	"kvtier/attention"
	"kvtier/attention/kernels"
	"kvtier/compress"
	"kvtier/tiers"
)

// View knows where things lie inside the planes of one head. Stored tokens are
// numbered by place: the body's first, leaf by leaf, then the outliers'.
type View struct {
	D    int
	Info tiers.HeadInfo
}

// Stored returns how many tokens are stored in planes: all but the sinks.
func (v View) Stored() int { return v.Info.Body + v.Info.Outliers }

// Pages returns how many pages there are, those of outliers included.
func (v View) Pages() int { return (v.Stored() + tiers.PageTokens - 1) / tiers.PageTokens }

// Leaves returns how many leaves there are, those of outliers included.
func (v View) Leaves() int { return (v.Stored() + tiers.LeafTokens - 1) / tiers.LeafTokens }

// Outliers says whether page p holds outliers: tokens unlike each other, of
// which a mean says little.
func (v View) Outliers(p int) bool { return p*tiers.PageTokens >= v.Info.Body }

// Drains returns how many of the outliers, the first, are drains: tokens whose
// last bits all profiles keep.
func (v View) Drains() int { return min(v.Info.Outliers, tiers.LeafTokens) }

// drainLeaf returns the leaf of drains, if there are any.
func (v View) drainLeaf() int { return v.Info.Body / tiers.LeafTokens }

// PageOfDrains returns the page that holds the drains, if there are any.
func (v View) PageOfDrains() int { return v.Info.Body / tiers.PageTokens }

// IsDrain says whether leaf l holds drains.
func (v View) IsDrain(l int) bool { return v.Drains() > 0 && l == v.drainLeaf() }

// DrainKeys returns where the drains' last bits of keys lie in PlaneDrains.
func (v View) DrainKeys() tiers.Range { return tiers.Range{Len: compress.KeyPlaneBytes(v.D)[4]} }

// DrainValue returns where the low codes of the drain at place t lie in PlaneDrains.
func (v View) DrainValue(t int) tiers.Range {
	row := compress.ValueRowBytes(v.D)
	return tiers.Range{Off: v.DrainKeys().Len + (t-v.Info.Body)*row, Len: row}
}

// PageTokens returns the number of tokens of page p.
func (v View) PageTokens(p int) int { return min(tiers.PageTokens, v.Stored()-p*tiers.PageTokens) }

// LeafTokens returns the number of tokens of leaf l.
func (v View) LeafTokens(l int) int { return min(tiers.LeafTokens, v.Stored()-l*tiers.LeafTokens) }

// LeavesOf returns the leaves of page p as [first, end).
func (v View) LeavesOf(p int) (first, end int) {
	const per = tiers.PageTokens / tiers.LeafTokens
	return p * per, min((p+1)*per, v.Leaves())
}

// PageMeans is what PlanePages says of a head's pages.
type PageMeans struct {
	Keys    compress.MeanKeys
	Spreads attention.Spreads // of keys
	Values  attention.Means
}

// Prefetch has the processor fetch all but mean values' rows.
func (m *PageMeans) Prefetch() {
	m.Keys.Prefetch()
	kernels.Prefetch(m.Spreads)
	m.Values.PrefetchMeta()
}

// PageMeans reads PlanePages, or MeanKeys of it, into m: then mean values have no rows yet. It keeps b. The error is compress.ErrCorrupt.
func (v View) PageMeans(m *PageMeans, b []byte) error {
	var rows []byte
	if at := v.MeanKeys(); len(b) != at.Len {
		rows, b = b[:at.Off], b[at.Off:]
	}
	keys, spreads := compress.MeanKeysBytes(v.Pages(), v.D), attention.SpreadsBytes(v.Pages())
	if err := m.Keys.Parse(b[:keys], v.Pages(), v.D, v.Info.KeyExp); err != nil {
		return err
	}
	meta := len(b) - spreads
	m.Spreads, m.Values = attention.Spreads(b[meta:]), attention.MeansOf(b[keys:meta], rows, v.D)
	return nil
}

// MeanKeys returns where in PlanePages all that lies behind the mean values' rows does.
func (v View) MeanKeys() tiers.Range {
	n := v.Pages()
	return tiers.Range{Off: n * v.D, Len: compress.MeanKeysBytes(n, v.D) + attention.MeansMetaBytes(n) + attention.SpreadsBytes(n)}
}

// MeanValue returns where in PlanePages the row of the mean value of page p lies.
func (v View) MeanValue(p int) tiers.Range { return tiers.Range{Off: p * v.D, Len: v.D} }

// PagesBytes is the size of PlanePages.
func (v View) PagesBytes() int { return v.MeanKeys().Off + v.MeanKeys().Len }

// LeafKeys returns where leaf l lies in the i-th of tiers.KeyPlanes.
func (v View) LeafKeys(i, l int) tiers.Range {
	n := compress.KeyPlaneBytes(v.D)[i]
	return tiers.Range{Off: l * n, Len: n}
}

// StepGroups returns how many groups of tokens have steps of their own. The
// outliers' are apart, so that they widen nobody else's.
func (v View) StepGroups() int { return bodyGroups(v.Info.Body) + bodyGroups(v.Info.Outliers) }

func bodyGroups(n int) int { return (n + tiers.StepTokens - 1) / tiers.StepTokens }

// StepGroup returns the group of leaf l.
func (v View) StepGroup(l int) int {
	if at := l*tiers.LeafTokens - v.Info.Body; at >= 0 {
		return bodyGroups(v.Info.Body) + at/tiers.StepTokens
	}
	return l * tiers.LeafTokens / tiers.StepTokens
}

// GroupPlaces returns the places of a group as [lo, hi).
func (v View) GroupPlaces(g int) (lo, hi int) {
	if n := bodyGroups(v.Info.Body); g >= n {
		lo = v.Info.Body + (g-n)*tiers.StepTokens
		return lo, min(lo+tiers.StepTokens, v.Stored())
	}
	lo = g * tiers.StepTokens
	return lo, min(lo+tiers.StepTokens, v.Info.Body)
}

// KeyOrder returns where the order of the keys' bits lies in PlaneSteps.
func (v View) KeyOrder() tiers.Range { return tiers.Range{Len: compress.KeyOrderBytes(v.D)} }

// Bins returns where the bins of group g of channels [16 lo, 16 hi), by stored order, lie in PlaneSteps.
func (v View) Bins(g, lo, hi int) tiers.Range {
	const line = tiers.LineSize
	return tiers.Range{Off: v.Steps(g).Off + lo*line, Len: (hi - lo) * line}
}

// Steps returns where the steps of group g lie in PlaneSteps.
func (v View) Steps(g int) tiers.Range {
	n := compress.KeyStepsBytes(v.D)
	return tiers.Range{Off: compress.KeyOrderBytes(v.D) + g*n, Len: n}
}

// ValueRanges returns where the scale and the high codes of the value at place t lie in PlaneV4.
func (v View) ValueRanges(t int) (scale, codes tiers.Range) {
	row := compress.ValueRowBytes(v.D)
	page := t / tiers.PageTokens
	n := min(tiers.PageTokens, v.Stored()-page*tiers.PageTokens)
	base := page * tiers.PageTokens * (compress.ValueScaleBytes + row)
	i := t % tiers.PageTokens
	return tiers.Range{Off: base + i*compress.ValueScaleBytes, Len: compress.ValueScaleBytes},
		tiers.Range{Off: base + n*compress.ValueScaleBytes + i*row, Len: row}
}

// PageKeys returns where the leaves of page p lie in the i-th of tiers.KeyPlanes.
func (v View) PageKeys(i, p int) tiers.Range {
	first, end := v.LeavesOf(p)
	n := compress.KeyPlaneBytes(v.D)[i]
	return tiers.Range{Off: first * n, Len: (end - first) * n}
}

// PageValues returns where the scales and, behind them, the high codes of the values of page p lie in PlaneV4.
func (v View) PageValues(p int) tiers.Range {
	value := compress.ValueScaleBytes + compress.ValueRowBytes(v.D)
	return tiers.Range{Off: p * tiers.PageTokens * value, Len: v.PageTokens(p) * value}
}

// size is how many bytes plane p has at least and at most in a segment of a profile.
func (v View) size(p tiers.Plane, t compress.ElementType, profile tiers.Profile) (least, most int) {
	keys := compress.KeyPlaneBytes(v.D)
	row, leaves := compress.ValueRowBytes(v.D), v.Leaves()
	exactly := func(n int) (int, int) { return n, n }
	low := func(n int) (int, int) {
		if profile == tiers.ProfileNeutral {
			return n, n
		}
		return 0, n
	}
	switch p {
	case tiers.PlanePages:
		return exactly(v.PagesBytes())
	case tiers.PlaneMap:
		return exactly(attention.ValueMapBytes(v.D))
	case tiers.PlaneSteps:
		return exactly(compress.KeyOrderBytes(v.D) + v.StepGroups()*compress.KeyStepsBytes(v.D))
	case tiers.PlaneOrder:
		return exactly(2 * v.Stored())
	case tiers.PlaneK1, tiers.PlaneK2, tiers.PlaneK3, tiers.PlaneK4:
		return exactly(leaves * keys[slices.Index(tiers.KeyPlanes[:], p)])
	case tiers.PlaneK8:
		return low(leaves * keys[4])
	case tiers.PlaneV4:
		return exactly(v.Stored() * (compress.ValueScaleBytes + row))
	case tiers.PlaneDrains:
		if v.Drains() > 0 {
			return exactly(v.DrainKeys().Len + v.Drains()*row)
		}
	case tiers.PlaneV8:
		return low(v.Stored() * row)
	case tiers.PlaneSinks:
		return exactly(2 * v.Info.Sinks * v.D * t.Size())
	case tiers.PlaneKX, tiers.PlaneVX:
		if profile == tiers.ProfileExact {
			pages := compress.ExactPages(v.Stored())
			return 5 * pages, 5*pages + v.Stored()*v.D*t.Size()
		}
	}
	return 0, 0
}

// BytesAt4Bits is what reading every stored token of the head once at 4 bits
// transfers, by definition: the base of budgets. Means and the bit by which keys
// have more are not in it.
func (v View) BytesAt4Bits() int {
	return v.Stored() * (compress.ValueRowBytes(v.D)*2 + compress.ValueScaleBytes)
}

// Positions returns the offset from the segment's start of each stored token.
func (v View) Positions(order []byte) []int {
	out := make([]int, v.Stored())
	for i := range out {
		out[i] = v.Position(order, i)
	}
	return out
}

// Position returns the offset from the segment's start of the token at a place.
func (v View) Position(order []byte, place int) int {
	return int(binary.LittleEndian.Uint16(order[2*place:]))
}

// WithoutLow hides the low planes of a segment from Keys and Values.
func WithoutLow(of func(tiers.Plane) []byte) func(tiers.Plane) []byte {
	return func(p tiers.Plane) []byte {
		if tiers.LowPlanes.Has(p) {
			return nil
		}
		return of(p)
	}
}

// Keys reconstructs all stored keys to dst [Stored][D] from all the planes of
// keys that there are; of returns a plane's bytes, nil if it is not there. The error is compress.ErrCorrupt.
func (v View) Keys(dst []float32, of func(tiers.Plane) []byte) error {
	c, err := v.Codes(of)
	if err != nil {
		return err
	}
	d := v.D
	leaf := make([]float32, tiers.LeafTokens*d)
	group, s := -1, compress.NewKeySteps(d)
	for l := range v.Leaves() {
		if g := v.StepGroup(l); g != group {
			if err := c.Steps(s, g); err != nil {
				return err
			}
			group = g
		}
		planes, _ := c.Leaves(l)
		c.Layout(l).Unpack(leaf, s, planes[:])
		c.order.Restore(dst[l*tiers.LeafTokens*d:], leaf[:v.LeafTokens(l)*d])
	}
	return nil
}

// Values reconstructs all stored values, rotated, to dst [Stored][D], as Keys does.
func (v View) Values(dst []float32, of func(tiers.Plane) []byte) {
	c := v.codes(of)
	for t := range v.Stored() {
		scale, high, low := c.Value(t)
		compress.UnpackValue(dst[t*v.D:(t+1)*v.D], scale, high, low, v.D)
	}
}
