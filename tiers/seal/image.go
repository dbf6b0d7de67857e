package seal

import (
	"encoding/binary"
	"errors"
	"fmt"

	"kvtier/attention"
	"kvtier/compress"
	"kvtier/tiers"
)

// CheckImage reads a part of a segment's image as queries do, and says what they
// could not read. It looks at content alone: checksums are the caller's, and
// Check has found the header right. The error is tiers.ErrCorrupt.
func CheckImage(h *tiers.Header, part tiers.Part, image []byte) error {
	if int64(len(image)) != h.Bytes(part) {
		return fmt.Errorf("segment %v: part %d has %d bytes, not %d: %w", h.ID, part, len(image), h.Bytes(part), tiers.ErrCorrupt)
	}
	if part == tiers.PartLow {
		return nil // codes, of which any are codes
	}
	for i := range h.Heads {
		of := func(p tiers.Plane) []byte {
			off, n, ok := h.Piece(i, p)
			if !ok || p.Part() != part {
				return nil
			}
			return image[off : off+n]
		}
		if err := checkPlanes(h, i, of); err != nil {
			return fmt.Errorf("segment %v: head %d: %w: %w", h.ID, i, err, tiers.ErrCorrupt)
		}
	}
	return nil
}

func checkPlanes(h *tiers.Header, head int, of func(tiers.Plane) []byte) error {
	v := View{D: h.HeadDim, Info: h.Heads[head]}
	if of(tiers.PlaneWindow) != nil {
		return nil // rows as they came
	}
	if err := v.checkOrder(of(tiers.PlaneOrder), h.Tokens); err != nil {
		return err
	}
	c, err := v.Codes(of)
	if err != nil {
		return err
	}
	steps := compress.NewKeySteps(v.D)
	for g := range v.StepGroups() {
		if err := c.Steps(steps, g); err != nil {
			return err
		}
	}
	if err := v.PageMeans(new(PageMeans), of(tiers.PlanePages)); err != nil {
		return err
	}
	if _, ok := attention.ParseValueMap(of(tiers.PlaneMap), v.D); !ok {
		return errors.New("the map of values is none")
	}
	t := compress.ElementType(h.Type)
	rows := make([]byte, tiers.PageTokens*v.D*t.Size())
	for _, p := range []tiers.Plane{tiers.PlaneKX, tiers.PlaneVX} {
		b := of(p)
		for page := 0; b != nil && page < compress.ExactPages(v.Stored()); page++ {
			if err := compress.UnpackExactPage(rows, b, page, v.Stored(), v.D, t); err != nil {
				return fmt.Errorf("plane %v: %w", p, err)
			}
		}
	}
	return nil
}

// checkOrder says whether each token of the segment has one place, but for the
// sinks, which are its first.
func (v View) checkOrder(order []byte, tokens int) error {
	seen := make([]bool, tokens)
	for i := range v.Stored() {
		at := int(binary.LittleEndian.Uint16(order[2*i:]))
		if at < v.Info.Sinks || at >= tokens || seen[at] {
			return fmt.Errorf("place %d holds token %d of %d, or it has two places", i, at, tokens)
		}
		seen[at] = true
	}
	return nil
}

// piece returns a plane of a head; nil if it is not there.
func piece(h *tiers.Header, parts [tiers.NumParts][]byte, head int, p tiers.Plane) []byte {
	off, n, ok := h.Piece(head, p)
	if !ok {
		return nil
	}
	return parts[p.Part()][off : off+n]
}
