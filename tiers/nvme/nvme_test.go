package nvme

import (
	"fmt"
	"testing"

	"kvtier/tiers"
	"kvtier/tiers/tiertest"
)

// breakable is a tier whose stored bytes the suite can change.
type breakable struct{ *Tier }

func (b breakable) Corrupt(h *tiers.Header, head int, p tiers.Plane) error {
	l, ok := b.Locate(h.ID)
	off, n, has := h.Piece(head, p)
	if !ok || !has {
		return fmt.Errorf("no piece %d, %v", head, p)
	}
	r := l.Parts[p.Part()]
	return b.flip(r, off+n/2)
}

// flip changes one bit, off bytes into a run.
func (b breakable) flip(r Run, off int) error {
	buf := newBuffer(tiers.BlockSize)
	defer buf.free()
	f := b.mu.extents[r.Extent].file
	at := int64(int(r.First)+off/tiers.BlockSize) * tiers.BlockSize
	if _, err := f.ReadAt(buf.bytes, at); err != nil {
		return err
	}
	buf.bytes[off%tiers.BlockSize] ^= 16
	_, err := f.WriteAt(buf.bytes, at)
	return err
}

func TestTier(t *testing.T) {
	tiertest.Run(t, func(t *testing.T, limit int64) tiers.Tier {
		tier, err := Open(t.TempDir(), Options{Bytes: limit, ExtentBytes: limit / 3})
		if err != nil {
			t.Fatal(err)
		}
		return breakable{tier}
	})
}
