package server

import (
	"context"
	"encoding/binary"
	"math"
	"strings"
	"time"

	"kvtier/compress"
	kvtierv1 "kvtier/proto/kvtier/v1"
)

// The fast path's numbers; docs/protocol.md specifies every byte.
const (
	frameMagic   = 0x31465654
	frameVersion = 5
	frameHeader  = 24
	maxBody      = 256 << 20

	opHello        = 1
	opRegion       = 2
	opUnregion     = 3
	opOpen         = 4
	opAppend       = 5
	opAttend       = 6
	opDeviceRegion = 7
	opReply        = 0x80

	ackBytes    = 32
	appendHead  = 56
	attendHead  = 64
	itemBytes   = 24
	resultBytes = 192

	flagConvert = 1
	flagSparse  = 2

	flagRows    = 1
	flagPartial = 2
	flagIDs     = 4

	flagMissed = 1 // in a result

	// fastTimeout bounds a request that names no deadline.
	fastTimeout = 30 * time.Second
)

// frame is a request's header.
type frame struct {
	op     byte
	id     uint32
	length int
}

func badFrame(format string, a ...any) error { return invalid(ReasonFrame, format, a...) }

// parseFrame reads a header. op and id are set even if it fails, for the reply.
func parseFrame(b []byte) (f frame, err error) {
	f.op, f.id = b[5], binary.LittleEndian.Uint32(b[8:])
	n := binary.LittleEndian.Uint64(b[16:])
	switch {
	case binary.LittleEndian.Uint32(b) != frameMagic:
		return f, badFrame("magic %#x, not %#x", binary.LittleEndian.Uint32(b), uint32(frameMagic))
	case b[4] != frameVersion:
		return f, badFrame("version %d of the fast path: this daemon speaks %d", b[4], frameVersion)
	case b[6] != 0 || b[7] != 0 || binary.LittleEndian.Uint32(b[12:]) != 0:
		return f, badFrame("a field that must be 0 is not")
	case n > maxBody:
		return f, badFrame("a body of %d bytes: at most %d; split the request", n, maxBody)
	}
	f.length = int(n)
	return f, nil
}

// source is what the parsers need to know of a connection.
type source interface {
	// byHandle finds a sequence: sizes depend on its model.
	byHandle(handle uint64) (*sequence, error)
	// input copies size bytes out of a region.
	input(region uint32, offset, size uint64) ([]byte, error)
	// output returns room for results that belong at offset of a region, and what brings them there, if anything does.
	output(region uint32, offset, size uint64) (room []byte, bring func(context.Context) error, err error)
}

// cut takes tensors off data whose size was checked.
type cut struct{ b []byte }

func (c *cut) take(n int) []byte {
	b := c.b[:n:n]
	c.b = c.b[n:]
	return b
}

func (c *cut) ids(n int) []uint64 {
	b := c.take(8 * n)
	ids := make([]uint64, n)
	for i := range ids {
		ids[i] = binary.LittleEndian.Uint64(b[8*i:])
	}
	return ids
}

// tensors returns the data of a request, want bytes, from a region, where the
// worker says that it put size, or inline.
func tensors(src source, region uint32, offset uint64, size uint32, want uint64, inline []byte) (cut, error) {
	if region == 0 {
		if offset != 0 || size != 0 {
			return cut{}, badFrame("inline data with an offset of %d in a region and %d bytes there", offset, size)
		}
		if want != uint64(len(inline)) {
			return cut{}, invalid(ReasonShape, "%d bytes of data follow, but the request's shapes need %d", len(inline), want)
		}
		return cut{inline}, nil
	}
	if len(inline) != 0 {
		return cut{}, badFrame("%d bytes follow a request whose data are in region %d", len(inline), region)
	}
	b, err := src.input(region, offset, uint64(size))
	if err == nil && uint64(size) != want { // what else lies in the region is of other requests
		err = invalid(ReasonShape, "%d bytes of data in the region, but the request's shapes need %d", size, want)
	}
	return cut{b}, err
}

func elementType(b byte) (compress.ElementType, error) {
	t := compress.ElementType(b)
	if t.Size() == 0 {
		return 0, invalid(ReasonArgument, "dtype %d is unknown: 1 f32, 2 bf16, 3 f16", b)
	}
	return t, nil
}

