//go:build linux

package server

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"math"
	"net"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"

	kvtierv1 "kvtier/proto/kvtier/v1"
)

// ended waits for the server to close the connection.
func (c *fastClient) ended(t testing.TB) {
	t.Helper()
	_ = c.conn.SetReadDeadline(time.Now().Add(5 * time.Second))
	if _, err := c.conn.Read(make([]byte, 1)); !errors.Is(err, io.EOF) && !errors.Is(err, syscall.ECONNRESET) {
		t.Fatalf("the connection lives on: %v", err)
	}
}

func TestFastHello(t *testing.T) {
	c := dialFast(t, newRig(t, Options{}).socket)
	for _, version := range []byte{frameVersion, frameVersion + 1, 255} {
		b, err := c.call(1, []byte{version, 0, 0, 0})
		if err != nil || !bytes.Equal(b, []byte{frameVersion, 0, 0, 0, 0, 0, 0, 16, 0, 0, 0, 0}) {
			t.Fatalf("% x, %v", b, err)
		}
	}
	for _, version := range []byte{0, 1, frameVersion - 1} {
		_, err := c.call(1, []byte{version, 0, 0, 0})
		wantError(t, err, codes.InvalidArgument, ReasonFrame)
	}
}

// Headers that break the protocol are answered, and the connection ends.
func TestFastBadHeaders(t *testing.T) {
	r := newRig(t, Options{})
	for name, change := range map[string]func(h []byte){
		"magic":   func(h []byte) { h[0] = 'X' },
		"version": func(h []byte) { h[4] = 1 },
		"zero":    func(h []byte) { h[6] = 1 },
		"status":  func(h []byte) { h[13] = 1 },
		"length":  func(h []byte) { binary.LittleEndian.PutUint64(h[16:], 256<<20+1) },
		"huge":    func(h []byte) { binary.LittleEndian.PutUint64(h[16:], math.MaxUint64) },
	} {
		t.Run(name, func(t *testing.T) {
			c := dialFast(t, r.socket)
			h := header(1, 77, 4)
			change(h)
			if _, err := c.conn.Write(append(h, 1, 0, 0, 0)); err != nil {
				t.Fatal(err)
			}
			_, err := c.receive(1, 77)
			wantError(t, err, codes.InvalidArgument, ReasonFrame)
			c.ended(t)
		})
	}
}

// A client that dies amid a frame leaves nothing behind.
func TestFastTruncatedFrames(t *testing.T) {
	r := newRig(t, Options{})
	w := newWorker(t, r, dialFast(t, r.socket), newModel(1, testSpec(), 10), 0)
	c := w.p.(*fastClient)
	full := appendBody(c.handles[w.id], 0, 0, 10, 2, 0, 0, 0, 0, 0, 0, slices.Concat(w.rows(0, 0, 10).K, w.rows(0, 0, 10).V))
	frame := append(header(5, 1, uint64(len(full))), full...)
	for _, cut := range []int{1, 23, 24, 25, 60, len(frame) - 1} {
		d := dialFast(t, r.socket)
		if _, err := d.conn.Write(frame[:cut]); err != nil {
			t.Fatal(err)
		}
		if err := d.conn.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		d.ended(t)
	}
	// An announced body is not allocated before it comes.
	d := dialFast(t, r.socket)
	if _, err := d.conn.Write(header(5, 1, 256<<20)); err != nil {
		t.Fatal(err)
	}
	d.close()
	if a, err := c.open(t.Context(), w.id); err != nil || a.Accepted != 0 {
		t.Fatalf("%v, %v", a, err)
	}
}

