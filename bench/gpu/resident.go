package gpu

import (
	"context"
	"errors"

	"kvtier/server/sparse"
	"kvtier/tiers"
	"kvtier/tiers/gpu/cuda"
	"kvtier/tiers/gpu/kernels"
)

// resident is copies of segments in device memory, without a tier around them.
type resident struct {
	device *cuda.Device
	held   []cuda.Ptr
}

// upload copies what attention needs of a segment to memory of its own.
func (r *resident) upload(ctx context.Context, s sparse.Segment, pieces []tiers.Piece) (kernels.Segment, error) {
	planes := kernels.Planes(s.Low)
	at := map[[2]int]int{}
	size := 0
	for _, p := range pieces {
		if planes.Has(p.Plane) {
			at[[2]int{p.Head, int(p.Plane)}] = size
			size += (len(p.Bytes) + 255) &^ 255
		}
	}
	var base cuda.Ptr
	err := r.device.Do(ctx, func(c *cuda.Context) (err error) {
		pinned, err := c.HostAlloc(size)
		if err != nil {
			return err
		}
		clear(pinned)
		for _, p := range pieces {
			if off, ok := at[[2]int{p.Head, int(p.Plane)}]; ok {
				copy(pinned[off:], p.Bytes)
			}
		}
		stream, err := c.NewStream()
		if err != nil {
			return errors.Join(err, c.HostFree(pinned))
		}
		if base, err = c.Alloc(size); err == nil {
			r.held = append(r.held, base)
			if err = c.CopyToDevice(base, pinned, stream); err == nil {
				err = stream.Synchronize()
			}
		}
		return errors.Join(err, stream.Destroy(), c.HostFree(pinned))
	})
	return kernels.Segment{Header: s.Header, Low: s.Low, At: func(head int, p tiers.Plane) kernels.Address {
		if off, ok := at[[2]int{head, int(p)}]; ok {
			return uint64(base) + uint64(off)
		}
		return 0
	}}, err
}

// free gives the memory back. Nothing may be reading it.
func (r *resident) free(ctx context.Context) error {
	return r.device.Do(ctx, func(c *cuda.Context) (err error) {
		for _, p := range r.held {
			err = errors.Join(err, c.Free(p))
		}
		r.held = nil
		return err
	})
}
