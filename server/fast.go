package server

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"runtime/debug"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"google.golang.org/grpc/codes"

	kvtierv1 "kvtier/proto/kvtier/v1"
)

const (
	fastBuffer = 64 << 10 // frames up to this size are parsed where they were read
	bodyStep   = 4 << 20  // memory is taken as a large body arrives, not as it is announced
	replyKept  = 1 << 20  // of a reply's buffer, for the next one
	hangupTick = 100 * time.Millisecond
	lastWrite  = 2 * time.Second
)

// scratch lends buffers for large bodies and for copies out of regions.
var scratch = sync.Pool{New: func() any { return new([]byte) }}

// fastConn is one connection of the fast path. One goroutine owns it, but for
// stop and the watch for a client that is gone.
type fastConn struct {
	srv     *Server
	conn    *net.UnixConn
	ctx     context.Context // ends with the connection
	cancel  context.CancelFunc
	closing atomic.Bool
	lease   uint64
	opened  map[uint64]bool // handles that the lease holds

	buf  []byte // [r, w) was read and not yet parsed
	r, w int
	off  uint64 // of buf[r] in the stream
	oob  []byte
	fds  []arrived
	lent []*[]byte // scratch of the request at hand
	out  []byte    // reply

	regions map[uint32]region

	watch struct {
		sync.Mutex
		timer  *time.Timer
		cancel context.CancelFunc // of the request at hand
	}
}

// ServeFast serves the fast path until Close, and then returns nil.
func (srv *Server) ServeFast(l *net.UnixListener) error {
	srv.mu.Lock()
	closed := srv.mu.closed
	srv.mu.closers = append(srv.mu.closers, func() { _ = l.Close() })
	srv.mu.Unlock()
	if closed {
		_ = l.Close()
	}
	for {
		conn, err := l.AcceptUnix()
		switch {
		case err == nil:
			srv.startFast(conn)
		case errors.Is(err, net.ErrClosed):
			return nil
		case errors.Is(err, syscall.EMFILE), errors.Is(err, syscall.ENFILE), errors.Is(err, syscall.ENOMEM),
			errors.Is(err, syscall.ENOBUFS), errors.Is(err, syscall.ECONNABORTED):
			srv.log.Warn("accept a fast-path connection", "err", err)
			time.Sleep(50 * time.Millisecond)
		default:
			return fmt.Errorf("fast path: %w", err)
		}
	}
}

// startFast serves a connection, if its peer may use this daemon.
func (srv *Server) startFast(conn *net.UnixConn) {
	pid, err := admit(conn)
	if err != nil {
		srv.log.Warn("refuse a fast-path connection", "err", err)
		_ = conn.Close()
		return
	}
	c := &fastConn{srv: srv, conn: conn, buf: make([]byte, fastBuffer), oob: make([]byte, oobBytes),
		out: make([]byte, frameHeader, 4096), opened: map[uint64]bool{}, regions: map[uint32]region{}}
	c.ctx, c.cancel = context.WithCancel(context.Background())
	c.watch.timer = time.AfterFunc(time.Hour, c.look)
	c.watch.timer.Stop()
	srv.mu.Lock()
	if srv.mu.closed {
		srv.mu.Unlock()
		c.cancel()
		_ = conn.Close()
		return
	}
	srv.mu.conns[c] = true
	srv.work.Add(1)
	srv.mu.Unlock()
	c.lease = srv.leases.create(0, fmt.Sprintf("fast path pid %d", pid))
	go c.serve()
}

// stop ends the connection: the request at hand is cancelled and answered.
func (c *fastConn) stop() {
	c.closing.Store(true)
	c.cancel()
	_ = c.conn.SetReadDeadline(time.Unix(1, 0))
	_ = c.conn.SetWriteDeadline(time.Now().Add(lastWrite))
}

// serve answers requests in order until the client goes or breaks the protocol.
func (c *fastConn) serve() {
	defer c.end()
	// A client's memory can fail under the daemon; that must be an error of the call.
	debug.SetPanicOnFault(true)
	for {
		f, body, err := c.next()
		switch {
		case err == nil:
			err = c.answer(f, body)
		case errors.As(err, new(*Error)):
			_ = c.reply(f, err)
		}
		if err != nil {
			return
		}
		c.release()
	}
}

