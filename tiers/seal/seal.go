// Package seal turns the rows of a span into a sealed segment, and finds the
// parts of a segment's planes again.
//
// Sealing is where a segment's order, means and codes are made, once;
// every tier then holds the same bytes. docs/format.md specifies them.
package seal

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"sync"

	"kvtier/attention"
	"kvtier/compress"
	"kvtier/tiers"
)

// Rows are consecutive tokens of one layer, all KV heads, as they were appended.
type Rows struct {
	Layer   int
	Start   uint64 // position of the first token
	Heads   int    // KV heads
	HeadDim int
	Type    compress.ElementType
	K, V    []byte // [tokens][Heads][HeadDim] elements of Type
}

// Tokens returns the number of tokens.
func (r *Rows) Tokens() int { return len(r.K) / (r.Heads * r.HeadDim * r.Type.Size()) }

// Options of sealing one segment.
type Options struct {
	Profile tiers.Profile
	// Sinks is how many tokens at the front stay unquantised (the sequence's first ones).
	Sinks int
	// Metrics holds one metric a KV head.
	Metrics []*attention.Metric
	// Queries, scaled, [rows][HeadDim] a KV head, on which the codec's error is measured; may be empty.
	Queries [][]float32
	// Low keeps bits 5 to 8 of a balanced segment, to be dropped later.
	Low bool
}

// Segment seals rows: 1 to tiers.SegmentTokens tokens, more than Sinks.
func Segment(r *Rows, o Options) (*tiers.Header, [tiers.NumParts][]byte) {
	return sealWith(r, o, func(s *sealer, head int) { s.head(head) })
}

func sealWith(r *Rows, o Options, seal func(s *sealer, head int)) (*tiers.Header, [tiers.NumParts][]byte) {
	h := tiers.Header{Profile: o.Profile, Type: uint8(r.Type), HeadDim: r.HeadDim, Layer: r.Layer,
		Start: r.Start, Tokens: r.Tokens(), Heads: make([]tiers.HeadInfo, r.Heads)}
	pieces := make([][tiers.NumPlanes][]byte, r.Heads)
	for i := range r.Heads {
		seal(&sealer{rows: r, opt: &o, info: &h.Heads[i], planes: &pieces[i]}, i)
	}
	return tiers.NewHeader(h, pieces)
}

// Made is what a device made of a KV head's rows: all but what is small, is lossless, or is copied.
type Made struct {
	Body, KeyExp int
	// Planes are the order, steps, keys, values, drains and pages; of the low planes those that the options keep.
	Planes [tiers.NumPlanes][]byte
	// KeysByKeys and KeysByValues [d][d] are what the map of values is fitted to: attention.FitProducts.
	KeysByKeys, KeysByValues []float64
	// Exact and Coded are the attention of the options' queries over the rows, and over what is read without the low planes.
	Exact, Coded []attention.Partial
}

// Assemble makes the segment of heads that a device made: the same as Segment, to the last byte.
func Assemble(r *Rows, o Options, heads []Made) (*tiers.Header, [tiers.NumParts][]byte) {
	return sealWith(r, o, func(s *sealer, head int) {
		m := &heads[head]
		*s.planes = m.Planes
		s.kept(head)
		*s.info = tiers.HeadInfo{Body: m.Body, Outliers: r.Tokens() - o.Sinks - m.Body, Sinks: o.Sinks, KeyExp: m.KeyExp, QueryNorm2: o.Metrics[head].Norm2}
		s.planes[tiers.PlaneMap] = attention.FitProducts(m.KeysByKeys, m.KeysByValues, r.HeadDim).Append(nil)
		s.info.CodecError = meanError(m.Exact, m.Coded)
	})
}

// KeepsLow says whether the low planes are stored.
func (o *Options) KeepsLow() bool { return o.Low || o.Profile == tiers.ProfileNeutral }

// Seed is that of a head's order.
func (r *Rows) Seed(head int) uint64 { return r.Start<<16 | uint64(r.Layer)<<8 | uint64(head) }

// Window seals the last rows of a sliding-window layer: they stay unquantised.
func Window(r *Rows, profile tiers.Profile, spanStart uint64, spanTokens int) (*tiers.Header, [tiers.NumParts][]byte) {
	h := tiers.Header{Profile: profile, Type: uint8(r.Type), HeadDim: r.HeadDim, Layer: r.Layer,
		Start: spanStart, Tokens: spanTokens, Heads: make([]tiers.HeadInfo, r.Heads)}
	pieces := make([][tiers.NumPlanes][]byte, r.Heads)
	for i := range r.Heads {
		pieces[i][tiers.PlaneWindow] = r.appendHead(r.appendHead(nil, r.K, i), r.V, i)
	}
	return tiers.NewHeader(h, pieces)
}

