package seal

import (
	"kvtier/attention/kernels"
	"kvtier/compress"
	"kvtier/tiers"
)

// Codes reads the codes of all stored tokens of a head from all planes of keys
// and values that there are. It copies nothing.
type Codes struct {
	View
	planes [tiers.NumPlanes][]byte
	sizes  [compress.NumKeyPlanes]int // of a leaf in each plane of keys
	order  compress.KeyOrder
	// layouts of leaves of the body and of outliers, and of drains, which may have a plane more.
	layout, drains compress.KeyLayout
}

// Codes reads from the planes that of returns, nil if one is not there; its
// error is compress.ErrCorrupt.
func (v View) Codes(of func(tiers.Plane) []byte) (*Codes, error) {
	c := v.codes(of)
	c.sizes = compress.KeyPlaneBytes(v.D)
	order, err := compress.ParseKeyOrder(c.planes[tiers.PlaneSteps], v.D)
	if err != nil {
		return nil, err
	}
	c.order = order
	body, drains := compress.NumKeyPlanes-1, compress.NumKeyPlanes-1
	if c.planes[tiers.PlaneK8] != nil {
		body, drains = compress.NumKeyPlanes, compress.NumKeyPlanes
	} else if c.planes[tiers.PlaneDrains] != nil {
		drains = compress.NumKeyPlanes
	}
	c.layout = compress.NewKeyLayout(v.D, order.Lines, body)
	c.drains = compress.NewKeyLayout(v.D, order.Lines, drains)
	return c, nil
}

// codes reads values only.
func (v View) codes(of func(tiers.Plane) []byte) *Codes {
	c := &Codes{View: v}
	for p := range c.planes {
		c.planes[p] = of(tiers.Plane(p))
	}
	return c
}

// Order returns the order of the keys' bits.
func (c *Codes) Order() compress.KeyOrder { return c.order }

// Steps parses the bins of the keys of a group of tokens into s, of D channels. The error is compress.ErrCorrupt.
func (c *Codes) Steps(s compress.KeySteps, group int) error {
	return s.Parse(c.stored(group), c.Info.KeyExp)
}

// stored returns what is stored of the bins of a group of tokens.
func (c *Codes) stored(group int) []byte {
	r := c.View.Steps(group)
	return c.planes[tiers.PlaneSteps][r.Off : r.Off+r.Len]
}

// Fold prepares query rows q [rows][D], channels in stored order, for keys of a group of tokens that have a Layout. The error is compress.ErrCorrupt.
func (c *Codes) Fold(dst kernels.KeyQuery, q []float32, l *compress.KeyLayout, group int) error {
	return l.FoldStored(dst, q, c.stored(group), c.Info.KeyExp)
}

// Layout returns the layout of leaf l's keys, which is one of two.
func (c *Codes) Layout(l int) *compress.KeyLayout {
	if c.IsDrain(l) {
		return &c.drains
	}
	return &c.layout
}

// Leaves returns the planes of keys from leaf l on, to be read by Layout(l), and how far apart they have their leaves.
func (c *Codes) Leaves(l int) (out [compress.NumKeyPlanes][]byte, steps [compress.NumKeyPlanes]int) {
	for i, p := range tiers.KeyPlanes {
		if b := c.planes[p]; b != nil {
			out[i] = b[l*c.sizes[i]:]
		} else if p == tiers.PlaneK8 && c.IsDrain(l) {
			out[i] = c.planes[tiers.PlaneDrains]
		}
	}
	return out, c.sizes
}

// Values returns what is stored of the values of places [lo, hi) of page p: their scales, then the rows
// of high and of low codes, which are nil if they are not there. Drains may have
// low codes that others lack: hi is where that changes, at most the page's end.
func (c *Codes) Values(p, lo int) (hi int, scales, high, low []byte) {
	first, n, row := p*tiers.PageTokens, c.PageTokens(p), compress.ValueRowBytes(c.D)
	hi = first + n
	if c.planes[tiers.PlaneV8] == nil && c.IsDrain(lo/tiers.LeafTokens) {
		hi = c.Info.Body + c.Drains()
	}
	page := c.planes[tiers.PlaneV4][first*(compress.ValueScaleBytes+row):]
	return hi, page[(lo-first)*compress.ValueScaleBytes : (hi-first)*compress.ValueScaleBytes],
		page[n*compress.ValueScaleBytes+(lo-first)*row : n*compress.ValueScaleBytes+(hi-first)*row], c.low(lo, hi)
}

// Value returns the scale and the codes of the value at place t; low is nil if it is not there.
func (c *Codes) Value(t int) (scale, high, low []byte) {
	v4 := c.planes[tiers.PlaneV4]
	s, h := c.ValueRanges(t)
	return v4[s.Off : s.Off+s.Len], v4[h.Off : h.Off+h.Len], c.low(t, t+1)
}

// low returns the low codes of the values of places [lo, hi), which are all drains
// or none; nil if they are not there.
func (c *Codes) low(lo, hi int) []byte {
	if b, row := c.planes[tiers.PlaneV8], compress.ValueRowBytes(c.D); b != nil {
		return b[lo*row : hi*row]
	} else if b := c.planes[tiers.PlaneDrains]; b != nil && c.IsDrain(lo/tiers.LeafTokens) {
		from, to := c.DrainValue(lo), c.DrainValue(hi-1)
		return b[from.Off : to.Off+to.Len]
	}
	return nil
}
