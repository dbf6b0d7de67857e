package nvme

import (
	"encoding/binary"
	"fmt"

	"kvtier/tiers"
)

// Run is consecutive blocks of an extent. Blocks is 0 if there is nothing.
type Run struct{ Extent, First, Blocks uint32 }

// Location says where the parts of a segment lie.
type Location struct {
	Parts [tiers.NumParts]Run
}

// LocationSize is the length of a marshalled Location.
const LocationSize = int(tiers.NumParts) * 12

// MarshalBinary returns LocationSize bytes: extent, first block and number of
// blocks of each part, 32 bits each, little-endian. The error is nil.
func (l Location) MarshalBinary() ([]byte, error) {
	b := make([]byte, 0, LocationSize)
	for _, r := range l.Parts {
		for _, v := range [...]uint32{r.Extent, r.First, r.Blocks} {
			b = binary.LittleEndian.AppendUint32(b, v)
		}
	}
	return b, nil
}

// UnmarshalBinary reads what MarshalBinary wrote.
func (l *Location) UnmarshalBinary(b []byte) error {
	if len(b) != LocationSize {
		return fmt.Errorf("nvme: a location of %d bytes: %w", len(b), tiers.ErrCorrupt)
	}
	for i := range l.Parts {
		l.Parts[i] = Run{binary.LittleEndian.Uint32(b), binary.LittleEndian.Uint32(b[4:]), binary.LittleEndian.Uint32(b[8:])}
		b = b[12:]
	}
	return nil
}

// Locate says where a segment lies.
func (t *Tier) Locate(id tiers.ID) (Location, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	var l Location
	s := t.mu.segments[id]
	if s == nil {
		return l, false
	}
	for p, st := range s.parts {
		if st != nil {
			l.Parts[p] = st.run
		}
	}
	return l, true
}

// Restore makes a segment known that was stored before the tier was opened. A
// location that overlaps another, or lies outside the extents, is ErrCorrupt
// and changes nothing.
func (t *Tier) Restore(id tiers.ID, l Location) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.mu.closed {
		return fmt.Errorf("nvme: restore %v: %w", id, tiers.ErrClosed)
	}
	if t.mu.segments[id] != nil {
		return fmt.Errorf("nvme: restore %v: it is here already: %w", id, tiers.ErrCorrupt)
	}
	s := &segment{}
	for p, r := range l.Parts {
		if r.Blocks == 0 {
			continue
		}
		x := t.mu.extents[r.Extent]
		if x == nil || !x.claim(r) {
			for _, st := range s.parts {
				if st != nil {
					st.extent.release(st.run)
				}
			}
			return fmt.Errorf("nvme: restore %v: part %d %s: %w", id, p, t.unfitLocked(r), tiers.ErrCorrupt)
		}
		s.parts[p] = &stored{number: t.number.Add(1), run: r, extent: x}
	}
	for _, st := range s.parts {
		if st != nil {
			t.mu.segments[id] = s
			t.mu.used += int64(st.run.Blocks) * tiers.BlockSize
			t.mu.parts++
		}
	}
	return nil
}

// unfitLocked says why a run cannot be a segment's.
func (t *Tier) unfitLocked(r Run) string {
	end := uint64(r.First) + uint64(r.Blocks)
	at := fmt.Sprintf("lies in blocks %d to %d of %s", r.First, end, ExtentName(r.Extent))
	x := t.mu.extents[r.Extent]
	switch {
	case x == nil:
		return at + ", which is missing"
	case end > uint64(x.blocks):
		return fmt.Sprintf("%s, which has only %d", at, x.blocks)
	}
	for id, s := range t.mu.segments {
		for _, st := range s.parts {
			if st != nil && st.extent == x && uint64(st.run.First) < end && uint64(r.First) < uint64(st.run.First)+uint64(st.run.Blocks) {
				return fmt.Sprintf("%s, where segment %v lies", at, id)
			}
		}
	}
	return at + ", where its other part lies"
}