// Bodies that are wrong are answered, and the connection lives on.
func TestFastBadRequests(t *testing.T) {
	r := newRig(t, Options{})
	w := newWorker(t, r, dialFast(t, r.socket).withRegions(4096), newModel(1, testSpec(), 10), 0)
	c := w.p.(*fastClient)
	h := c.handles[w.id]
	rows := w.rows(0, 0, 10)
	data := slices.Concat(rows.K, rows.V)
	q := w.queries(0, 1, 0).Q
	attend := func(change func(b []byte), inline []byte) []byte {
		le := binary.LittleEndian
		b := make([]byte, 64+24)
		b[4], b[5] = 1, 1
		le.PutUint16(b[6:], 1)
		le.PutUint64(b[64:], h)
		le.PutUint32(b[80:], 1)
		if change != nil {
			change(b)
		}
		return append(b, inline...)
	}
	put := func(at int, x uint32) func([]byte) {
		return func(b []byte) { binary.LittleEndian.PutUint32(b[at:], x) }
	}
	both := func(fs ...func([]byte)) func([]byte) {
		return func(b []byte) {
			for _, f := range fs {
				f(b)
			}
		}
	}
	changed := func(b []byte, at int, x byte) []byte {
		b = slices.Clone(b)
		b[at] = x
		return b
	}
	good := appendBody(h, 0, 0, 10, 2, 0, 0, 0, 0, 0, 0, data)
	for name, x := range map[string]struct {
		op     byte
		body   []byte
		code   codes.Code
		reason string
	}{
		"op 0":                      {0, nil, codes.InvalidArgument, ReasonFrame},
		"op 7":                      {7, good, codes.InvalidArgument, ReasonFrame},
		"hello of 3 bytes":          {1, []byte{1, 0, 0}, codes.InvalidArgument, ReasonFrame},
		"open nothing":              {4, nil, codes.NotFound, ReasonUnknown},
		"open bytes":                {4, []byte{0xff, 0xfe, 0}, codes.NotFound, ReasonUnknown},
		"short append":              {5, good[:55], codes.InvalidArgument, ReasonFrame},
		"append: dtype 0":           {5, changed(good, 24, 0), codes.InvalidArgument, ReasonArgument},
		"append: dtype 4":           {5, changed(good, 24, 4), codes.InvalidArgument, ReasonArgument},
		"append: flag 4":            {5, changed(good, 25, 4), codes.InvalidArgument, ReasonFrame},
		"append: not zero":          {5, changed(good, 26, 1), codes.InvalidArgument, ReasonFrame},
		"append: inline size":       {5, changed(good, 48, 64), codes.InvalidArgument, ReasonFrame},
		"append: not zero either":   {5, changed(good, 52, 1), codes.InvalidArgument, ReasonFrame},
		"append: region, fewer":     {5, appendBody(h, 0, 0, 10, 2, 0, 0, 0, 7, 0, 2559, nil), codes.InvalidArgument, ReasonShape},
		"append: region, more":      {5, appendBody(h, 0, 0, 10, 2, 0, 0, 0, 7, 0, 2561, nil), codes.InvalidArgument, ReasonShape},
		"append: region, none":      {5, appendBody(h, 0, 0, 10, 2, 0, 0, 0, 7, 0, 0, nil), codes.InvalidArgument, ReasonShape},
		"append: inline offset":     {5, changed(good, 40, 64), codes.InvalidArgument, ReasonFrame},
		"append: more tokens":       {5, changed(good, 20, 11), codes.InvalidArgument, ReasonShape},
		"append: fewer tokens":      {5, changed(good, 20, 9), codes.InvalidArgument, ReasonShape},
		"append: all tokens":        {5, appendBody(h, 0, 0, math.MaxUint32, 2, 0, math.MaxUint32, math.MaxUint32, 0, 0, 0, data), codes.InvalidArgument, ReasonShape},
		"append: ids":               {5, appendBody(h, 0, 0, 10, 2, 0, 0, 9, 0, 0, 0, data), codes.InvalidArgument, ReasonShape},
		"append: handle":            {5, appendBody(h+1000, 0, 0, 10, 2, 0, 0, 0, 0, 0, 0, data), codes.NotFound, ReasonUnknown},
		"append: region unknown":    {5, appendBody(h, 0, 0, 10, 2, 0, 0, 0, 99, 0, 2560, nil), codes.NotFound, ReasonUnknown},
		"append: region and inline": {5, appendBody(h, 0, 0, 10, 2, 0, 0, 0, 7, 0, 2560, data), codes.InvalidArgument, ReasonFrame},
		"append: region misaligned": {5, appendBody(h, 0, 0, 10, 2, 0, 0, 0, 7, 32, 2560, nil), codes.InvalidArgument, ReasonRegion},
		"append: region too short":  {5, appendBody(h, 0, 0, 10, 2, 0, 0, 0, 7, 4032, 2560, nil), codes.InvalidArgument, ReasonRegion},
		"append: region offset":     {5, appendBody(h, 0, 0, 10, 2, 0, 0, 0, 7, math.MaxUint64-63, 2560, nil), codes.InvalidArgument, ReasonRegion},
		"append: region, all":       {5, appendBody(h, 0, 0, math.MaxUint32, 2, 0, 0, 0, 7, 0, math.MaxUint32, nil), codes.InvalidArgument, ReasonRegion},
		"short attend":              {6, attend(nil, nil)[:63], codes.InvalidArgument, ReasonFrame},
		"short items":               {6, attend(nil, nil)[:87], codes.InvalidArgument, ReasonFrame},
		"attend: no items":          {6, attend(put(4, 1), q), codes.InvalidArgument, ReasonShape},
		"attend: many items":        {6, attend(put(4, 0xffff0101), q), codes.InvalidArgument, ReasonFrame},
		"attend: dtype":             {6, attend(put(4, 0x10109), q), codes.InvalidArgument, ReasonArgument},
		"attend: mode":              {6, attend(put(4, 0x10901), q), codes.InvalidArgument, ReasonArgument},
		"attend: not zero":          {6, attend(put(44, 1), q), codes.InvalidArgument, ReasonFrame},
		"attend: not zero either":   {6, attend(put(60, 1), q), codes.InvalidArgument, ReasonFrame},
		"attend: flags":             {6, attend(put(84, 8), q), codes.InvalidArgument, ReasonFrame},
		"attend: handle":            {6, attend(put(64, 1<<30), q), codes.NotFound, ReasonUnknown},
		"attend: data short":        {6, attend(nil, q[:len(q)-1]), codes.InvalidArgument, ReasonShape},
		"attend: data long":         {6, attend(nil, append(slices.Clone(q), 0)), codes.InvalidArgument, ReasonShape},
		"attend: k missing":         {6, attend(put(84, 1), q), codes.InvalidArgument, ReasonShape},
		"attend: all positions":     {6, attend(put(80, math.MaxUint32), q), codes.InvalidArgument, ReasonShape},
		"attend: result too large":  {6, attend(put(80, 1<<20), q), codes.InvalidArgument, ReasonShape},
		"attend: region, fewer":     {6, attend(both(put(28, 7), put(44, 511)), nil), codes.InvalidArgument, ReasonShape},
		"attend: region, more":      {6, attend(both(put(28, 7), put(44, 516)), nil), codes.InvalidArgument, ReasonShape},
		"attend: region unknown":    {6, attend(put(28, 99), nil), codes.NotFound, ReasonUnknown},
		"attend: out unknown":       {6, attend(put(40, 99), q), codes.NotFound, ReasonUnknown},
		"attend: out misaligned":    {6, attend(both(put(40, 8), put(48, 8)), q), codes.InvalidArgument, ReasonRegion},
		"attend: out too short":     {6, attend(both(put(40, 8), put(48, 4032)), q), codes.InvalidArgument, ReasonRegion},
		"attend: out offset":        {6, attend(put(48, 64), q), codes.InvalidArgument, ReasonFrame},
		"attend: in offset":         {6, attend(put(32, 64), q), codes.InvalidArgument, ReasonFrame},
		"attend: past the end":      {6, attend(nil, q), codes.OutOfRange, ReasonPastEnd},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := c.call(x.op, x.body)
			wantError(t, err, x.code, x.reason)
		})
	}
	for n := range good {
		if _, err := c.call(5, good[:n]); err == nil {
			t.Fatalf("an APPEND cut to %d bytes is accepted", n)
		}
	}
	if _, err := c.call(5, good); err != nil {
		t.Fatal(err)
	}
}

