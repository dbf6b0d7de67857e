package gpu

import (
	"context"

	"kvtier/tiers/gpu/cuda"
)

// bank is the memory of a device. A test may put another one in its place.
// Errors are cuda's.
type bank interface {
	// alloc allocates device memory, aligned to grain; cuda.ErrOutOfMemory says that there is none.
	alloc(bytes int) (cuda.Ptr, error)
	free(p cuda.Ptr) error
	// write copies to the device, read from it. They return when no copy is
	// under way any more, whether they succeed or not; ctx ends them early.
	write(ctx context.Context, ts []transfer) error
	read(ctx context.Context, ts []transfer) error
	// pin has the device copy from host memory by itself, until unpin: whole pages, mapped until then.
	pin(b []byte) error
	unpin(b []byte) error
	// wait waits until e has happened, and destroys it.
	wait(e cuda.Event) error
	// err says why the device is of no use any more, nil while it is.
	err() error
	// close gives everything back but what alloc returned.
	close() error
}

// transfer is a copy between device memory and bytes on the host.
type transfer struct {
	at     cuda.Ptr
	bytes  []byte
	pinned bool // the bytes lie in memory that the device copies from by itself
}

// split cuts transfers into batches that fit a buffer of size bytes, with every
// transfer at a multiple of grain: side by side as they are on the device,
// where rooms are multiples of grain as well.
func split(ts []transfer, size int) (batches [][]transfer) {
	var batch []transfer
	used := 0
	for _, t := range ts {
		for len(t.bytes) > 0 {
			if used == size {
				batches, batch, used = append(batches, batch), nil, 0
			}
			n := min(len(t.bytes), size-used)
			batch = append(batch, transfer{at: t.at, bytes: t.bytes[:n]})
			t = transfer{at: t.at + cuda.Ptr(n), bytes: t.bytes[n:]}
			used += roundUp(n)
		}
	}
	if batch != nil {
		batches = append(batches, batch)
	}
	return batches
}