// parseAppend reads an APPEND's body. The request's bytes lie in body, or in
// what src.input returned.
func parseAppend(body []byte, src source) (*sequence, *appendRequest, error) {
	if len(body) < appendHead {
		return nil, nil, badFrame("an APPEND of %d bytes: its fixed part has %d", len(body), appendHead)
	}
	le := binary.LittleEndian
	flags := body[25]
	if flags&^(flagConvert|flagSparse) != 0 || body[26] != 0 || body[27] != 0 || le.Uint32(body[52:]) != 0 {
		return nil, nil, badFrame("an APPEND with an unknown flag or a field that must be 0")
	}
	typ, err := elementType(body[24])
	if err != nil {
		return nil, nil, err
	}
	s, err := src.byHandle(le.Uint64(body))
	if err != nil {
		return nil, nil, err
	}
	n, m, ids := uint64(le.Uint32(body[20:])), uint64(le.Uint32(body[28:])), uint64(le.Uint32(body[32:]))
	if ids != 0 && ids != n {
		return nil, nil, invalid(ReasonShape, "%d token ids for %d tokens", ids, n)
	}
	row := uint64(s.spec.kvHeads * s.spec.headDim * typ.Size())
	query := uint64(s.spec.queryHeads * s.spec.headDim * typ.Size())
	// Each factor is under 2^32 and 2^19: no overflow.
	c, err := tensors(src, le.Uint32(body[36:]), le.Uint64(body[40:]), le.Uint32(body[48:]), 2*n*row+m*query+8*ids, body[appendHead:])
	if err != nil {
		return nil, nil, err
	}
	r := &appendRequest{layer: int(le.Uint32(body[16:])), start: le.Uint64(body[8:]), typ: typ,
		convert: flags&flagConvert != 0, sparse: flags&flagSparse != 0}
	r.k, r.v = c.take(int(n*row)), c.take(int(n*row))
	r.queries = c.take(int(m * query))
	if ids > 0 {
		r.ids = c.ids(int(ids))
	}
	return s, r, nil
}

// attendFrame is an ATTEND's body.
type attendFrame struct {
	items   []batchItem
	sizes   []int // bytes of each item's output and lse
	budget  kvtierv1.Budget
	timeout time.Duration
	results []byte                      // of the results' region; nil: inline
	bring   func(context.Context) error // results to their region; nil: they are there
}

// parseAttend reads an ATTEND's body.
func parseAttend(body []byte, src source) (*attendFrame, error) {
	if len(body) < attendHead {
		return nil, badFrame("an ATTEND of %d bytes: its fixed part has %d", len(body), attendHead)
	}
	le := binary.LittleEndian
	count := int(le.Uint16(body[6:]))
	switch {
	case count == 0:
		return nil, invalid(ReasonShape, "an ATTEND needs at least one item")
	case len(body) < attendHead+count*itemBytes:
		return nil, badFrame("an ATTEND of %d bytes: %d items need %d", len(body), count, attendHead+count*itemBytes)
	}
	if le.Uint32(body[60:]) != 0 {
		return nil, badFrame("an ATTEND with a field that must be 0")
	}
	typ, err := elementType(body[4])
	if err != nil {
		return nil, err
	}
	f := &attendFrame{items: make([]batchItem, count), sizes: make([]int, count), timeout: fastTimeout}
	f.budget.Mode = kvtierv1.AttendMode(body[5])
	f.budget.Share = math.Float32frombits(le.Uint32(body[8:]))
	f.budget.TargetError = math.Float32frombits(le.Uint32(body[12:]))
	f.budget.Tokens = le.Uint64(body[16:])
	f.budget.ReadWaitUs = le.Uint32(body[56:])
	if ms := le.Uint32(body[24:]); ms != 0 {
		f.timeout = time.Duration(ms) * time.Millisecond
	}
	heads, inline := body[attendHead:attendHead+count*itemBytes], body[attendHead+count*itemBytes:]
	in, out, err := f.measure(heads, typ, src)
	if err != nil {
		return nil, err
	}
	if region := le.Uint32(body[40:]); region != 0 {
		if f.results, f.bring, err = src.output(region, le.Uint64(body[48:]), out); err != nil {
			return nil, err
		}
	} else if le.Uint64(body[48:]) != 0 {
		return nil, badFrame("inline results with an offset of %d", le.Uint64(body[48:]))
	} else if out+uint64(count)*(resultBytes+maxMessageText) > maxBody {
		return nil, invalid(ReasonShape, "results of %d bytes do not fit a frame: name a region for them, or ask for fewer positions", out)
	}
	c, err := tensors(src, le.Uint32(body[28:]), le.Uint64(body[32:]), le.Uint32(body[44:]), in, inline)
	if err != nil {
		return nil, err
	}
	for i := range f.items {
		f.item(i, heads[i*itemBytes:], int(le.Uint32(body)), typ, &c)
	}
	return f, nil
}