// appendHead appends one head's elements of all tokens.
func (r *Rows) appendHead(dst, b []byte, head int) []byte {
	row := r.HeadDim * r.Type.Size()
	dst = slices.Grow(dst, r.Tokens()*row)
	for at := head * row; at < len(b); at += r.Heads * row {
		dst = append(dst, b[at:at+row]...)
	}
	return dst
}

// buffers hold a head's rows while it is sealed: as they came, as floats, and in the order in which they are stored; and keys by
// importance of their channels, and their codes.
type buffers struct {
	kb, vb             []byte
	k, v, keys, values []float32
	byImportance       []float32
	codes              []uint8
}

var bufferPool = sync.Pool{New: func() any { return new(buffers) }}

// sealer makes the planes of one head.
type sealer struct {
	rows   *Rows
	opt    *Options
	info   *tiers.HeadInfo
	planes *[tiers.NumPlanes][]byte
}

// kept makes the planes of what stays as it came: sinks and, in the profile exact, all other rows, lossless.
func (s *sealer) kept(head int) {
	if s.opt.Sinks == 0 && s.opt.Profile != tiers.ProfileExact {
		return
	}
	buf := bufferPool.Get().(*buffers)
	defer bufferPool.Put(buf)
	s.keep(s.split(buf, head))
}

// split copies a head's elements to buf, and returns where the sinks end.
func (s *sealer) split(buf *buffers, head int) (kb, vb []byte, cut int) {
	r := s.rows
	buf.kb, buf.vb = r.appendHead(buf.kb[:0], r.K, head), r.appendHead(buf.vb[:0], r.V, head)
	return buf.kb, buf.vb, s.opt.Sinks * r.HeadDim * r.Type.Size()
}

func (s *sealer) keep(kb, vb []byte, cut int) {
	r := s.rows
	if cut > 0 {
		s.planes[tiers.PlaneSinks] = append(append([]byte(nil), kb[:cut]...), vb[:cut]...)
	}
	if s.opt.Profile == tiers.ProfileExact {
		n := r.Tokens() - s.opt.Sinks
		s.planes[tiers.PlaneKX] = compress.PackExact(kb[cut:], n, r.HeadDim, r.Type)
		s.planes[tiers.PlaneVX] = compress.PackExact(vb[cut:], n, r.HeadDim, r.Type)
	}
}

func (s *sealer) head(head int) {
	r, d, n := s.rows, s.rows.HeadDim, s.rows.Tokens()-s.opt.Sinks
	buf := bufferPool.Get().(*buffers)
	defer bufferPool.Put(buf)
	kb, vb, cut := s.split(buf, head)
	s.keep(kb, vb, cut)
	kb, vb = kb[cut:], vb[cut:]
	buf.k, buf.v = slices.Grow(buf.k[:0], n*d)[:n*d], slices.Grow(buf.v[:0], n*d)[:n*d]
	compress.ToFloat32(buf.k, kb, r.Type)
	compress.ToFloat32(buf.v, vb, r.Type)
	m := s.opt.Metrics[head]
	order := attention.Arrange(buf.k, buf.v, d, m, r.Seed(head))
	buf.keys, buf.values = gather(buf.keys[:0], buf.k, order.Tokens, d), gather(buf.values[:0], buf.v, order.Tokens, d)
	k, v := buf.keys, buf.values
	*s.info = tiers.HeadInfo{Body: order.Body, Outliers: n - order.Body, Sinks: s.opt.Sinks,
		KeyExp: compress.KeyExp(k), QueryNorm2: m.Norm2}
	s.planes[tiers.PlaneOrder] = packOrder(order.Tokens, s.opt.Sinks)
	s.keys(k, m, buf)
	s.values(v)
	s.drains()
	if !s.opt.KeepsLow() {
		s.planes[tiers.PlaneK8], s.planes[tiers.PlaneV8] = nil, nil
	}
	compress.Rotate(v, d)
	s.means(buf, m)
	if len(s.opt.Queries) > 0 {
		s.info.CodecError = codecError(k, v, s.opt.Queries[head], s.planes, *s.info, d)
	}
}

// gather appends the rows of x [..][d] that tokens names to dst.
func gather(dst, x []float32, tokens []int, d int) []float32 {
	dst = slices.Grow(dst, len(tokens)*d)
	for _, t := range tokens {
		dst = append(dst, x[t*d:(t+1)*d]...)
	}
	return dst
}

// packOrder writes each stored token's position as an offset from the segment's start.
func packOrder(tokens []int, sinks int) []byte {
	b := make([]byte, 0, 2*len(tokens))
	for _, t := range tokens {
		b = binary.LittleEndian.AppendUint16(b, uint16(t+sinks))
	}
	return b
}

