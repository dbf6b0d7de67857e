package nvme

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"syscall"

	"kvtier/tiers"
	"kvtier/tiers/files"
)

// alloc takes n blocks, making an extent if none has them.
func (t *Tier) alloc(n uint32) (*stored, error) {
	t.mu.Lock()
	st := t.allocLocked(n)
	t.mu.Unlock()
	if st != nil {
		return st, nil
	}
	t.grow.Lock()
	defer t.grow.Unlock()
	need := int64(n) * tiers.BlockSize
	stays := t.shrink(need) // why, if any extent does that was to go: there may be room all the same
	t.mu.Lock()
	st = t.allocLocked(n) // somebody else may have made an extent or freed blocks
	number, room := t.mu.next, (t.o.Bytes-t.mu.files)/tiers.BlockSize*tiers.BlockSize
	t.mu.Unlock()
	if st != nil {
		return st, nil
	}
	if room < need {
		return nil, errors.Join(fmt.Errorf("%d blocks in one run, of a limit of %d bytes: %w", n, t.o.Bytes, tiers.ErrFull), stays)
	}
	x, err := t.create(number, need, min(max(t.o.ExtentBytes, need), room))
	if err != nil {
		return nil, err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.addLocked(x)
	return t.allocLocked(n), nil // files are within the limit, and so is what lies in them
}

// allocLocked takes the first free run of n blocks, nil if there is none.
func (t *Tier) allocLocked(n uint32) *stored {
	if t.mu.files > t.o.Bytes {
		return nil // the limit was lowered since the extents were made
	}
	for _, x := range t.mu.order {
		if r, ok := x.alloc(n); ok {
			t.mu.used += int64(n) * tiers.BlockSize
			return &stored{number: t.number.Add(1), run: r, extent: x}
		}
	}
	return nil
}

// What extents leave free of the file system, for the catalogue and the logs of
// tails: the catalogue can commit nothing without some MiB, not even removals,
// and what lies in extents does not come back to the file system. Of a small one
// it is a quarter, but enough for the catalogue.
const (
	mostReserve  = 64 << 20
	leastReserve = 16 << 20
)

// within returns how much of size an extent may take of the file system: with
// less than need left it is full.
func (t *Tier) within(need, size int64) (int64, error) {
	free, err := t.fs.Free(t.dir)
	if err != nil {
		return size, nil // it does not know: a full disk shows when room is allocated
	}
	reserve := min(max((free+t.FileBytes())/4, leastReserve), mostReserve)
	left := max(free-reserve, 0) / tiers.BlockSize * tiers.BlockSize
	if left < need {
		return 0, fmt.Errorf("the file system of %s has %d bytes left, of which %d are kept free, an extent needs %d: %w", t.dir, free, reserve, need, tiers.ErrFull)
	}
	return min(size, left), nil
}

// create makes an extent of size bytes, or of fewer but at least need if the
// disk has no more. t.grow is held.
func (t *Tier) create(number uint32, need, size int64) (*extent, error) {
	size, err := t.within(need, size)
	if err != nil {
		return nil, err
	}
	for {
		name := filepath.Join(t.dir, ExtentName(number))
		f, err := t.fs.Open(name, files.Create|files.Direct)
		if errors.Is(err, fs.ErrExist) { // it could not be removed when it was not to be
			number++
			continue
		}
		if err != nil {
			return nil, fullOr(fmt.Errorf("make %s: %w", name, err))
		}
		if err = f.Allocate(size); err == nil {
			if err = t.fs.SyncDir(t.dir); err == nil {
				return newExtent(number, f, size), nil
			}
		}
		err = fullOr(errors.Join(fmt.Errorf("allocate %d bytes for %s: %w", size, name, err), f.Close(), t.fs.Remove(name)))
		if !errors.Is(err, tiers.ErrFull) || size == need {
			return nil, err
		}
		size = max(size/2/tiers.BlockSize*tiers.BlockSize, need)
	}
}

// shrink removes empty extents, the last first, where the files are over the
// limit (it was lowered), or where that makes room for a longer extent. One that
// cannot be removed keeps no others. t.grow is held.
func (t *Tier) shrink(need int64) error {
	var errs []error
	tried := map[*extent]bool{}
	for {
		x := t.unlist(need, tried)
		if x == nil {
			return errors.Join(errs...)
		}
		tried[x] = true
		t.syncing.Lock() // Sync may be using the file
		err := t.remove(x)
		t.syncing.Unlock()
		if err != nil {
			errs = append(errs, fmt.Errorf("remove %s: %w", ExtentName(x.number), err))
		}
	}
}

// unlist takes the last empty extent that was not tried from the lists, if one has to go and that helps.
func (t *Tier) unlist(need int64, tried map[*extent]bool) *extent {
	t.mu.Lock()
	defer t.mu.Unlock()
	over, empty, last := t.mu.files+need-t.o.Bytes, int64(0), -1
	for i, x := range t.mu.order {
		if x.empty() && !tried[x] {
			empty, last = empty+x.bytes(), i
		}
	}
	if over <= 0 || last < 0 || empty < over && t.mu.files <= t.o.Bytes {
		return nil
	}
	x := t.mu.order[last]
	t.mu.order = slices.Delete(t.mu.order, last, last+1)
	delete(t.mu.extents, x.number)
	return x
}

// remove removes an extent that is not listed. If that fails, it is listed again. t.grow and t.syncing are held.
func (t *Tier) remove(x *extent) error {
	err := t.fs.Remove(filepath.Join(t.dir, ExtentName(x.number)))
	if errors.Is(err, fs.ErrNotExist) {
		err = nil // nothing must be put where there is no name
	}
	listAgain := err != nil
	if !listAgain {
		err = x.file.Close()
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.mu.files -= x.bytes() // not before the disk has it back
	if listAgain {
		t.addLocked(x)
	}
	return err
}

// fullOr marks an error that says that the disk or quota is full as ErrFull.
func fullOr(err error) error {
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return fmt.Errorf("%w: %w", tiers.ErrFull, err)
	}
	return err
}

// freeLocked gives a run back.
func (t *Tier) freeLocked(st *stored) {
	st.extent.release(st.run)
	t.mu.used -= int64(st.run.Blocks) * tiers.BlockSize
}

// dropLocked frees a run now, or with the last read of it.
func (t *Tier) dropLocked(st *stored) {
	t.mu.parts--
	st.dead = true
	if st.refs == 0 {
		t.freeLocked(st)
	}
}

// Drop forgets planes of a segment. Commit the removal before; see the package
// documentation.
func (t *Tier) Drop(id tiers.ID, planes tiers.PlaneSet) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.mu.closed {
		return fmt.Errorf("nvme: drop %v: %w", id, tiers.ErrClosed)
	}
	s := t.mu.segments[id]
	if s == nil {
		return nil
	}
	s.hidden |= planes & tiers.AllPlanes
	left := false
	for p := range s.parts {
		if of := planesOf(tiers.Part(p)); s.hidden&of == of {
			if s.parts[p] != nil {
				t.dropLocked(s.parts[p])
				s.parts[p] = nil
			}
			s.hidden &^= of
		}
		left = left || s.parts[p] != nil
	}
	if !left {
		delete(t.mu.segments, id)
	}
	return nil
}

func planesOf(p tiers.Part) tiers.PlaneSet {
	if p == tiers.PartLow {
		return tiers.LowPlanes
	}
	return tiers.AllPlanes &^ tiers.LowPlanes
}

// Sync makes durable what was put before it was called.
func (t *Tier) Sync(ctx context.Context) error {
	if err := t.begin(); err != nil {
		return fmt.Errorf("nvme: sync: %w", err)
	}
	defer t.ops.Done()
	// One at a time: a second caller must not find an extent clean that the
	// first has not finished.
	t.syncing.Lock()
	defer t.syncing.Unlock()
	var dirty []*extent
	t.mu.Lock()
	for _, x := range t.mu.order {
		if x.dirty {
			dirty = append(dirty, x)
			x.dirty = false
		}
	}
	t.mu.Unlock()
	for i, x := range dirty {
		err := ctx.Err()
		if err == nil {
			err = x.file.Sync()
		}
		if err != nil {
			t.mu.Lock()
			for _, x := range dirty[i:] {
				x.dirty = true
			}
			t.mu.Unlock()
			return fmt.Errorf("nvme: sync %s: %w", ExtentName(x.number), err)
		}
	}
	return nil
}
