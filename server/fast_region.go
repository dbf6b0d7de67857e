package server

import (
	"encoding/binary"

	"google.golang.org/grpc/codes"
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
	id, size := binary.LittleEndian.Uint32(body), binary.LittleEndian.Uint64(body[4:])
	switch {
	case id == 0:
		return invalid(ReasonRegion, "region id 0 means inline: choose another")
	case c.regions[id] != nil:
		return invalid(ReasonRegion, "region %d is in use: give it up with UNREGION first", id)
	case len(c.regions) == maxRegions:
		return invalid(ReasonRegion, "a connection has at most %d regions: give one up with UNREGION first", maxRegions)
	case size == 0 || size > maxRegion:
		return invalid(ReasonRegion, "a region of %d bytes: 1 to %d", size, maxRegion)
	}
	b, err := mapRegion(fd, int64(size))
	if err != nil {
		return err
	}
	c.regions[id] = b
	return nil
}

func (c *fastConn) dropRegion(id uint32) error {
	b, err := c.region(id)
	if err != nil {
		return err
	}
	delete(c.regions, id)
	return unmapRegion(b)
}

func (c *fastConn) region(id uint32) ([]byte, error) {
	if b := c.regions[id]; b != nil {
		return b, nil
	}
	return nil, fail(codes.NotFound, ReasonUnknown, "no region %d on this connection: send it with REGION first", id)
}

// output returns bytes of a region, for results.
func (c *fastConn) output(id uint32, offset, size uint64) ([]byte, error) {
	b, err := c.region(id)
	if err != nil {
		return nil, err
	}
	n := uint64(len(b))
	switch {
	case offset%regionStep != 0:
		return nil, invalid(ReasonRegion, "offset %d in region %d is not a multiple of %d", offset, id, regionStep)
	case offset > n || size > n-offset:
		return nil, invalid(ReasonRegion, "%d bytes at %d of region %d: it has %d", size, offset, id, n)
	}
	return b[offset : offset+size : offset+size], nil
}

// input copies bytes out of a region: the client may change them at any time.
func (c *fastConn) input(id uint32, offset, size uint64) ([]byte, error) {
	from, err := c.output(id, offset, size)
	if err != nil {
		return nil, err
	}
	b := c.borrow(len(from))
	return b, touching(func() { copy(b, from) })
}

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