// keys writes the order of the keys' bits, the steps of each group, and the planes.
func (s *sealer) keys(k []float32, m *attention.Metric, buf *buffers) {
	d := s.rows.HeadDim
	v := View{D: d, Info: *s.info}
	square := make([]float32, d)
	for j := range square {
		square[j] = m.Square(j)
	}
	order := compress.FitKeyOrder(v.importance(k, square), square, s.info.KeyExp)
	rows, codes := slices.Grow(buf.byImportance[:0], len(k))[:len(k)], slices.Grow(buf.codes[:0], len(k))[:len(k)]
	buf.byImportance, buf.codes = rows, codes
	order.Permute(rows, k)
	steps := order.Append(nil)
	var feedback compress.KeyFeedback
	if s.opt.KeepsLow() { // of fewer bits it brings nothing
		feedback = compress.FitKeyFeedback(m.C, order, s.info.KeyExp)
	}
	for g := range v.StepGroups() {
		lo, hi := v.GroupPlaces(g)
		st := compress.FitKeySteps(rows[lo*d:hi*d], d, s.info.KeyExp)
		steps = st.Append(steps, s.info.KeyExp)
		compress.KeyCodes(codes[lo*d:hi*d], rows[lo*d:hi*d], d, st, feedback)
	}
	s.planes[tiers.PlaneSteps] = steps
	for i, b := range compress.PackKeyPlanes(codes, len(k)/d, d, order.Lines) {
		s.planes[tiers.KeyPlanes[i]] = b
	}
}

// importance returns, by channel, the mean square of what the channel adds to a
// unit query's score beyond the mean of the tokens with which it shares steps. square [d] is the mean square of a unit query.
func (v View) importance(k, square []float32) []float32 {
	d := v.D
	out := make([]float32, d)
	for g := range v.StepGroups() {
		lo, hi := v.GroupPlaces(g)
		rows := k[lo*d : hi*d]
		for mean := attention.Mean(rows, d); len(rows) > 0; rows = rows[d:] {
			for j, x := range rows[:d] {
				delta := x - mean[j]
				out[j] += delta * delta
			}
		}
	}
	for j := range out {
		out[j] *= square[j] / float32(v.Stored())
	}
	return out
}

// values writes pages of [tokens][3] scales and then [tokens][d/2] high codes,
// so that a token costs two cache lines or three; and rows of low codes.
func (s *sealer) values(v []float32) {
	d := s.rows.HeadDim
	n := len(v) / d
	scales, hi, lo := compress.PackValues(v, n, d)
	row := compress.ValueRowBytes(d)
	b := make([]byte, 0, len(scales)+len(hi))
	for p := 0; p < n; p += tiers.PageTokens {
		e := min(p+tiers.PageTokens, n)
		b = append(b, scales[p*compress.ValueScaleBytes:e*compress.ValueScaleBytes]...)
		b = append(b, hi[p*row:e*row]...)
	}
	s.planes[tiers.PlaneV4], s.planes[tiers.PlaneV8] = b, lo
}

// drains copies the drains' last bits to a plane of their own, which all profiles have.
func (s *sealer) drains() {
	v := View{D: s.rows.HeadDim, Info: *s.info}
	if v.Drains() == 0 {
		return
	}
	k := v.LeafKeys(len(tiers.KeyPlanes)-1, v.drainLeaf())
	row := compress.ValueRowBytes(v.D)
	b := append([]byte(nil), s.planes[tiers.PlaneK8][k.Off:k.Off+k.Len]...)
	s.planes[tiers.PlaneDrains] = append(b, s.planes[tiers.PlaneV8][v.Info.Body*row:][:v.Drains()*row]...)
}

// means writes how values follow keys, and the pages' mean keys and mean
// values. Values are rotated. Keys deviate from their mean as it is read. Nobody needs the rows in their own order any more.
func (s *sealer) means(buf *buffers, m *attention.Metric) {
	d, k, v := s.rows.HeadDim, buf.keys, buf.values
	body := s.info.Body * d
	keys := attention.NewUnits(buf.k, k, d, tiers.PageTokens)
	stored := compress.AppendMeanKeys(nil, keys.Means, d, s.info.KeyExp)
	keys.Deviate(k, readMeanKeys(stored, len(keys.Means)/d, d, s.info.KeyExp))
	values := attention.NewUnits(buf.v, v, d, tiers.PageTokens)
	s.planes[tiers.PlaneMap] = attention.FitValueMap(keys.Deltas[:body], values.Deltas[:body], d).Append(nil)
	b := values.Append(nil, func(deltas []float32) []float32 { return attention.Norms2(deltas, d) })
	meta, rows := b[:len(b)-len(values.Means)], b[len(b)-len(values.Means):]
	s.planes[tiers.PlanePages] = keys.AppendSpreads(slices.Concat(rows, stored, meta), m.Spreads)
}

