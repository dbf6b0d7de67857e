//go:build linux

package server

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"math"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"

	"kvtier/compress"
	kvtierv1 "kvtier/proto/kvtier/v1"
)

// fastClient speaks the fast path as docs/protocol.md has it; it shares no
// code with the server.
type fastClient struct {
	t       testing.TB
	conn    *net.UnixConn
	id      uint32
	handles map[string]uint64
	in, out *testRegion // nil: inline
	outAt   uint64      // where out begins in its region
	push    func()      // brings what was placed in to where the region is; or nil
	pull    func()      // brings out from there; or nil
	buf     []byte
}

type testRegion struct {
	id uint32
	fd int
	b  []byte
}

const sealsOfRegion = unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_SEAL

func memfd(t testing.TB, size int64, seals int) int {
	t.Helper()
	fd, err := unix.MemfdCreate("kvtier-test", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Close(fd) })
	if err := unix.Ftruncate(fd, size); err != nil {
		t.Fatal(err)
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, seals); err != nil {
		t.Fatal(err)
	}
	return fd
}

func dialFast(t testing.TB, socket string) *fastClient {
	t.Helper()
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return &fastClient{t: t, conn: conn, handles: map[string]uint64{}}
}

// withRegions makes the client exchange tensors through shared memory.
func (c *fastClient) withRegions(size int) *fastClient {
	c.t.Helper()
	region := func(id uint32) *testRegion {
		fd := memfd(c.t, int64(size), sealsOfRegion)
		b, err := unix.Mmap(fd, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		if err != nil {
			c.t.Fatal(err)
		}
		c.t.Cleanup(func() { _ = unix.Munmap(b) })
		if _, err := c.call(2, regionBody(id, uint64(size)), fd); err != nil {
			c.t.Fatal(err)
		}
		return &testRegion{id, fd, b}
	}
	c.in, c.out = region(7), region(8)
	return c
}

func regionBody(id uint32, size uint64) []byte {
	b := binary.LittleEndian.AppendUint32(nil, id)
	return binary.LittleEndian.AppendUint64(b, size)
}

// header makes a request's header.
func header(op byte, id uint32, length uint64) []byte {
	b := []byte{'T', 'V', 'F', '1', frameVersion, op, 0, 0}
	b = binary.LittleEndian.AppendUint32(b, id)
	b = binary.LittleEndian.AppendUint32(b, 0)
	return binary.LittleEndian.AppendUint64(b, length)
}

func (c *fastClient) send(op byte, body []byte, fds ...int) error {
	c.id++
	b := append(header(op, c.id, uint64(len(body))), body...)
	if len(fds) == 0 {
		_, err := c.conn.Write(b)
		return err
	}
	_, _, err := c.conn.WriteMsgUnix(b, unix.UnixRights(fds...), nil)
	return err
}

// receive reads the reply to request id. The body is valid until the next call.
func (c *fastClient) receive(op byte, id uint32) ([]byte, error) {
	if len(c.buf) == 0 {
		c.buf = make([]byte, 64<<10)
	}
	n, err := io.ReadAtLeast(c.conn, c.buf, 24)
	if err != nil {
		return nil, err
	}
	h := c.buf[:24]
	status, length := binary.LittleEndian.Uint32(h[12:]), int(binary.LittleEndian.Uint64(h[16:]))
	if string(h[:4]) != "TVF1" || h[4] != frameVersion || h[5] != op|0x80 || h[6] != 0 || h[7] != 0 || binary.LittleEndian.Uint32(h[8:]) != id {
		return nil, fmt.Errorf("header % x is no reply to request %d, op %d", h, id, op)
	}
	if length > len(c.buf)-24 {
		c.buf = append(c.buf[:n:n], make([]byte, 24+length-n)...)
	}
	if n > 24+length {
		return nil, fmt.Errorf("%d bytes behind the reply", n-24-length)
	}
	if _, err := io.ReadFull(c.conn, c.buf[n:24+length]); err != nil {
		return nil, err
	}
	body := c.buf[24 : 24+length]
	if status != 0 {
		return nil, textError(status, string(body))
	}
	return body, nil
}

func textError(code uint32, text string) error {
	reason, message, _ := strings.Cut(text, ": ")
	return &Error{Code: codes.Code(code), Reason: reason, Message: message}
}

func (c *fastClient) call(op byte, body []byte, fds ...int) ([]byte, error) {
	if err := c.send(op, body, fds...); err != nil {
		return nil, err
	}
	return c.receive(op, c.id)
}

func readAck(b []byte) *kvtierv1.Ack {
	le := binary.LittleEndian
	return &kvtierv1.Ack{Accepted: le.Uint64(b), CrashSafe: le.Uint64(b[8:]), PowerSafe: le.Uint64(b[16:]), Sealed: le.Uint64(b[24:])}
}

func (c *fastClient) open(_ context.Context, id string) (*kvtierv1.Ack, error) {
	b, err := c.call(4, []byte(id))
	if err != nil {
		return nil, err
	}
	if len(b) != 40 {
		return nil, fmt.Errorf("OPEN's reply has %d bytes", len(b))
	}
	c.handles[id] = binary.LittleEndian.Uint64(b)
	return readAck(b[8:]), nil
}

// handle opens a sequence once. One that is unknown gets a handle that is, too.
func (c *fastClient) handle(ctx context.Context, id string) uint64 {
	if h, ok := c.handles[id]; ok {
		return h
	}
	if _, err := c.open(ctx, id); err != nil {
		return 1 << 60
	}
	return c.handles[id]
}

// place puts data into the region, at an offset, or returns them for inline.
func (c *fastClient) place(data []byte) (region uint32, offset uint64, size uint32, inline []byte) {
	if c.in == nil {
		return 0, 0, 0, data
	}
	copy(c.in.b[128:], data)
	if c.push != nil {
		c.push()
	}
	return c.in.id, 128, uint32(len(data)), nil
}

func appendBody(handle, start uint64, layer, n uint32, typ, flags byte, m, ids, region uint32, offset uint64, size uint32, inline []byte) []byte {
	le := binary.LittleEndian
	b := le.AppendUint64(nil, handle)
	b = le.AppendUint64(b, start)
	b = le.AppendUint32(b, layer)
	b = le.AppendUint32(b, n)
	b = append(b, typ, flags, 0, 0)
	b = le.AppendUint32(b, m)
	b = le.AppendUint32(b, ids)
	b = le.AppendUint32(b, region)
	b = le.AppendUint64(b[:40], offset)
	b = le.AppendUint32(b, size)
	b = le.AppendUint32(b, 0)
	return append(b, inline...)
}

func idBytes(ids []uint64) (b []byte) {
	for _, id := range ids {
		b = binary.LittleEndian.AppendUint64(b, id)
	}
	return b
}

func (c *fastClient) append(ctx context.Context, spec *kvtierv1.ModelSpec, r *kvtierv1.AppendRequest) (*kvtierv1.Ack, error) {
	row := int(spec.KvHeads*spec.HeadDim) * compress.ElementType(r.Dtype).Size()
	query := int(spec.QueryHeads*spec.HeadDim) * compress.ElementType(r.Dtype).Size()
	region, offset, size, inline := c.place(slices.Concat(r.K, r.V, r.Queries, idBytes(r.TokenIds)))
	var flags byte
	if r.Convert {
		flags |= 1
	}
	if r.SparseProvenance {
		flags |= 2
	}
	b, err := c.call(5, appendBody(c.handle(ctx, r.SequenceId), r.Start, r.Layer, uint32(len(r.K)/row), byte(r.Dtype), flags,
		uint32(len(r.Queries)/query), uint32(len(r.TokenIds)), region, offset, size, inline))
	if err != nil {
		return nil, err
	}
	if len(b) != 32 {
		return nil, fmt.Errorf("APPEND's reply has %d bytes", len(b))
	}
	return readAck(b), nil
}

// attendBody makes an ATTEND's body and says how many bytes come back.
func (c *fastClient) attendBody(ctx context.Context, spec *kvtierv1.ModelSpec, r *kvtierv1.AttendRequest) []byte {
	le := binary.LittleEndian
	typ := max(1, r.Dtype)
	row := int(spec.QueryHeads*spec.HeadDim) * compress.ElementType(typ).Size()
	var items, data []byte
	for _, it := range r.Items {
		var flags uint32
		data = append(data, it.Q...)
		if len(it.K) > 0 {
			flags |= 1
			data = append(append(data, it.K...), it.V...)
		}
		if len(it.PartialOutput) > 0 {
			flags |= 2
			data = append(append(data, it.PartialOutput...), it.PartialLse...)
		}
		if len(it.TokenIds) > 0 {
			flags |= 4
			data = append(data, idBytes(it.TokenIds)...)
		}
		items = le.AppendUint64(items, c.handle(ctx, it.SequenceId))
		items = le.AppendUint64(items, it.Start)
		items = le.AppendUint32(items, uint32(len(it.Q)/row))
		items = le.AppendUint32(items, flags)
	}
	region, offset, size, inline := c.place(data)
	var timeout uint32
	if deadline, ok := ctx.Deadline(); ok {
		timeout = uint32(max(1, time.Until(deadline).Milliseconds()))
	}
	b := le.AppendUint32(nil, r.Layer)
	b = append(b, byte(typ), byte(r.Budget.GetMode()))
	b = le.AppendUint16(b, uint16(len(r.Items)))
	b = le.AppendUint32(b, math.Float32bits(r.Budget.GetShare()))
	b = le.AppendUint32(b, math.Float32bits(r.Budget.GetTargetError()))
	b = le.AppendUint64(b, r.Budget.GetTokens())
	b = le.AppendUint32(b, timeout)
	b = le.AppendUint32(b, region)
	b = le.AppendUint64(b, offset)
	if c.out != nil {
		b = le.AppendUint32(b, c.out.id)
		b = le.AppendUint32(b, size)
		b = le.AppendUint64(b, c.outAt+64)
	} else {
		b = le.AppendUint32(b, 0)
		b = le.AppendUint32(b, size)
		b = le.AppendUint64(b, 0)
	}
	b = le.AppendUint32(b, r.Budget.GetReadWaitUs())
	b = le.AppendUint32(b, 0)
	return append(append(b, items...), inline...)
}

func (c *fastClient) attend(ctx context.Context, spec *kvtierv1.ModelSpec, r *kvtierv1.AttendRequest) (*kvtierv1.AttendResponse, error) {
	b, err := c.call(6, c.attendBody(ctx, spec, r))
	if err != nil {
		return nil, err
	}
	return c.results(b, spec, r)
}

func (c *fastClient) results(b []byte, spec *kvtierv1.ModelSpec, r *kvtierv1.AttendRequest) (*kvtierv1.AttendResponse, error) {
	le := binary.LittleEndian
	count := len(r.Items)
	if len(b) < 8+resultBytes*count || int(le.Uint32(b)) != count || le.Uint32(b[4:]) != 0 {
		return nil, fmt.Errorf("ATTEND's reply has %d bytes, %x", len(b), b[:8])
	}
	records, text := b[8:8+resultBytes*count], b[8+resultBytes*count:]
	out := &kvtierv1.AttendResponse{}
	for i := range count {
		h := records[resultBytes*i:]
		u64 := func(at int) uint64 { return le.Uint64(h[at:]) }
		n := le.Uint32(h[4:])
		out.Results = append(out.Results, &kvtierv1.AttendResult{ErrorCode: le.Uint32(h), ErrorMessage: string(text[:n]), Ack: readAck(h[8:]),
			Account: &kvtierv1.Account{TokensExact: u64(40), TokensScanned: u64(48), TokensRead: u64(56), TokensEstimated: u64(64),
				BytesRam: u64(72), BytesNvme: u64(80), BytesFull: u64(88), BytesExactZone: u64(96),
				EstimatedError: math.Float32frombits(le.Uint32(h[104:])), CodecError: math.Float32frombits(le.Uint32(h[108:])),
				NsScore: u64(112), NsScan: u64(120), NsFetch: u64(128), NsExactZone: u64(136), NsTotal: u64(144),
				Mode: kvtierv1.AttendMode(le.Uint32(h[152:])), TargetMissed: le.Uint32(h[156:])&1 != 0,
				ErrorP95: math.Float32frombits(le.Uint32(h[160:])), CalibrationAudits: le.Uint32(h[164:]), BytesGpu: u64(168), TokensLate: u64(176), BytesLate: u64(184)}})
		text = text[n:]
	}
	data := text
	if c.out != nil {
		if len(text) != 0 {
			return nil, fmt.Errorf("%d bytes inline beside a results' region", len(text))
		}
		if c.pull != nil {
			c.pull()
		}
		data = c.out.b[64:]
	}
	typ := compress.ElementType(max(1, r.Dtype))
	for i, it := range r.Items {
		if out.Results[i].ErrorCode != 0 {
			continue
		}
		q := len(it.Q) / typ.Size()
		lse := q / int(spec.HeadDim)
		out.Results[i].Output, data = slices.Clone(data[:4*q]), data[4*q:]
		out.Results[i].Lse, data = slices.Clone(data[:4*lse]), data[4*lse:]
	}
	if c.out == nil && len(data) != 0 {
		return nil, fmt.Errorf("%d bytes behind the results", len(data))
	}
	return out, nil
}

func (c *fastClient) close() { _ = c.conn.Close() }
