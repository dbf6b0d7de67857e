package gpu

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"sync"

	"kvtier/tiers"
	"kvtier/tiers/gpu/cuda"
	"kvtier/tiers/gpu/kernels"
	"kvtier/tiers/seal"
)

// Sealed is a segment that the device made, and Kept what stays there of it; nil: nothing.
type Sealed struct {
	kernels.SealedSegment
	Kept *Kept
}

// Seal makes the segments of a span's layers on the device: the same bytes as seal.Segment. The layers are alike (kernels.Sealing). It returns
// none if there are no kernels for them. What attention reads of them stays on the device, where there is room for it or colder segments can go: see Kept. If the
// device does not answer, the error is ErrStuck. An error is of the device, and of all layers. It is tiers.ErrCorrupt if what stays is not what was made.
func (t *Tier) Seal(ctx context.Context, rows []*seal.Rows, options []seal.Options) ([]Sealed, error) {
	if t.sealing == nil || len(rows) == 0 {
		return nil, nil
	}
	for i := range rows {
		if !kernels.Seals(rows[i], &options[i]) {
			return nil, nil
		}
	}
	if err := t.usable(ctx); err != nil {
		return nil, fmt.Errorf("gpu: seal: %w", err)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel() // what is left begins no more batches
	var made []Sealed
	err := t.patiently(ctx, sealPatience*t.patience, func() (err error) {
		made, err = t.sealAndKeep(ctx, rows, options)
		return err
	}, func(error) { discard(made) })
	if err != nil {
		return nil, fmt.Errorf("gpu: seal: %w", asTier(err))
	}
	return made, nil
}

func (t *Tier) sealAndKeep(ctx context.Context, rows []*seal.Rows, options []seal.Options) ([]Sealed, error) {
	var mu sync.Mutex
	kept := map[*tiers.Header]*Kept{}
	made, err := t.sealing.Seal(ctx, rows, options, func(h *tiers.Header) [][tiers.NumPlanes]cuda.Ptr {
		k := t.roomFor(h)
		if k == nil {
			return nil
		}
		mu.Lock()
		defer mu.Unlock()
		kept[h] = k
		return k.places()
	})
	if err != nil {
		for _, k := range kept { // Seal returns when nothing is under way, or the device is lost
			k.Discard()
		}
		return nil, err
	}
	out := make([]Sealed, len(made))
	for i, m := range made {
		out[i] = Sealed{m, kept[m.Header]}
	}
	for i := range out {
		if err := out[i].check(ctx); err != nil {
			discard(out)
			return nil, err
		}
	}
	return out, nil
}

// Kept is what stays on the device of a segment that was made there, for when it is stored: nobody sees it until Adopt. Its room is taken until
// Adopt or Discard. A nil Kept is nothing.
type Kept struct {
	tier   *Tier
	header *tiers.Header
	pieces []tiers.Piece // without bytes
	rooms  []room
}

// roomFor takes room for what attention reads of a segment that is to be; nil if there is none, or it is there already.
func (t *Tier) roomFor(h *tiers.Header) *Kept {
	if !t.Attends(h) {
		return nil
	}
	k := &Kept{tier: t, header: h}
	var sizes []int
	planes := kernels.Planes(false) | kernels.Planes(true)
	for head := range h.Heads {
		for p := range tiers.NumPlanes {
			if _, n, ok := h.Piece(head, p); ok && planes.Has(p) {
				k.pieces, sizes = append(k.pieces, tiers.Piece{Head: head, Plane: p}), append(sizes, n)
			}
		}
	}
	t.writes.Lock()
	defer t.writes.Unlock()
	if t.usable(background) != nil {
		return nil
	}
	t.mu.Lock()
	there := t.mu.segments[h.ID] != nil
	t.mu.Unlock()
	if there {
		return nil
	}
	var err error
	if k.rooms, err = t.reserve(h.ID, sizes); err != nil {
		return nil // it is for a Put to say
	}
	return k
}

// places returns where the pieces are to lie.
func (k *Kept) places() [][tiers.NumPlanes]cuda.Ptr {
	out := make([][tiers.NumPlanes]cuda.Ptr, len(k.header.Heads))
	for i, p := range k.pieces {
		out[p.Head][p.Plane] = k.rooms[i].ptr()
	}
	return out
}

// check compares what stays of one head, chosen at random, with what was made.
func (s *Sealed) check(ctx context.Context) error {
	if s.Kept == nil {
		return nil
	}
	head := rand.IntN(len(s.Header.Heads))
	want := map[tiers.Plane][]byte{}
	for _, p := range s.Header.Pieces(s.Parts) {
		if p.Head == head {
			want[p.Plane] = p.Bytes
		}
	}
	var planes []tiers.Plane
	var copies []transfer
	for i, p := range s.Kept.pieces {
		if p.Head == head {
			planes, copies = append(planes, p.Plane), append(copies, transfer{at: s.Kept.rooms[i].ptr(), bytes: make([]byte, len(want[p.Plane]))})
		}
	}
	if err := s.Kept.tier.bank.read(ctx, copies); err != nil {
		return err
	}
	for i, p := range planes {
		if !bytes.Equal(copies[i].bytes, want[p]) {
			return fmt.Errorf("segment %v, head %d, plane %v: not the bytes that were made lie on the device: %w", s.Header.ID, head, p, tiers.ErrCorrupt)
		}
	}
	return nil
}

// Adopt makes the segment visible, which is stored now, and says whether it is there.
func (k *Kept) Adopt() bool {
	if k == nil {
		return false
	}
	t := k.tier
	t.mu.Lock()
	defer t.mu.Unlock()
	rooms := k.rooms
	if k.rooms = nil; rooms == nil || t.mu.gone != nil {
		return false
	}
	if t.mu.segments[k.header.ID] != nil { // it came up otherwise
		t.mu.arena.release(rooms)
		return true
	}
	t.listLocked(k.header, k.pieces, rooms)
	return true
}

// Discard gives the room back, if it was not adopted.
func (k *Kept) Discard() {
	if k == nil {
		return
	}
	k.tier.mu.Lock()
	defer k.tier.mu.Unlock()
	k.tier.mu.arena.release(k.rooms)
	k.rooms = nil
}

func discard(all []Sealed) {
	for _, s := range all {
		s.Kept.Discard()
	}
}

// sealPatience is how many times as long as an answer segments are waited for: all layers of a span come together.
const sealPatience = 6
