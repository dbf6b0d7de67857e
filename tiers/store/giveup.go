package store

import (
	"context"
	"errors"
	"fmt"

	"kvtier/tiers"
)

// What an audit does that finds an answer of the GPU wrong: it stops the device, compares what lies there with what lies on disk, and gives it up.

// StopDevice lets the GPU answer nothing any more. Answers that are under way are not used.
func (s *Store) StopDevice() {
	d := s.device
	d.mu.Lock()
	defer d.mu.Unlock()
	d.mu.stopped = true
	d.mu.lost = true // who calls says it better
}

// GiveUpDevice ends the GPU tier, for the reason why, when answers under way have ended: from now on all is served from RAM and NVMe. It
// stays so until the store is opened anew.
func (s *Store) GiveUpDevice(why error) error {
	s.StopDevice()
	s.device.answers.Wait()
	return s.device.tier.GiveUp(why)
}

// CheckDevice compares what the GPU holds of segments, as far as it still does, with the bytes on disk, whose checksums are verified. It
// returns how many bytes are the same. The error is tiers.ErrCorrupt if one is not, and names the first.
func (s *Store) CheckDevice(ctx context.Context, headers []*tiers.Header) (same int64, err error) {
	for _, h := range headers {
		n, err := s.checkOnDevice(ctx, h)
		if same += n; err != nil {
			return same, err
		}
	}
	return same, nil
}

func (s *Store) checkOnDevice(ctx context.Context, h *tiers.Header) (same int64, err error) {
	reqs := s.forDevice(h)
	got, err := s.device.tier.Pin(ctx, reqs)
	if err != nil {
		return 0, fmt.Errorf("read segment %v back from the GPU: %w", h.ID, err)
	}
	defer releaseAll(got)
	want, _, err := s.Disk().Pin(ctx, reqs)
	if errors.Is(err, tiers.ErrCorrupt) { // it says nothing of the GPU
		return 0, fmt.Errorf("segment %v cannot be compared: %s", h.ID, err.Error())
	}
	if err != nil {
		return 0, fmt.Errorf("segment %v cannot be compared: %w", h.ID, err)
	}
	defer releaseAll(want)
	for i, r := range reqs {
		if !got[i].Held() {
			continue // it made room for others
		}
		there := got[i].Ranges[0]
		for at, b := range want[i].Ranges[0] {
			if there[at] != b {
				return same, fmt.Errorf("segment %v, head %d, plane %v: byte %d is %#02x in device memory, not %#02x: %w", h.ID, r.Head, r.Plane, at, there[at], b, tiers.ErrCorrupt)
			}
			same++
		}
	}
	return same, nil
}

// begin counts an answer that begins, unless none may.
func (d *device) begin() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.mu.stopped {
		d.answers.Add(1)
	}
	return !d.mu.stopped
}

func (d *device) stopped() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.mu.stopped
}

// Disk reads segments from NVMe alone, whatever lies in RAM: every block is checked against its checksum. Nothing is brought up for that.
type Disk struct{ s *Store }

// Disk returns the store's.
func (s *Store) Disk() Disk { return Disk{s} }

// Pin is Store.Pin, from disk. Damage that it finds is noted.
func (d Disk) Pin(ctx context.Context, reqs []tiers.Request) ([]tiers.Pin, tiers.Moved, error) {
	var moved tiers.Moved
	pins, err := d.s.nvme.Pin(ctx, reqs)
	d.s.noteDamage(reqs, err)
	for i := range pins {
		if err == nil && !pins[i].Held() {
			err = d.s.missing(reqs[i])
		}
		moved.NVMe += int64(pins[i].Transferred)
		moved.RAM += int64(pins[i].Cached)
	}
	if err != nil {
		releaseAll(pins)
		return nil, moved, err
	}
	return pins, moved, nil
}
