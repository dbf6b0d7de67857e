package server

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"kvtier/tiers"
	"kvtier/tiers/taillog"
)

// Rows of open tails lie in RAM and in logs. Where RAM for them runs out, the
// sequences that were used longest ago give up theirs, and read them back from
// their logs when they are used next. A spilled tail has lost nothing: its state
// is what recovery would find after a crash, but for the rows.

// spillTo is the share of the tails' memory that spilling comes down to, so that
// not every append has to spill.
const spillTo = .875

// makeRoom spills tails, those used longest ago first, until need more bytes fit.
// It passes over sequences that are being changed: the caller may hold one's write.
func (srv *Server) makeRoom(need int64) {
	type idle struct {
		seq  *sequence
		used time.Time
	}
	var all []idle
	for _, s := range srv.list() {
		s.mu.RLock()
		if s.mu.spillable() {
			all = append(all, idle{s, s.mu.used})
		}
		s.mu.RUnlock()
	}
	slices.SortFunc(all, func(a, b idle) int { return a.used.Compare(b.used) })
	low := int64(spillTo * float64(srv.opt.TailBytes))
	for _, i := range all {
		if srv.tail.Load()+need <= low {
			return
		}
		if i.seq.write.TryLock() {
			i.seq.spill()
			i.seq.write.Unlock()
		}
	}
}

// spillable says whether there are rows in RAM that the log holds, too.
func (st *state) spillable() bool {
	return !st.spilled && st.crashSafe >= st.accepted && st.accepted > st.sealed()
}

// spill gives up the rows in RAM, but for those of layers that are ahead of the
// others: they are in no log yet. Calls under way keep what they see. The caller
// holds write.
func (s *sequence) spill() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.mu.deleted || s.mu.sealing || !s.mu.spillable() {
		return
	}
	next := s.copyLocked()
	for l, r := range next.rows {
		next.rows[l] = r.from(s.spec, next.accepted).tight(s.spec)
	}
	next.spilled = true
	s.setStateLocked(next)
	s.srv.metrics.spills.Inc()
}

// readable returns a snapshot with the open tail's rows of one layer, for calls
// that change nothing. Where there is no room for a spilled tail it reads that
// layer's rows for this call alone: reading never waits for another sequence.
func (s *sequence) readable(layer int) (state, error) {
	if st := s.snapshot(); !st.spilled {
		return st, nil
	}
	s.write.Lock()
	defer s.write.Unlock()
	st, err := s.wholeLocked()
	if err == nil || s.usable() != nil || !errors.Is(err, errNoRoom) {
		return st, err
	}
	st.rows, err = s.readTail(&st, layer)
	return st, err
}

// whole returns a snapshot with the rows of the open tail, reading them back if
// they were spilled. The caller does not hold write.
func (s *sequence) whole() (state, error) {
	if st := s.snapshot(); !st.spilled {
		return st, nil
	}
	s.write.Lock()
	defer s.write.Unlock()
	return s.wholeLocked()
}

// wholeLocked is whole for a caller that holds write.
func (s *sequence) wholeLocked() (state, error) {
	st := s.snapshot()
	if !st.spilled {
		return st, nil
	}
	if err := s.usable(); err != nil {
		return st, err
	}
	release, err := s.srv.reserveTail(int64(st.accepted-st.sealed()+readAhead) * int64(s.spec.tokenBytes()))
	if err != nil {
		return st, fmt.Errorf("%w: %w", errNoRoom, err)
	}
	defer release() // by then the rows are counted themselves
	rows, err := s.readTail(&st, allLayers)
	if err != nil {
		return st, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mu.used = time.Now()
	next := s.copyLocked() // a query may have lowered exactUntil meanwhile
	next.rows, next.spilled = rows, false
	s.setStateLocked(next)
	s.srv.metrics.wakes.Inc()
	return s.copyLocked(), nil
}

// errNoRoom: other tails fill the memory, and cannot be spilled now.
var errNoRoom = errors.New("no room for the open tail")

const allLayers = -1

// readAhead is for how many more tokens rows that are read back have room, so
// that a turn's first tokens do not have all rows copied to where more fit.
const readAhead = 64

// readTail reads the rows of a spilled state from the log, as recovery does: of
// one layer, or of all.
func (s *sequence) readTail(st *state, layer int) ([]layerRows, error) {
	rows, err := s.replayRows(st, layer)
	if err != nil {
		err = fmt.Errorf("read the open tail back from its log: %w", err)
		if errors.Is(err, tiers.ErrCorrupt) {
			s.damage(err)
		}
	}
	return rows, err
}

func (s *sequence) replayRows(st *state, layer int) ([]layerRows, error) {
	sealed := st.sealed()
	got := state{spans: st.spans, accepted: sealed, rows: make([]layerRows, s.spec.layers), lens: make([]uint64, s.spec.layers)}
	wanted := func(l int) bool { return layer == allLayers || l == layer }
	for l, w := range s.spec.window {
		got.rows[l], got.lens[l] = layerRows{base: sealed}, sealed
		if !wanted(l) {
			continue
		}
		if w > 0 && len(st.spans) > 0 {
			var err error
			if got.rows[l], err = s.window(s.srv.sealer.ctx, st.spans, l); err != nil {
				return nil, err
			}
		}
		got.rows[l].until = st.lens[l] + readAhead
	}
	tail := newTailReader(s.spec, sealed, s.place)
	err := s.log.Read(func(k taillog.Kind, body []byte) error {
		if k == logLabels {
			return nil
		}
		return s.replayRecord(&got, tail, k, body, wanted)
	})
	if err == nil && got.accepted != st.accepted {
		err = fmt.Errorf("the log has %d tokens, not %d: %w", got.accepted, st.accepted, tiers.ErrCorrupt)
	}
	if err != nil {
		return nil, err
	}
	for l := range got.rows {
		if ahead := st.lens[l]; wanted(l) && ahead > st.accepted {
			k, v := st.rows[l].slice(s.spec, st.accepted, ahead)
			got.rows[l].add(s.spec, k, v, asNeeded)
		}
	}
	return got.rows, nil
}
