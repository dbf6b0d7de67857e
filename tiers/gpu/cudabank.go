package gpu

import (
	"context"
	"errors"
	"slices"

	"kvtier/tiers/gpu/cuda"
)

// Pinned memory that the tier copies through: lanes of buffers of so many bytes.
const (
	bufferBytes = 2 << 20
	laneBuffers = 2
)

// cudaBank is the memory of a real device.
type cudaBank struct {
	dev      *cuda.Device
	up, down chan *lane // hold the lane that copies in this direction while it is idle
}

// lane is a stream of copies and the pinned buffers at its end.
type lane struct {
	stream  cuda.Stream
	buffers [laneBuffers]struct {
		bytes []byte
		done  cuda.Event // its newest copy
	}
	settled cuda.Event // all its copies
}

// background is for what has to come to its end, whoever lost interest.
var background = context.Background()

func newCUDABank(dev *cuda.Device) (*cudaBank, error) {
	b := &cudaBank{dev: dev, up: make(chan *lane, 1), down: make(chan *lane, 1)}
	err := dev.Do(background, func(c *cuda.Context) error {
		for _, to := range []chan *lane{b.up, b.down} {
			l, err := newLane(c)
			if err != nil {
				return errors.Join(err, l.free(c))
			}
			to <- l
		}
		return nil
	})
	if err != nil {
		return nil, errors.Join(err, b.close())
	}
	return b, nil
}

func newLane(c *cuda.Context) (l *lane, err error) {
	l = &lane{}
	if l.stream, err = c.NewStream(); err != nil {
		return l, err
	}
	if l.settled, err = c.NewEvent(false); err != nil {
		return l, err
	}
	for i := range l.buffers {
		if l.buffers[i].done, err = c.NewEvent(false); err != nil {
			return l, err
		}
		if l.buffers[i].bytes, err = c.HostAlloc(bufferBytes); err != nil {
			return l, err
		}
	}
	return l, nil
}

// free gives back what a lane has, as far as it came.
func (l *lane) free(c *cuda.Context) (err error) {
	var none lane
	for _, b := range l.buffers {
		if b.bytes != nil {
			err = errors.Join(err, c.HostFree(b.bytes))
		}
		if b.done != none.settled {
			err = errors.Join(err, b.done.Destroy())
		}
	}
	if l.settled != none.settled {
		err = errors.Join(err, l.settled.Destroy())
	}
	if l.stream != none.stream {
		err = errors.Join(err, l.stream.Destroy())
	}
	return err
}

func (b *cudaBank) alloc(bytes int) (p cuda.Ptr, err error) {
	err = b.dev.Do(background, func(c *cuda.Context) error {
		p, err = c.Alloc(bytes)
		return err
	})
	return p, err
}

func (b *cudaBank) free(p cuda.Ptr) error {
	return b.dev.Do(background, func(c *cuda.Context) error { return c.Free(p) })
}

func (b *cudaBank) pin(mem []byte) error {
	return b.dev.Aside(func(c *cuda.Context) error { return c.HostRegister(mem) })
}

func (b *cudaBank) unpin(mem []byte) error {
	return b.dev.Aside(func(c *cuda.Context) error { return c.HostUnregister(mem) })
}

// atOnce is how many copies are issued in one turn: others wait for theirs meanwhile, a microsecond a copy or two.
const atOnce = 16

// partition tells transfers of pinned memory from the others.
func partition(ts []transfer) (pinned, other []transfer) {
	for _, t := range ts {
		if t.pinned {
			pinned = append(pinned, t)
		} else {
			other = append(other, t)
		}
	}
	return pinned, other
}

// write has the device copy what lies in pinned memory. Of the rest it fills one buffer while the device copies from another.
func (b *cudaBank) write(ctx context.Context, ts []transfer) (err error) {
	l, err := acquire(ctx, b.up)
	if err != nil {
		return err
	}
	defer func() {
		err = errors.Join(err, b.settle(l))
		b.up <- l
	}()
	direct, ts := partition(ts)
	for some := range slices.Chunk(direct, atOnce) {
		err := b.dev.Do(ctx, func(c *cuda.Context) error {
			for _, t := range some {
				if err := c.CopyToDevice(t.at, t.bytes, l.stream); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	for i, batch := range split(ts, bufferBytes) {
		buffer := l.buffers[i%laneBuffers]
		if err := b.dev.Wait(ctx, buffer.done); err != nil {
			return err
		}
		runs := pack(buffer.bytes, batch)
		err := b.dev.Do(ctx, func(c *cuda.Context) error {
			for _, r := range runs {
				if err := c.CopyToDevice(r.at, r.bytes, l.stream); err != nil {
					return err
				}
			}
			return buffer.done.Record(l.stream)
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// pack copies a batch into a buffer and returns the runs of it that are neighbours on the device as well.
func pack(buffer []byte, batch []transfer) (runs []transfer) {
	from, off := 0, 0 // of the buffer: where the last run begins, where the next transfer lies
	for i, t := range batch {
		if i == 0 || t.at != runs[len(runs)-1].at+cuda.Ptr(off-from) {
			runs = append(runs, transfer{at: t.at})
			from = off
		}
		end := off + copy(buffer[off:], t.bytes)
		runs[len(runs)-1].bytes = buffer[from:end]
		off = roundUp(end)
	}
	return runs
}

// read is for the few that cannot attend on the device: one buffer after the other.
func (b *cudaBank) read(ctx context.Context, ts []transfer) (err error) {
	l, err := acquire(ctx, b.down)
	if err != nil {
		return err
	}
	defer func() {
		err = errors.Join(err, b.settle(l))
		b.down <- l
	}()
	buffer := l.buffers[0]
	for _, batch := range split(ts, bufferBytes) {
		err := b.dev.Do(ctx, func(c *cuda.Context) error {
			off := 0
			for _, t := range batch {
				n := len(t.bytes)
				if err := c.CopyToHost(buffer.bytes[off:off+n], t.at, l.stream); err != nil {
					return err
				}
				off += roundUp(n)
			}
			return buffer.done.Record(l.stream)
		})
		if err != nil {
			return err
		}
		if err := b.dev.Wait(ctx, buffer.done); err != nil {
			return err
		}
		off := 0
		for _, t := range batch {
			copy(t.bytes, buffer.bytes[off:])
			off += roundUp(len(t.bytes))
		}
	}
	return nil
}

// acquire takes a lane for oneself.
func acquire(ctx context.Context, from chan *lane) (*lane, error) {
	select {
	case l := <-from:
		return l, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// settle waits until no copy of the lane is under way, also after one that failed.
func (b *cudaBank) settle(l *lane) error {
	if err := b.dev.Do(background, func(*cuda.Context) error { return l.settled.Record(l.stream) }); err != nil {
		return err
	}
	return b.dev.Wait(background, l.settled)
}

func (b *cudaBank) wait(e cuda.Event) error {
	err := b.dev.Wait(background, e)
	_ = b.dev.Do(background, func(*cuda.Context) error { return e.Destroy() })
	return err
}

func (b *cudaBank) err() error { return b.dev.Err() }

// close ends the device. Of one that is lost nothing can be given back.
func (b *cudaBank) close() error {
	err := b.dev.Do(background, func(c *cuda.Context) (err error) {
		for _, from := range []chan *lane{b.up, b.down} {
			select {
			case l := <-from:
				err = errors.Join(err, l.free(c))
			default: // it was never made
			}
		}
		return err
	})
	if errors.Is(err, cuda.ErrLost) {
		err = nil
	}
	return errors.Join(err, b.dev.Close())
}