// end gives back what the connection held.
func (c *fastConn) end() {
	c.cancel()
	c.watch.timer.Stop()
	_ = c.conn.Close()
	c.closeDescriptors(c.fds)
	for id := range c.regions {
		_ = c.dropRegion(id)
	}
	_ = c.srv.leases.revoke(c.lease)
	c.srv.mu.Lock()
	delete(c.srv.mu.conns, c)
	c.srv.mu.Unlock()
	c.srv.work.Done()
}

// next reads a frame. The body is valid until the next one is read.
func (c *fastConn) next() (f frame, body []byte, err error) {
	if err := c.fill(frameHeader); err != nil {
		return f, nil, err
	}
	if f, err = parseFrame(c.buf[c.r:c.w]); err != nil {
		return f, nil, err
	}
	if f.length > len(c.buf)-frameHeader {
		c.took(frameHeader)
		body, err = c.readLarge(f.length)
		return f, body, err
	}
	if err := c.fill(frameHeader + f.length); err != nil {
		return f, nil, err
	}
	body = c.buf[c.r+frameHeader : c.r+frameHeader+f.length]
	c.took(frameHeader + f.length)
	return f, body, nil
}

func (c *fastConn) took(n int) {
	c.r += n
	c.off += uint64(n)
}

// fill reads until n bytes are there, n at most the buffer's size.
func (c *fastConn) fill(n int) error {
	if c.r == c.w {
		c.r, c.w = 0, 0
	}
	if c.r+n > len(c.buf) {
		c.w = copy(c.buf, c.buf[c.r:c.w])
		c.r = 0
	}
	for c.w-c.r < n {
		got, oob, _, _, err := c.conn.ReadMsgUnix(c.buf[c.w:], c.oob)
		c.w += got
		if oob > 0 {
			c.gotDescriptors(c.oob[:oob])
		}
		if err == nil && got == 0 {
			err = io.EOF
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// readLarge reads a body that does not fit the buffer. Descriptors that come
// amid it belong to nothing; read(2) discards them.
func (c *fastConn) readLarge(n int) ([]byte, error) {
	b := c.borrow(min(n, bodyStep))
	have := copy(b, c.buf[c.r:c.w])
	c.took(have)
	c.off += uint64(n - have)
	for {
		if _, err := io.ReadFull(c.conn, b[have:]); err != nil {
			return nil, err
		}
		if have = len(b); have == n {
			return b, nil
		}
		larger := c.borrow(min(n, 2*have))
		copy(larger, b)
		b = larger
	}
}

// borrow lends n bytes until the request is answered.
func (c *fastConn) borrow(n int) []byte {
	p := scratch.Get().(*[]byte)
	c.lent = append(c.lent, p)
	if cap(*p) < n {
		*p = make([]byte, n)
	}
	return (*p)[:n]
}

func (c *fastConn) release() {
	for i, p := range c.lent {
		scratch.Put(p)
		c.lent[i] = nil
	}
	c.lent = c.lent[:0]
	if cap(c.out) > replyKept {
		c.out = make([]byte, frameHeader, 4096)
	}
}

// answer answers one request; an error means that the connection is over.
func (c *fastConn) answer(f frame, body []byte) error {
	if c.closing.Load() {
		return c.reply(f, fail(codes.Unavailable, ReasonClosing, "the daemon is shutting down"))
	}
	c.out = c.out[:frameHeader]
	err := c.dispatch(f, body)
	if err != nil && c.closing.Load() && errors.Is(err, context.Canceled) {
		err = fail(codes.Unavailable, ReasonClosing, "the daemon is shutting down")
	}
	return c.reply(f, err)
}

// reply sends what is in out, or err. What came with the request and was not
// used is closed by then.
func (c *fastConn) reply(f frame, err error) error {
	c.expireDescriptors()
	status := codes.OK
	if e := toError(err); e != nil {
		status = e.Code
		c.out = append(c.out[:frameHeader], errorText(e)...)
	}
	putHeader(c.out, f, uint32(status))
	_, err = c.conn.Write(c.out)
	return err
}

func (c *fastConn) dispatch(f frame, body []byte) (err error) {
	defer recovered(&err)
	switch f.op {
	case opHello:
		return c.hello(body)
	case opRegion:
		return c.addRegion(body)
	case opDeviceRegion:
		return c.addDeviceRegion(body)
	case opUnregion:
		if len(body) != 4 {
			return badFrame("an UNREGION of %d bytes, not 4", len(body))
		}
		return c.dropRegion(binary.LittleEndian.Uint32(body))
	case opOpen:
		return c.open(string(body))
	case opAppend:
		return c.append(body)
	case opAttend:
		return c.attend(body)
	}
	return badFrame("op %d is unknown", f.op)
}

func (c *fastConn) hello(body []byte) error {
	if len(body) != 4 {
		return badFrame("a HELLO of %d bytes, not 4", len(body))
	}
	if v := binary.LittleEndian.Uint32(body); v < frameVersion {
		return badFrame("version %d of the fast path: this daemon speaks %d", v, frameVersion)
	}
	c.out = binary.LittleEndian.AppendUint32(c.out, frameVersion)
	c.out = binary.LittleEndian.AppendUint64(c.out, maxBody)
	return nil
}

// open holds a sequence for the connection.
func (c *fastConn) open(id string) error {
	s, err := c.srv.openExisting(&kvtierv1.OpenSequenceRequest{SequenceId: id})
	if err != nil {
		return err
	}
	if !c.opened[s.handle] {
		release, err := s.hold()
		if err != nil {
			return err
		}
		if _, err := c.srv.leases.attach(c.lease, release); err != nil {
			release()
			return err
		}
		c.opened[s.handle] = true
	}
	c.out = binary.LittleEndian.AppendUint64(c.out, s.handle)
	c.out = putAck(c.out, s.ack())
	return nil
}

func (c *fastConn) append(body []byte) error {
	s, r, err := parseAppend(body, c)
	if err != nil {
		return err
	}
	ctx, done := c.within(fastTimeout)
	defer done()
	if err := s.append(ctx, r); err != nil {
		return err
	}
	c.out = putAck(c.out, s.ack())
	return nil
}

func (c *fastConn) attend(body []byte) error {
	f, err := parseAttend(body, c)
	if err != nil {
		return err
	}
	b, err := c.srv.budgetOf(&f.budget)
	if err != nil {
		return err
	}
	for i := range f.items {
		f.items[i].query.budget = b
	}
	ctx, done := c.within(f.timeout)
	defer done()
	if err := c.srv.attendMany(ctx, f.items); err != nil {
		return err
	}
	if len(f.items) == 1 && f.items[0].err != nil {
		return f.items[0].err
	}
	return c.results(ctx, f)
}

// results writes an ATTEND's answers to the reply and to the results' region.
func (c *fastConn) results(ctx context.Context, f *attendFrame) error {
	errs := make([]*Error, len(f.items))
	c.out = binary.LittleEndian.AppendUint64(c.out, uint64(len(f.items)))
	for i := range f.items {
		errs[i] = toError(f.items[i].err)
		c.out = putResult(c.out, &f.items[i], errs[i])
	}
	for _, e := range errs {
		if e != nil {
			c.out = append(c.out, errorText(e)...)
		}
	}
	var total int
	for i, n := range f.sizes {
		if errs[i] == nil {
			total += n
		}
	}
	dst := f.results
	if dst == nil {
		at := len(c.out)
		c.out = slices.Grow(c.out, total)[:at+total]
		dst = c.out[at:]
	}
	err := touching(func() {
		for i := range f.items {
			if errs[i] == nil {
				putFloats(dst, f.items[i].answer)
				dst = dst[f.sizes[i]:]
			}
		}
	})
	if err == nil && f.bring != nil {
		err = f.bring(ctx)
	}
	return err
}

// byHandle finds a sequence, for the parsers.
func (c *fastConn) byHandle(h uint64) (*sequence, error) { return c.srv.byHandle(h) }

// within bounds a request, which also ends when the client goes.
func (c *fastConn) within(d time.Duration) (ctx context.Context, done func()) {
	ctx, cancel := context.WithTimeout(c.ctx, d)
	c.watch.Lock()
	c.watch.cancel = cancel
	c.watch.Unlock()
	c.watch.timer.Reset(hangupTick)
	return ctx, func() {
		c.watch.timer.Stop()
		c.watch.Lock()
		c.watch.cancel = nil
		c.watch.Unlock()
		cancel()
	}
}

// look cancels a long request whose client is gone: nobody reads the socket
// while it runs.
func (c *fastConn) look() {
	c.watch.Lock()
	defer c.watch.Unlock()
	switch {
	case c.watch.cancel == nil:
	case hungUp(c.conn):
		c.watch.cancel()
	default:
		c.watch.timer.Reset(hangupTick)
	}
}