// openDescriptors says what the process has open, by kind and name.
func openDescriptors(t testing.TB) (open []string) {
	t.Helper()
	d, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range d {
		if name, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil {
			open = append(open, name)
		}
	}
	slices.Sort(open)
	return open
}

func TestFastRegions(t *testing.T) {
	r := newRig(t, Options{})
	c := dialFast(t, r.socket)
	sealed := memfd(t, 8192, sealsOfRegion)
	readOnly := memfd(t, 8192, sealsOfRegion|unix.F_SEAL_WRITE)
	file, err := os.Create(filepath.Join(t.TempDir(), "file"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	if err := file.Truncate(8192); err != nil {
		t.Fatal(err)
	}
	unsealed := []int{memfd(t, 8192, 0)}
	for _, s := range []int{unix.F_SEAL_SHRINK, unix.F_SEAL_GROW, unix.F_SEAL_SEAL} {
		unsealed = append(unsealed, memfd(t, 8192, s), memfd(t, 8192, sealsOfRegion&^s))
	}
	pipe := make([]int, 2)
	if err := unix.Pipe2(pipe, unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	defer func() { _, _ = unix.Close(pipe[0]), unix.Close(pipe[1]) }()
	if _, err := c.call(1, []byte{frameVersion, 0, 0, 0}); err != nil { // the server has accepted
		t.Fatal(err)
	}
	before := openDescriptors(t)
	refused := func(body []byte, reason string, fds ...int) {
		t.Helper()
		_, err := c.call(2, body, fds...)
		wantError(t, err, codes.InvalidArgument, reason)
	}
	for _, fd := range unsealed {
		refused(regionBody(1, 8192), ReasonRegion, fd)
	}
	refused(regionBody(1, 8192), ReasonRegion)
	refused(regionBody(1, 8192), ReasonRegion, int(file.Fd()))
	refused(regionBody(1, 8192), ReasonRegion, pipe[0])
	refused(regionBody(1, 8192), ReasonRegion, readOnly)
	refused(regionBody(1, 8191), ReasonRegion, sealed)
	refused(regionBody(1, 16384), ReasonRegion, sealed)
	refused(regionBody(1, 0), ReasonRegion, sealed)
	refused(regionBody(1, math.MaxUint64), ReasonRegion, sealed)
	refused(regionBody(0, 8192), ReasonRegion, sealed)
	refused(regionBody(1, 8192)[:11], ReasonFrame, sealed)
	// More descriptors than asked for, and ones that nobody asked for.
	if _, err := c.call(2, regionBody(1, 8192), sealed, sealed, pipe[0], sealed, sealed); err != nil {
		t.Fatal(err)
	}
	if _, err := c.call(1, []byte{frameVersion, 0, 0, 0}, sealed, pipe[1]); err != nil {
		t.Fatal(err)
	}
	refused(regionBody(2, 8192), ReasonRegion) // not the one that came with HELLO
	refused(regionBody(1, 8192), ReasonRegion, sealed)
	for id := uint32(2); id <= maxRegions; id++ {
		if _, err := c.call(2, regionBody(id, 8192), sealed); err != nil {
			t.Fatal(err)
		}
	}
	refused(regionBody(100, 8192), ReasonRegion, sealed)
	if _, err := c.call(3, []byte{1, 0, 0, 0}); err != nil {
		t.Fatal(err)
	}
	_, err = c.call(3, []byte{1, 0, 0, 0})
	wantError(t, err, codes.NotFound, ReasonUnknown)
	_, err = c.call(3, []byte{1, 0, 0})
	wantError(t, err, codes.InvalidArgument, ReasonFrame)
	if _, err := c.call(2, regionBody(100, 8192), sealed); err != nil {
		t.Fatal(err)
	}
	// Descriptors amid a large body, more than anybody needs.
	if _, err := c.conn.Write(header(4, 900, 1<<20)); err != nil {
		t.Fatal(err)
	}
	for range 1024 {
		if _, _, err := c.conn.WriteMsgUnix(make([]byte, 1024), unix.UnixRights(sealed, pipe[0]), nil); err != nil {
			t.Fatal(err)
		}
	}
	_, err = c.receive(4, 900)
	wantError(t, err, codes.NotFound, ReasonUnknown)
	// And amid a small one, byte by byte.
	if _, err := c.conn.Write(header(4, 901, 200)); err != nil {
		t.Fatal(err)
	}
	for range 200 {
		if _, _, err := c.conn.WriteMsgUnix([]byte{'x'}, unix.UnixRights(sealed, sealed), nil); err != nil {
			t.Fatal(err)
		}
	}
	_, err = c.receive(4, 901)
	wantError(t, err, codes.NotFound, ReasonUnknown)
	if after := openDescriptors(t); !slices.Equal(after, before) {
		t.Fatalf("open descriptors: %q, were %q", after, before)
	}
	c.close()
	for r.inFlight() {
		time.Sleep(time.Millisecond)
	}
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(maps, []byte("kvtier-test")) {
		t.Fatal("a region is still mapped")
	}
}

// Requests may be sent before replies were read; replies come in order.
func TestFastPipelining(t *testing.T) {
	r := newRig(t, Options{})
	w := newWorker(t, r, dialFast(t, r.socket), newModel(1, testSpec(), 100), 0)
	c := w.p.(*fastClient)
	h := c.handles[w.id]
	fd := memfd(t, 1<<20, sealsOfRegion)
	first := c.id + 1
	var all []byte
	frame := func(op byte, body []byte) {
		c.id++
		all = append(append(all, header(op, c.id, uint64(len(body)))...), body...)
	}
	for i := range 100 {
		for l := range 2 {
			rows := w.rows(l, i, i+1)
			frame(5, appendBody(h, uint64(i), uint32(l), 1, 2, 0, 0, 0, 0, 0, 0, slices.Concat(rows.K, rows.V)))
		}
	}
	wrote := make(chan error, 1)
	go func() {
		// In odd pieces, and two regions whose frames follow each other at once.
		for at := 0; at < len(all); at += 1777 {
			if _, err := c.conn.Write(all[at:min(len(all), at+1777)]); err != nil {
				wrote <- err
				return
			}
		}
		for i := range 2 {
			b := append(header(2, 1000+uint32(i), 12), regionBody(uint32(1+i), 1<<20)...)
			if _, _, err := c.conn.WriteMsgUnix(b, unix.UnixRights(fd), nil); err != nil {
				wrote <- err
				return
			}
		}
		wrote <- nil
	}()
	read := func(op byte, id uint32, length int) []byte {
		t.Helper()
		b := make([]byte, 24+length)
		if _, err := io.ReadFull(c.conn, b); err != nil {
			t.Fatal(err)
		}
		if b[5] != op|0x80 || binary.LittleEndian.Uint32(b[8:]) != id || binary.LittleEndian.Uint32(b[12:]) != 0 || int(b[16]) != length {
			t.Fatalf("reply % x", b)
		}
		return b[24:]
	}
	for i := range 200 {
		if a := readAck(read(5, first+uint32(i), 32)); a.Accepted != uint64(i+1)/2 {
			t.Fatalf("append %d: %v", i, a)
		}
	}
	read(2, 1000, 0)
	read(2, 1001, 0)
	if err := <-wrote; err != nil {
		t.Fatal(err)
	}
}

// Bodies far beyond the connection's buffer.
func TestFastLargeBodies(t *testing.T) {
	r := newRig(t, Options{})
	spec := testSpec()
	spec.KvHeads, spec.QueryHeads, spec.HeadDim = 8, 16, 256
	w := newWorker(t, r, dialFast(t, r.socket), newModel(1, spec, 1500), 0)
	w.feedAll(0, 1400) // 11 MiB a frame
	res := w.attend(request(1, exactly, w.queries(1300, 1400, 1)))[0]
	if len(res.Output) != 100*16*256*4 {
		t.Fatalf("%d bytes", len(res.Output))
	}
	a := w.attend(request(1, exactly, w.queries(1399, 1400, 1)))[0]
	if !bytes.Equal(a.Output, res.Output[99*16*256*4:]) {
		t.Fatal("a position's answer depends on the others in its call")
	}
	w.verify(a, 1, 1399, 1, nil, 1e-4)
	w.feedAll(1400, 1500)
}

func TestFastCloseWithClients(t *testing.T) {
	r := newRig(t, Options{ReadAllTokens: -1})
	idle := dialFast(t, r.socket)
	if _, err := idle.call(1, []byte{frameVersion, 0, 0, 0}); err != nil {
		t.Fatal(err)
	}
	const n = 2048 + recentTokens
	w := sealedWorker(t, r, dialFast(t, r.socket), testSpec(), n, 0)
	busy := make(chan error, 1)
	go func() {
		_, err := w.p.attend(t.Context(), w.spec, longRequest(w, n))
		busy <- err
	}()
	for !r.working() {
		time.Sleep(time.Millisecond)
	}
	begin := time.Now()
	closeServer(t, r.srv)
	if took := time.Since(begin); took > 3*time.Second {
		t.Fatalf("closing took %v", took)
	}
	wantError(t, <-busy, codes.Unavailable, ReasonClosing)
	idle.ended(t)
	if _, err := net.Dial("unix", r.socket); err == nil {
		t.Fatal("the socket still answers")
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: r.socket, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	if err := r.srv.ServeFast(l); err != nil {
		t.Fatalf("serving a closed server: %v", err)
	}
}

// working says whether a request of the fast path is under way.
func (r *rig) working() bool {
	r.srv.mu.RLock()
	defer r.srv.mu.RUnlock()
	for c := range r.srv.mu.conns {
		c.watch.Lock()
		busy := c.watch.cancel != nil
		c.watch.Unlock()
		if busy {
			return true
		}
	}
	return false
}

// fuzzSource is a connection with one sequence and one region.
type fuzzSource struct {
	seq  *sequence
	conn *fastConn
}

func newFuzzSource(t testing.TB) *fuzzSource {
	t.Helper()
	sp, err := newSpec(testSpec())
	if err != nil {
		t.Fatal(err)
	}
	x := &fuzzSource{seq: &sequence{spec: sp}}
	x.conn = &fastConn{regions: map[uint32]region{7: mapped(make([]byte, 1<<16))}}
	return x
}

func (x *fuzzSource) byHandle(h uint64) (*sequence, error) {
	if h == 1 {
		return x.seq, nil
	}
	return nil, fail(codes.NotFound, ReasonUnknown, "no sequence with handle %d", h)
}

func (x *fuzzSource) input(id uint32, offset, size uint64) ([]byte, error) {
	return x.conn.input(id, offset, size)
}

func (x *fuzzSource) output(id uint32, offset, size uint64) ([]byte, func(context.Context) error, error) {
	return x.conn.output(id, offset, size)
}

func FuzzParseFrame(f *testing.F) {
	f.Add(header(5, 1, 100))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) < 24 {
			return
		}
		h, err := parseFrame(b)
		if err == nil && !bytes.Equal(header(h.op, h.id, uint64(h.length)), b[:24]) {
			t.Fatalf("% x", b[:24])
		}
	})
}

func FuzzParseAppend(f *testing.F) {
	x := newFuzzSource(f)
	f.Add(appendBody(1, 5, 1, 2, 2, 1, 1, 2, 0, 0, 0, make([]byte, 2*256+256+16)))
	f.Add(appendBody(1, 0, 0, 3, 1, 0, 0, 0, 7, 64, 1536, nil))
	f.Add(appendBody(1, 0, 0, math.MaxUint32, 1, 0, math.MaxUint32, math.MaxUint32, 7, math.MaxUint64-63, math.MaxUint32, nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		s, r, err := parseAppend(b, x)
		x.conn.lent = x.conn.lent[:0]
		if err != nil {
			if toError(err).Code == codes.Internal {
				t.Fatal(err)
			}
			return
		}
		n := int(binary.LittleEndian.Uint32(b[20:]))
		m := int(binary.LittleEndian.Uint32(b[28:]))
		size := r.typ.Size()
		if len(r.k) != n*2*32*size || len(r.v) != len(r.k) || len(r.queries) != m*4*32*size || len(r.ids) != 0 && len(r.ids) != n {
			t.Fatalf("%d and %d bytes, %d, %d", len(r.k), len(r.v), len(r.queries), len(r.ids))
		}
		_, _ = s.checkAppend(r)
	})
}

func FuzzParseAttend(f *testing.F) {
	x := newFuzzSource(f)
	c := &fastClient{handles: map[string]uint64{"": 1, "?": 2}}
	item := func(n int) *kvtierv1.AttendItem {
		return &kvtierv1.AttendItem{Start: 3, Q: make([]byte, n*4*32*4), K: make([]byte, n*2*32*4), V: make([]byte, n*2*32*4),
			TokenIds: make([]uint64, n), PartialOutput: make([]byte, n*4*32*4), PartialLse: make([]byte, n*4*4)}
	}
	f.Add(c.attendBody(f.Context(), testSpec(), request(1, exactly, item(1))))
	f.Add(c.attendBody(f.Context(), testSpec(), request(1, nil, item(2), item(1))))
	f.Add(c.attendBody(f.Context(), testSpec(), request(1, nil, item(2), &kvtierv1.AttendItem{SequenceId: "?"})))
	c.in, c.out = &testRegion{id: 7, b: make([]byte, 1<<16)}, &testRegion{id: 7}
	f.Add(c.attendBody(f.Context(), testSpec(), request(1, exactly, item(3))))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := parseAttend(b, x)
		x.conn.lent = x.conn.lent[:0]
		if err != nil {
			if toError(err).Code == codes.Internal {
				t.Fatal(err)
			}
			return
		}
		total := 0
		for i, it := range r.items {
			n := len(it.query.q) / (4 * 32 * it.query.typ.Size())
			if r.sizes[i] != n*4*33*4 {
				t.Fatalf("item %d of %d positions: %d bytes", i, n, r.sizes[i])
			}
			total += r.sizes[i]
			if a := it.query.append; a != nil && len(a.k) != n*2*32*it.query.typ.Size() {
				t.Fatalf("item %d: %d bytes of k", i, len(a.k))
			}
			if _, _, err := x.seq.checkQuery(it.query); err == nil {
				_, _ = x.seq.workerPartials(it.query.partial, n)
			}
		}
		if r.results != nil && len(r.results) != total {
			t.Fatalf("%d bytes for results of %d", len(r.results), total)
		}
	})
}