// measure finds the sequences and how many bytes go in and out. A handle that
// is unknown fails the frame: where the next item's data begin depends on it.
func (f *attendFrame) measure(heads []byte, typ compress.ElementType, src source) (in, out uint64, err error) {
	for i := range f.items {
		h := heads[i*itemBytes:]
		s, err := src.byHandle(binary.LittleEndian.Uint64(h))
		if err != nil {
			return 0, 0, err
		}
		f.items[i].seq = s
		n, flags := uint64(binary.LittleEndian.Uint32(h[16:])), binary.LittleEndian.Uint32(h[20:])
		if flags&^(flagRows|flagPartial|flagIDs) != 0 {
			return 0, 0, badFrame("item %d has unknown flags %#x", i, flags)
		}
		q := n * uint64(s.spec.queryHeads*s.spec.headDim)
		size := 4*q + 4*n*uint64(s.spec.queryHeads)
		in += q * uint64(typ.Size())
		if flags&flagRows != 0 {
			in += 2 * n * uint64(s.spec.kvHeads*s.spec.headDim*typ.Size())
		}
		if flags&flagPartial != 0 {
			in += size
		}
		if flags&flagIDs != 0 {
			in += 8 * n
		}
		out += size
		// One item cannot overflow, and no sum goes on past the largest region.
		if in > maxRegion || out > maxRegion {
			return 0, 0, invalid(ReasonShape, "the items' data have more than %d bytes: split the request", maxRegion)
		}
		f.sizes[i] = int(size)
	}
	return in, out, nil
}

// item takes one item's tensors off the data.
func (f *attendFrame) item(i int, h []byte, layer int, typ compress.ElementType, c *cut) {
	sp := f.items[i].seq.spec
	start, n, flags := binary.LittleEndian.Uint64(h[8:]), int(binary.LittleEndian.Uint32(h[16:])), binary.LittleEndian.Uint32(h[20:])
	q := &query{layer: layer, start: start, typ: typ}
	f.items[i].query = q
	q.q = c.take(n * sp.queryHeads * sp.headDim * typ.Size())
	if flags&flagRows != 0 {
		row := sp.kvHeads * sp.headDim * typ.Size()
		q.append = &appendRequest{typ: typ, k: c.take(n * row), v: c.take(n * row)}
	}
	if flags&flagPartial != 0 {
		q.partial = &workerPartial{out: c.take(n * sp.queryHeads * sp.headDim * 4), lse: c.take(n * sp.queryHeads * 4)}
	}
	if flags&flagIDs != 0 {
		ids := c.ids(n)
		if q.append != nil {
			q.append.ids = ids
		}
	}
}

// maxMessageText bounds an error's text in a reply.
const maxMessageText = 1024

func errorText(e *Error) string {
	t := e.Error()
	if len(t) > maxMessageText {
		t = strings.ToValidUTF8(t[:maxMessageText], "")
	}
	return t
}

// putHeader writes a reply's header over the first bytes of b.
func putHeader(b []byte, f frame, status uint32) {
	le := binary.LittleEndian
	le.PutUint32(b, frameMagic)
	b[4], b[5], b[6], b[7] = frameVersion, f.op|opReply, 0, 0
	le.PutUint32(b[8:], f.id)
	le.PutUint32(b[12:], status)
	le.PutUint64(b[16:], uint64(len(b)-frameHeader))
}

func putAck(b []byte, a *kvtierv1.Ack) []byte {
	for _, x := range [...]uint64{a.GetAccepted(), a.GetCrashSafe(), a.GetPowerSafe(), a.GetSealed()} {
		b = binary.LittleEndian.AppendUint64(b, x)
	}
	return b
}

// putResult writes one item's fixed part.
func putResult(b []byte, it *batchItem, e *Error) []byte {
	le := binary.LittleEndian
	if e != nil {
		b = le.AppendUint32(b, uint32(e.Code))
		b = le.AppendUint32(b, uint32(len(errorText(e))))
		return append(b, make([]byte, resultBytes-8)...)
	}
	a := it.answer.account
	b = le.AppendUint64(b, 0)
	b = putAck(b, it.answer.ack)
	for _, x := range [...]uint64{a.TokensExact, a.TokensScanned, a.TokensRead, a.TokensEstimated,
		a.BytesRam, a.BytesNvme, a.BytesFull, a.BytesExactZone} {
		b = le.AppendUint64(b, x)
	}
	b = le.AppendUint32(b, math.Float32bits(a.EstimatedError))
	b = le.AppendUint32(b, math.Float32bits(a.CodecError))
	for _, x := range [...]uint64{a.NsScore, a.NsScan, a.NsFetch, a.NsExactZone, a.NsTotal} {
		b = le.AppendUint64(b, x)
	}
	b = le.AppendUint32(b, uint32(a.Mode))
	var flags uint32
	if a.TargetMissed {
		flags |= flagMissed
	}
	b = le.AppendUint32(b, flags)
	b = le.AppendUint32(b, math.Float32bits(a.ErrorP95))
	b = le.AppendUint32(b, a.CalibrationAudits)
	for _, x := range [...]uint64{a.BytesGpu, a.TokensLate, a.BytesLate} {
		b = le.AppendUint64(b, x)
	}
	return b
}

// putFloats writes an answer's output and lse to dst, which has room.
func putFloats(dst []byte, a *answer) {
	compress.FromFloat32(dst, a.out, compress.F32)
	compress.FromFloat32(dst[4*len(a.out):], a.lse, compress.F32)
}
