package server

import (
	"context"
	"encoding/binary"
	"errors"

	"google.golang.org/grpc/codes"

	"kvtier/tiers/gpu"
	"kvtier/tiers/gpu/cuda"
)

const (
	maxRegions = 16 // of a connection
	maxRegion  = 1 << 30
	regionStep = 64 // offsets are multiples of it

	// maxArrived bounds descriptors that wait for their frame.
	maxArrived = 2 * maxRegions
)

// arrived is a descriptor that came with a read which ended before stream
// offset end.
type arrived struct {
	fd  int
	end uint64
}

// gotDescriptors takes in the descriptors that came with a read. What is more
// than regions can need is closed.
func (c *fastConn) gotDescriptors(oob []byte) {
	end := c.off + uint64(c.w-c.r)
	for _, fd := range descriptors(oob) {
		a := arrived{fd, end}
		if len(c.fds) == maxArrived {
			c.closeDescriptors([]arrived{a})
			continue
		}
		c.fds = append(c.fds, a)
	}
}

func (c *fastConn) closeDescriptors(fds []arrived) {
	for _, a := range fds {
		closeDescriptor(a.fd)
	}
}

// expireDescriptors closes those that came before what is to be parsed next:
// a descriptor belongs to the frame whose first byte it came with.
func (c *fastConn) expireDescriptors() {
	n := 0
	for n < len(c.fds) && c.fds[n].end <= c.off {
		n++
	}
	c.closeDescriptors(c.fds[:n])
	c.fds = append(c.fds[:0], c.fds[n:]...)
}

// region is memory that a worker shares with the daemon. The caller of read and write has checked that the bytes lie inside.
type region interface {
	bytes() uint64
	read(ctx context.Context, dst []byte, off uint64) error
	// place returns room for so many bytes of results, and what brings them there, if that is another place.
	place(c *fastConn, off, n uint64) (room []byte, bring func(context.Context) error)
	close() error
}

// addRegion maps the region that a REGION frame's descriptor names.
func (c *fastConn) addRegion(body []byte) error {
	if len(c.fds) == 0 {
		return invalid(ReasonRegion, "no descriptor came with the first byte of the frame")
	}
	fd := c.fds[0].fd
	c.fds = append(c.fds[:0], c.fds[1:]...)
	defer closeDescriptor(fd) // the mapping keeps the memory
	if len(body) != 12 {
		return badFrame("a REGION of %d bytes, not 12", len(body))
	}
	id, size, err := c.newRegion(body)
	if err != nil {
		return err
	}
	b, err := mapRegion(fd, int64(size))
	if err != nil {
		return err
	}
	c.regions[id] = mapped(b)
	return nil
}

// addDeviceRegion opens device memory of the worker.
func (c *fastConn) addDeviceRegion(body []byte) error {
	var h cuda.Handle
	if len(body) != 12+len(h) {
		return badFrame("a DEVICE_REGION of %d bytes, not %d", len(body), 12+len(h))
	}
	id, size, err := c.newRegion(body)
	if err != nil {
		return err
	}
	copy(h[:], body[12:])
	s, err := c.srv.store.OpenShared(c.ctx, h, int64(size))
	switch {
	case errors.Is(err, cuda.ErrNoDevice):
		return fail(codes.FailedPrecondition, ReasonRegion, "this daemon has no GPU: send a region of host memory with REGION")
	case err != nil:
		return invalid(ReasonRegion, "the handle names no memory of this GPU's that the daemon can use: %v", err)
	}
	c.regions[id] = onDevice{s}
	return nil
}

// newRegion checks what REGION and DEVICE_REGION begin with.
func (c *fastConn) newRegion(body []byte) (id uint32, size uint64, err error) {
	id, size = binary.LittleEndian.Uint32(body), binary.LittleEndian.Uint64(body[4:])
	switch {
	case id == 0:
		err = invalid(ReasonRegion, "region id 0 means inline: choose another")
	case c.regions[id] != nil:
		err = invalid(ReasonRegion, "region %d is in use: give it up with UNREGION first", id)
	case len(c.regions) == maxRegions:
		err = invalid(ReasonRegion, "a connection has at most %d regions: give one up with UNREGION first", maxRegions)
	case size == 0 || size > maxRegion:
		err = invalid(ReasonRegion, "a region of %d bytes: 1 to %d", size, maxRegion)
	}
	return id, size, err
}

func (c *fastConn) dropRegion(id uint32) error {
	r, err := c.region(id)
	if err != nil {
		return err
	}
	delete(c.regions, id)
	return r.close()
}

func (c *fastConn) region(id uint32) (region, error) {
	if r := c.regions[id]; r != nil {
		return r, nil
	}
	return nil, fail(codes.NotFound, ReasonUnknown, "no region %d on this connection: send it with REGION first", id)
}

// inRegion checks that bytes lie in a region.
func (c *fastConn) inRegion(id uint32, offset, size uint64) (region, error) {
	r, err := c.region(id)
	if err != nil {
		return nil, err
	}
	n := r.bytes()
	switch {
	case offset%regionStep != 0:
		return nil, invalid(ReasonRegion, "offset %d in region %d is not a multiple of %d", offset, id, regionStep)
	case offset > n || size > n-offset:
		return nil, invalid(ReasonRegion, "%d bytes at %d of region %d: it has %d", size, offset, id, n)
	}
	return r, nil
}

// output returns room for results that belong in a region, and what brings them there, or nil.
func (c *fastConn) output(id uint32, offset, size uint64) (room []byte, bring func(context.Context) error, err error) {
	r, err := c.inRegion(id, offset, size)
	if err != nil {
		return nil, nil, err
	}
	room, bring = r.place(c, offset, size)
	return room, bring, nil
}

// input copies bytes out of a region: the client may change them at any time.
func (c *fastConn) input(id uint32, offset, size uint64) ([]byte, error) {
	r, err := c.inRegion(id, offset, size)
	if err != nil {
		return nil, err
	}
	b := c.borrow(int(size))
	return b, r.read(c.ctx, b, offset)
}

// mapped is a region of host memory.
type mapped []byte

func (m mapped) bytes() uint64 { return uint64(len(m)) }

func (m mapped) read(_ context.Context, dst []byte, off uint64) error {
	return touching(func() { copy(dst, m[off:]) })
}

func (m mapped) place(_ *fastConn, off, n uint64) ([]byte, func(context.Context) error) {
	return m[off : off+n : off+n], nil
}

func (m mapped) close() error { return unmapRegion(m) }

// onDevice is a region of device memory.
type onDevice struct{ s *gpu.Shared }

func (d onDevice) bytes() uint64 { return uint64(d.s.Bytes()) }

func (d onDevice) read(ctx context.Context, dst []byte, off uint64) error {
	return d.s.Read(ctx, dst, int64(off))
}

func (d onDevice) place(c *fastConn, off, n uint64) ([]byte, func(context.Context) error) {
	room := c.borrow(int(n))
	return room, func(ctx context.Context) error { return d.s.Write(ctx, int64(off), room) }
}

func (d onDevice) close() error { return d.s.Close() }

// touching runs f, which touches a region's memory; should the kernel have no
// page for it, that is an error of the call. Needs debug.SetPanicOnFault.
func touching(f func()) (err error) {
	defer func() {
		if r := recover(); r != nil {
			err = invalid(ReasonRegion, "a region's memory cannot be used: %v", r)
		}
	}()
	f()
	return nil
}