// FuzzConnection sends bytes to a live connection: whatever they are, the
// server answers in whole frames or hangs up.
func FuzzConnection(f *testing.F) {
	r := newRig(f, Options{})
	w := newWorker(f, r, dialFast(f, r.socket), newModel(1, testSpec(), 20), 0)
	c := w.p.(*fastClient)
	h := c.handles[w.id]
	rows := w.rows(0, 0, 2)
	body := appendBody(h, 0, 0, 2, 2, 0, 0, 0, 0, 0, 0, slices.Concat(rows.K, rows.V))
	frame := func(op byte, body []byte) []byte { return append(header(op, 1, uint64(len(body))), body...) }
	f.Add(frame(5, body))
	f.Add(append(frame(4, []byte(w.id)), frame(1, []byte{frameVersion, 0, 0, 0})...))
	f.Add(frame(6, c.attendBody(f.Context(), w.spec, request(0, exactly, w.queries(0, 1, 0)))))
	f.Add(frame(2, regionBody(1, 4096)))
	f.Fuzz(func(t *testing.T, b []byte) {
		d := dialFast(t, r.socket)
		defer d.close()
		_ = d.conn.SetDeadline(time.Now().Add(5 * time.Second))
		go func() {
			_, _ = d.conn.Write(b)
			_ = d.conn.CloseWrite()
		}()
		out, err := io.ReadAll(d.conn)
		if err != nil && !errors.Is(err, syscall.ECONNRESET) {
			t.Fatal(err)
		}
		for len(out) > 0 {
			if len(out) < 24 || uint64(len(out)-24) < binary.LittleEndian.Uint64(out[16:]) {
				t.Fatalf("half a reply: % x", out)
			}
			if code := binary.LittleEndian.Uint32(out[12:]); code == uint32(codes.Internal) {
				t.Fatalf("%s", out[24:])
			}
			out = out[24+binary.LittleEndian.Uint64(out[16:]):]
		}
	})
}