// readMeanKeys returns what n stored mean keys are read as, [n][d]. They were written by this package.
func readMeanKeys(b []byte, n, d, exp int) []float32 {
	var m compress.MeanKeys
	rows := make([]float32, compress.MeanKeyPlaces(n)*d)
	err := m.Parse(b, n, d, exp)
	if err == nil {
		err = m.Rows(rows)
	}
	if err != nil {
		panic(err)
	}
	return rows[:n*d]
}

// codecError is the mean relative error of attention over the balanced codes of
// the stored tokens alone, against the same attention over the rows; v is rotated.
func codecError(k, v, queries []float32, planes *[tiers.NumPlanes][]byte, info tiers.HeadInfo, d int) float32 {
	rows := len(queries) / d
	if rows == 0 {
		return 0
	}
	view := View{D: d, Info: info}
	exact, coded := attention.NewPartials(rows, d), attention.NewPartials(rows, d)
	attention.AttendInOrder(exact, queries, k, v, d)
	kc, vc := make([]float32, len(k)), make([]float32, len(v))
	balanced := WithoutLow(func(p tiers.Plane) []byte { return planes[p] })
	if view.Keys(kc, balanced) != nil {
		return 1
	}
	view.Values(vc, balanced)
	attention.AttendInOrder(coded, queries, kc, vc, d)
	return meanError(exact, coded)
}

// meanError is the mean relative error of outputs that are not zero.
func meanError(exact, coded []attention.Partial) float32 {
	if len(exact) == 0 {
		return 0
	}
	var sum, seen float32
	d := len(exact[0].Out)
	a, b := make([]float32, d), make([]float32, d)
	for i := range exact {
		exact[i].Output(a)
		coded[i].Output(b)
		if attention.Dot(a, a) > 0 { // no error is relative to nothing
			sum += attention.RelativeError(b, a)
			seen++
		}
	}
	return sum / max(seen, 1)
}

// Check says whether the pieces' sizes are those that the header's counts
// demand, so that views never index outside them. The error is tiers.ErrCorrupt.
func Check(h *tiers.Header) error {
	t := compress.ElementType(h.Type)
	if t.Size() == 0 || h.HeadDim < 16 || h.HeadDim > compress.MaxHeadDim || h.HeadDim%16 != 0 {
		return fmt.Errorf("segment %v: element type %d, head dimension %d: %w", h.ID, h.Type, h.HeadDim, tiers.ErrCorrupt)
	}
	_, _, window := h.Piece(0, tiers.PlaneWindow)
	check := checkHead
	if window {
		check = checkWindow
	}
	for i := range h.Heads {
		if err := check(h, i, t); err != nil {
			return fmt.Errorf("segment %v: head %d: %w: %w", h.ID, i, err, tiers.ErrCorrupt)
		}
	}
	return nil
}

// checkWindow checks a head of a window segment: nothing but rows, as many as
// its first head has.
func checkWindow(h *tiers.Header, head int, t compress.ElementType) error {
	if h.Heads[head] != (tiers.HeadInfo{}) {
		return errors.New("a window beside other tokens")
	}
	_, first, _ := h.Piece(0, tiers.PlaneWindow)
	for p := range tiers.NumPlanes {
		_, n, ok := h.Piece(head, p)
		if ok != (p == tiers.PlaneWindow) || ok && (n != first || n%(2*h.HeadDim*t.Size()) != 0) {
			return fmt.Errorf("plane %v of a window has %d bytes", p, n)
		}
	}
	return nil
}

func checkHead(h *tiers.Header, head int, t compress.ElementType) error {
	v := View{D: h.HeadDim, Info: h.Heads[head]}
	if i := v.Info; i.Body+i.Outliers+i.Sinks != h.Tokens || i.Body == 0 {
		return fmt.Errorf("%d + %d + %d tokens of %d", i.Body, i.Outliers, i.Sinks, h.Tokens)
	} else if i.Outliers > 0 && i.Body%tiers.PageTokens != 0 {
		return fmt.Errorf("%d tokens before the outliers are no whole pages", i.Body)
	} else if !(i.QueryNorm2 >= 0) || !(i.CodecError >= 0) {
		return errors.New("a figure that is no number")
	}
	for p := range tiers.NumPlanes {
		least, most := v.size(p, t, h.Profile)
		// A low plane is whole or absent; most of an exact plane's size is the rows'.
		_, n, _ := h.Piece(head, p)
		if n < least || n > most || tiers.LowPlanes.Has(p) && n > 0 && n < most {
			return fmt.Errorf("plane %v has %d bytes, not %d to %d", p, n, least, most)
		}
	}
	return nil
}
