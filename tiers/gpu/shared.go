package gpu

import (
	"context"
	"fmt"

	"kvtier/tiers/gpu/cuda"
)

// Shared is device memory of another process on the same GPU, which it allocated and handed over by a CUDA IPC handle.
type Shared struct {
	tier *Tier
	at   cuda.Ptr
	n    int64
}

// OpenShared opens the first n bytes of an allocation of another process, until Close. An allocation that is shorter is an error. The other process frees it
// only after that.
func (t *Tier) OpenShared(ctx context.Context, h cuda.Handle, n int64) (*Shared, error) {
	if t.dev == nil {
		return nil, fmt.Errorf("gpu: shared memory: %w", cuda.ErrNoDevice)
	}
	s := &Shared{tier: t, n: n}
	err := t.dev.Do(ctx, func(c *cuda.Context) (err error) {
		if s.at, err = c.OpenMemHandle(h); err != nil {
			return err
		}
		has, err := c.AllocationBytes(s.at)
		if err == nil && has < n {
			err = fmt.Errorf("%d bytes wanted of an allocation of %d", n, has)
		}
		if err != nil {
			_ = c.CloseMemHandle(s.at) // err says more
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("gpu: shared memory: %w", asTier(err))
	}
	return s, nil
}

// Bytes returns how many bytes are shared.
func (s *Shared) Bytes() int64 { return s.n }

// Read copies bytes from off on to dst; the caller has checked that they lie inside.
func (s *Shared) Read(ctx context.Context, dst []byte, off int64) error {
	return s.copied(s.tier.bank.read(ctx, []transfer{{at: s.at + cuda.Ptr(off), bytes: dst}}))
}

// Write copies src to where the bytes from off on lie. They are there when it returns.
func (s *Shared) Write(ctx context.Context, off int64, src []byte) error {
	return s.copied(s.tier.bank.write(ctx, []transfer{{at: s.at + cuda.Ptr(off), bytes: src}}))
}

func (s *Shared) copied(err error) error {
	if err != nil {
		return fmt.Errorf("gpu: copy of shared memory: %w", asTier(err))
	}
	return nil
}

// Close gives the memory up. No copy may be under way.
func (s *Shared) Close() error {
	err := s.tier.dev.Do(background, func(c *cuda.Context) error { return c.CloseMemHandle(s.at) })
	if err = asTier(err); err != nil {
		return fmt.Errorf("gpu: close shared memory: %w", err)
	}
	return nil
}
