package gpu

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// Whatever asks the device of something may wait for it without end, in the driver, too. So each call does it in a goroutine that
// it leaves when its patience ends. What was left goes on until the device has done it, and keeps what it uses: nothing else is asked meanwhile.

// ErrStuck says that the device has not answered in time. Nothing more is asked of it until it has.
var ErrStuck = errors.New("the device does not answer")

// stuck is ErrStuck while something goes on that was left.
func (t *Tier) stuck() error {
	if t.late.Load() > 0 {
		return ErrStuck
	}
	return nil
}

// patiently runs f, and leaves it if it is not done when d is over (ErrStuck) or ctx ends. What it left is followed by after, if that is not nil.
func (t *Tier) patiently(ctx context.Context, d time.Duration, f func() error, after func(error)) error {
	left, err := within(ctx, d, f)
	if left == nil {
		return err
	}
	t.late.Add(1)
	go func() {
		err := <-left
		if after != nil {
			after(err)
		}
		t.late.Add(-1)
	}()
	return err
}

// within runs f. If it is not done when d is over or ctx ends, left receives what f returns.
func within(ctx context.Context, d time.Duration, f func() error) (left <-chan error, err error) {
	done := make(chan error, 1)
	go func() { done <- f() }()
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case err := <-done:
		return nil, err
	case <-timer.C:
		return done, fmt.Errorf("%w: nothing came in %v", ErrStuck, d)
	case <-ctx.Done():
		return done, ctx.Err()
	}
}

// settled waits until nothing goes on that was left.
func (t *Tier) settled() {
	for t.late.Load() > 0 {
		time.Sleep(time.Millisecond)
	}
}
