package gpu

import (
	"errors"
	"fmt"

	"kvtier/tiers"
	"kvtier/tiers/gpu/cuda"
)

// GiveUp ends a tier whose device is not trusted any more, and why is the reason: it holds nothing, its device memory is given
// back, and whatever is asked of it is tiers.ErrLost. Only memory of other processes (see Shared) is still copied, until Close: it
// is theirs. Leases must have been released. If the device does not answer, the error is ErrStuck, and its memory is given back when it does.
func (t *Tier) GiveUp(why error) error {
	if !t.end(fmt.Errorf("%w: %w", tiers.ErrLost, why)) {
		return nil
	}
	if _, err := within(background, t.patience, t.empty); err != nil {
		return fmt.Errorf("gpu: give up: %w", err)
	}
	return nil
}

// Close gives all device memory back and closes the device. Leases must have
// been released; it waits for those that were abandoned. If the device does not answer, the error is ErrStuck, and its memory goes with
// the process, or when it answers.
func (t *Tier) Close() error {
	if !t.end(tiers.ErrClosed) {
		return nil
	}
	_, err := within(background, t.patience, func() error { return errors.Join(t.empty(), t.bank.close()) })
	if err != nil {
		return fmt.Errorf("gpu: close: %w", err)
	}
	return nil
}

// end lets nothing begin any more, for the reason why; false if it came to that before: to this end, or to a later one.
func (t *Tier) end(why error) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if errors.Is(t.mu.gone, tiers.ErrClosed) || t.mu.gone != nil && !errors.Is(why, tiers.ErrClosed) {
		return false
	}
	t.mu.gone = why
	return true
}

// empty gives back what pieces and kernels take. Nothing new begins; it waits for what is under way.
func (t *Tier) empty() error {
	t.settled()     // first: a Put that was left may wait for writes
	t.writes.Lock() // no Put is under way, and none will be
	t.mu.Lock()
	slabs := t.mu.arena.slabs
	clear(t.mu.segments)
	t.mu.ranking = nil
	t.mu.arena.slabs, t.mu.arena.mapped, t.mu.pieces = nil, 0, 0
	t.mu.Unlock()
	t.writes.Unlock() // before a Seal is waited for, which asks for room
	t.reads.Lock()    // no Pin is under way, and none will be
	defer t.reads.Unlock()
	t.abandoned.Wait()
	errs := []error{t.pinned.end(t.bank)}
	if t.attender != nil {
		if err := t.attender.close(); err != nil && !errors.Is(err, cuda.ErrLost) {
			errs = append(errs, err)
		}
	}
	if t.sealing != nil {
		if err := t.sealing.Close(background); err != nil {
			errs = append(errs, err)
		}
	}
	for _, s := range slabs {
		if err := t.bank.free(s.ptr); err != nil && !errors.Is(err, cuda.ErrLost) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}
