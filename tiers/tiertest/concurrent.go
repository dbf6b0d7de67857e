package tiertest

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"sync"

	"kvtier/tiers"
)

// concurrent puts, pins, drops and releases from many goroutines. Bytes are
// compared when a pin is made and again before it is released.
func (s *suite) concurrent() {
	const segments, workers, steps = 12, 6, 150
	var headers [segments]*tiers.Header
	var pieces [segments][]tiers.Piece
	for i := range segments {
		headers[i], pieces[i] = Segment(500+uint64(i), 2, 12000)
	}
	var wg sync.WaitGroup
	for w := range uint64(workers) {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(w, 9))
			type kept struct {
				pin   tiers.Pin
				bytes []byte
			}
			var pinned []kept
			check := func(k kept) {
				if !bytes.Equal(k.pin.Ranges[0], k.bytes) {
					s.Error("a pin has other bytes than its piece")
				}
			}
			for range steps {
				i := rng.IntN(segments)
				switch rng.IntN(8) {
				case 0, 1:
					if err := s.tier.Put(ctx, headers[i], pieces[i]); err != nil && !errors.Is(err, tiers.ErrFull) {
						s.Error(err)
					}
				case 2:
					planes := []tiers.PlaneSet{tiers.AllPlanes, tiers.LowPlanes, 1 << tiers.PlaneK2}[rng.IntN(3)]
					if err := s.tier.Drop(headers[i].ID, planes); err != nil {
						s.Error(err)
					}
				case 3:
					for range len(pinned) / 2 {
						check(pinned[0])
						pinned[0].pin.Release(rng.Float32())
						pinned = pinned[1:]
					}
				default:
					from := rng.IntN(len(pieces[i]))
					want := pieces[i][from:min(from+6, len(pieces[i]))]
					pins, err := s.tier.Pin(ctx, whole(headers[i], want))
					if err != nil {
						s.Error(err)
						continue
					}
					for j, p := range pins {
						if p.Held() {
							k := kept{p, want[j].Bytes}
							check(k)
							pinned = append(pinned, k)
						}
					}
				}
				if u := s.tier.Usage(); u.BytesUsed > u.BytesLimit {
					s.Errorf("%d bytes used of %d", u.BytesUsed, u.BytesLimit)
				}
			}
			for _, k := range pinned {
				check(k)
				k.pin.Release(0)
			}
		})
	}
	wg.Wait()
	for _, h := range headers {
		s.drop(h)
	}
	if u := s.usage(); u.Pieces != 0 {
		s.Fatalf("%d pieces left", u.Pieces)
	}
}
