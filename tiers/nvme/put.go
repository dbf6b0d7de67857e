package nvme

import (
	"context"
	"fmt"
	"io"

	"kvtier/tiers"
)

// Put stores parts of a segment, all or none. A part is stored whole: with one
// of its pieces all have to be given, unless it is held already. The low part
// may come later, but not before the main part.
func (t *Tier) Put(ctx context.Context, h *tiers.Header, pieces []tiers.Piece) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("nvme: put %v: %w", h.ID, err)
	}
	if err := t.begin(); err != nil {
		return fmt.Errorf("nvme: put %v: %w", h.ID, err)
	}
	defer t.ops.Done()
	if err := t.put(ctx, h, pieces); err != nil {
		return fmt.Errorf("nvme: put %v: %w", h.ID, err)
	}
	return nil
}

func (t *Tier) put(ctx context.Context, h *tiers.Header, pieces []tiers.Piece) error {
	var given [tiers.NumParts]tiers.PlaneSet
	for _, p := range pieces {
		if _, n, ok := h.Piece(p.Head, p.Plane); !ok || n != len(p.Bytes) {
			return fmt.Errorf("head %d, %v: %d bytes, the header says %d: %w", p.Head, p.Plane, len(p.Bytes), n, tiers.ErrCorrupt)
		}
		given[p.Plane.Part()] |= 1 << p.Plane
	}
	for {
		if done, err := t.putOnce(ctx, h, pieces, given); done || err != nil {
			return err
		}
	}
}

// putOnce writes the given parts that are not held and makes them known. It is
// not done, and keeps nothing, if a part that it relied on was dropped meanwhile.
func (t *Tier) putOnce(ctx context.Context, h *tiers.Header, pieces []tiers.Piece, given [tiers.NumParts]tiers.PlaneSet) (done bool, err error) {
	here := t.here(h.ID)
	if given[tiers.PartMain] == 0 && given[tiers.PartLow] != 0 && !here[tiers.PartMain] && !here[tiers.PartLow] {
		return false, fmt.Errorf("the low part without the main part: %w", tiers.ErrNotFound)
	}
	var written [tiers.NumParts]*stored
	for p := range written {
		if part := tiers.Part(p); given[p] != 0 && !here[p] && err == nil {
			written[p], err = t.write(ctx, h, part, pieces)
		}
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if err == nil && t.wholeLocked(h.ID, given, written) {
		t.insertLocked(h.ID, given, written)
		return true, nil
	}
	for _, st := range written {
		if st != nil {
			t.freeLocked(st)
		}
	}
	return false, err
}

// wholeLocked says whether every given part is written or held, and the main part with a low part that was written.
func (t *Tier) wholeLocked(id tiers.ID, given [tiers.NumParts]tiers.PlaneSet, written [tiers.NumParts]*stored) bool {
	var held [tiers.NumParts]*stored
	if s := t.mu.segments[id]; s != nil {
		held = s.parts
	}
	for p := range given {
		if given[p] != 0 && written[p] == nil && held[p] == nil {
			return false
		}
	}
	low := written[tiers.PartLow] != nil && held[tiers.PartLow] == nil
	return !low || written[tiers.PartMain] != nil || held[tiers.PartMain] != nil
}

// here says which parts of a segment are held.
func (t *Tier) here(id tiers.ID) (here [tiers.NumParts]bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if s := t.mu.segments[id]; s != nil {
		for p := range here {
			here[p] = s.parts[p] != nil
		}
	}
	return here
}

// insertLocked makes written parts known, and planes that were hidden seen again.
func (t *Tier) insertLocked(id tiers.ID, given [tiers.NumParts]tiers.PlaneSet, written [tiers.NumParts]*stored) {
	s := t.mu.segments[id]
	if s == nil {
		s = &segment{}
	}
	for p, st := range written {
		if st != nil {
			st.extent.dirty = true
			t.written.Add(int64(st.run.Blocks) * tiers.BlockSize)
			if s.parts[p] != nil { // another Put of the same was faster
				t.freeLocked(st)
			} else {
				s.parts[p] = st
				t.mu.parts++
			}
		}
		if s.parts[p] != nil {
			t.mu.segments[id] = s
			s.hidden &^= given[p]
		}
	}
}

// write builds the image of a part, verifies it, and writes it to a run of its own.
func (t *Tier) write(ctx context.Context, h *tiers.Header, part tiers.Part, pieces []tiers.Piece) (*stored, error) {
	buf := newBuffer(int(h.Bytes(part)))
	defer buf.free()
	clear(buf.bytes)
	for _, p := range pieces {
		if p.Plane.Part() == part {
			off, _, _ := h.Piece(p.Head, p.Plane)
			copy(buf.bytes[off:], p.Bytes)
		}
	}
	if err := h.CheckBlocks(part, 0, buf.bytes); err != nil {
		return nil, fmt.Errorf("the pieces are not the whole part, or not of this segment: %w", err)
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	st, err := t.alloc(uint32(h.Blocks(part)))
	if err != nil {
		return nil, err
	}
	n, err := st.extent.file.WriteAt(buf.bytes, int64(st.run.First)*tiers.BlockSize)
	if err == nil && n < len(buf.bytes) {
		err = io.ErrShortWrite
	}
	if err != nil {
		t.mu.Lock()
		t.freeLocked(st)
		t.mu.Unlock()
		return nil, fullOr(fmt.Errorf("write %s: %w", ExtentName(st.run.Extent), err))
	}
	return st, nil
}
