package gpu

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"

	"kvtier/tiers/gpu/cuda"
)

// fakeBank is device memory in the Go heap, and a device that fails on demand.
type fakeBank struct {
	mu     sync.Mutex
	has    int64 // bytes that are not allocated
	slabs  map[cuda.Ptr][]byte
	pinned map[*byte]int
	next   cuda.Ptr
	lost   error
	closed bool
	copies int

	fail    func(op string) error // what the next call fails with; nil if nothing
	writing func()                // called in the middle of each write
	events  chan bool             // wait receives from it
}

func newFakeBank(has int64) *fakeBank {
	return &fakeBank{has: has, slabs: map[cuda.Ptr][]byte{}, pinned: map[*byte]int{}, next: 1 << 32, events: make(chan bool)}
}

// check is for the end: everything was given back.
func (b *fakeBank) check(t *testing.T) {
	t.Helper()
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.closed || (len(b.slabs) > 0 || len(b.pinned) > 0) && b.lost == nil {
		t.Errorf("closed %v, %d slabs left, %d pinned", b.closed, len(b.slabs), len(b.pinned))
	}
}

// may is the begin of every call.
func (b *fakeBank) may(op string) error {
	if b.lost == nil && b.fail != nil {
		err := b.fail(op)
		if errors.Is(err, cuda.ErrLost) {
			b.lost = err
		}
		return err
	}
	return b.lost
}

func (b *fakeBank) alloc(bytes int) (cuda.Ptr, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if err := b.may("alloc"); err != nil {
		return 0, err
	}
	if int64(bytes) > b.has {
		return 0, fmt.Errorf("fake: %w", cuda.ErrOutOfMemory)
	}
	b.has -= int64(bytes)
	p := b.next
	b.next += cuda.Ptr(roundUp(bytes)) + 4096
	b.slabs[p] = make([]byte, bytes)
	return p, nil
}

func (b *fakeBank) free(p cuda.Ptr) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if err := b.may("free"); err != nil {
		return err
	}
	if b.slabs[p] == nil {
		return fmt.Errorf("fake: free of %#x", p)
	}
	b.has += int64(len(b.slabs[p]))
	delete(b.slabs, p)
	return nil
}

// at returns the device's bytes of a transfer.
func (b *fakeBank) at(t transfer) ([]byte, error) {
	for p, s := range b.slabs {
		if t.at >= p && t.at+cuda.Ptr(len(t.bytes)) <= p+cuda.Ptr(len(s)) {
			return s[t.at-p:][:len(t.bytes)], nil
		}
	}
	return nil, fmt.Errorf("fake: %d bytes at %#x are in no slab", len(t.bytes), t.at)
}

func (b *fakeBank) write(ctx context.Context, ts []transfer) error {
	return b.copy(ctx, "write", ts, func(device, host []byte) { copy(device, host) })
}

func (b *fakeBank) read(ctx context.Context, ts []transfer) error {
	return b.copy(ctx, "read", ts, func(device, host []byte) { copy(host, device) })
}

func (b *fakeBank) copy(ctx context.Context, op string, ts []transfer, f func(device, host []byte)) error {
	for i, t := range ts {
		if op == "write" && i == len(ts)/2 && b.writing != nil {
			b.writing()
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		b.mu.Lock()
		err := b.may(op)
		if err == nil {
			var device []byte
			if device, err = b.at(t); err == nil {
				f(device, t.bytes)
				b.copies++
			}
		}
		b.mu.Unlock()
		if err != nil {
			return err
		}
	}
	return nil
}

func (b *fakeBank) pin(mem []byte) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if err := b.may("pin"); err != nil {
		return err
	}
	if b.pinned[&mem[0]] > 0 {
		return errors.New("fake: pinned twice")
	}
	b.pinned[&mem[0]] = len(mem)
	return nil
}

func (b *fakeBank) unpin(mem []byte) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if err := b.may("unpin"); err != nil {
		return err
	}
	if b.pinned[&mem[0]] != len(mem) {
		return errors.New("fake: unpin of what is not pinned")
	}
	delete(b.pinned, &mem[0])
	return nil
}

func (b *fakeBank) wait(cuda.Event) error {
	<-b.events
	return b.err()
}

func (b *fakeBank) err() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.lost
}

func (b *fakeBank) close() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.closed = true
	return nil
}
