package server

import (
	"math"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"time"

	"kvtier/attention"
	kvtierv1 "kvtier/proto/kvtier/v1"
	"kvtier/tiers"
	"kvtier/tiers/taillog"
)

// allExact is the exactUntil of a sequence without a sparse token.
const allExact = uint64(math.MaxUint64)

// sequence is one context.
type sequence struct {
	srv     *Server
	id      string
	name    string
	parent  string
	spec    *spec
	profile tiers.Profile
	created time.Time
	handle  uint64

	// write serialises what changes the sequence: appends, truncation, sealing.
	// It may be held across I/O. Taken before mu.
	write sync.Mutex
	log   *taillog.Log // guarded by write; its own methods are safe
	place logPlace     // of the tail in the log; guarded by write

	steering steering

	mu struct {
		sync.RWMutex
		state
		queries   [][]*attention.QuerySum // [layer][kv head]; nil for windows
		sample    [][]float32             // [layer], the latest queries [rows][queryHeads][headDim], for the codec's error
		last      []*lastQuery            // [layer]
		used      time.Time
		holders   int
		releases  []func() // uses that only CloseSequence ends
		pins      int
		deleted   bool
		leaving   bool // is being evicted: nobody may begin to use it
		abandoned bool // its last holder went, and may have left rows of tokens that not every layer has
		sealing   bool
		powerPos  []synced // acknowledgements on their way to power-safe
		power     uint64
		damaged   string // how stored bytes were found damaged
	}
}

// synced pairs a size of a log with the tokens it holds.
type synced struct {
	log    *taillog.Log
	bytes  int64
	tokens uint64
}

// state is what a query sees of a sequence. A copy of it is a snapshot.
type state struct {
	spans      []spanRef
	rows       []layerRows // by layer; while spilled only those from accepted on
	spilled    bool        // the rows lie in the log alone: whole reads them back
	lens       []uint64    // by layer: tokens appended
	cuts       uint64      // how often rows were taken back that the next segment may hold
	accepted   uint64      // least of lens
	crashSafe  uint64
	exactUntil uint64
	// ids and texts of the open tail's tokens, from the end of the sealed spans
	// on; noToken where the caller gave none.
	ids    []uint64
	texts  [][]byte
	labels []*kvtierv1.Span
	names  []name // of every whole block from the start, as far as ids are known
}

// spanRef is a sealed span as a sequence uses it.
type spanRef struct {
	*span
	limit int // tokens used, 1 to span.Tokens
}

// end is the position behind the last token that is used.
func (r spanRef) end() uint64 { return r.Start + uint64(r.limit) }

// sealed returns how many tokens lie in spans.
func (st *state) sealed() uint64 {
	if n := len(st.spans); n > 0 {
		return st.spans[n-1].Start + uint64(st.spans[n-1].limit)
	}
	return 0
}

// snapshot copies the state. Slices inside are never changed in place.
func (s *sequence) snapshot() state {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.copyLocked()
}

func (s *sequence) copyLocked() state {
	st := s.mu.state
	st.rows = append([]layerRows(nil), st.rows...)
	st.lens = append([]uint64(nil), st.lens...)
	return st
}

// newSequence makes an empty sequence in memory.
func (srv *Server) newSequence(id string, sp *spec, p tiers.Profile) *sequence {
	s := &sequence{srv: srv, id: id, spec: sp, profile: p, created: time.Now()}
	s.mu.rows = make([]layerRows, sp.layers)
	s.mu.lens = make([]uint64, sp.layers)
	s.mu.exactUntil = allExact
	s.mu.last = make([]*lastQuery, sp.layers)
	s.mu.sample = make([][]float32, sp.layers)
	s.mu.queries = make([][]*attention.QuerySum, sp.layers)
	for l, w := range sp.window {
		if w > 0 {
			continue
		}
		s.mu.queries[l] = make([]*attention.QuerySum, sp.kvHeads)
		for h := range s.mu.queries[l] {
			s.mu.queries[l][h] = attention.NewQuerySum(sp.headDim)
		}
	}
	s.mu.used = s.created
	return s
}

// key says whose calibration holds for the sequence.
func (s *sequence) key() modelKey { return modelKey{string(s.spec.fingerprint), s.profile} }

// ack says how far the sequence is accepted.
func (s *sequence) ack() *kvtierv1.Ack {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.ackLocked()
}

func (s *sequence) ackLocked() *kvtierv1.Ack {
	return &kvtierv1.Ack{Accepted: s.mu.accepted, CrashSafe: min(s.mu.crashSafe, s.mu.accepted),
		PowerSafe: min(s.mu.power, s.mu.accepted), Sealed: s.mu.sealed()}
}

// tailBytes is the memory that the open tail takes.
func (st *state) tailBytes(sp *spec) (n int64) {
	for _, r := range st.rows {
		n += r.bytes(sp)
	}
	return n
}

const logSuffix = ".log"

// logName names a log: its records' checksums begin with it.
func logName(sequence string, gen uint64) string { return sequence + "-" + strconv.FormatUint(gen, 10) }

func (s *sequence) logPath(gen uint64) string {
	return filepath.Join(s.srv.tailDir(), s.logName(gen)+logSuffix)
}

func (s *sequence) logName(gen uint64) string { return logName(s.id, gen) }

// touch notes that the sequence was used.
func (s *sequence) touch() {
	s.mu.Lock()
	s.mu.used = time.Now()
	s.mu.Unlock()
}

// setStateLocked publishes a new state and keeps account of memory.
func (s *sequence) setStateLocked(st state) {
	s.srv.tail.Add(st.tailBytes(s.spec) - s.mu.state.tailBytes(s.spec))
	s.mu.state = st
}

// extendNamesLocked names the blocks that became whole.
func (s *sequence) extendNamesLocked() {
	have := uint64(len(s.mu.names)) * blockTokens
	var ids []uint64
	for at := have; at+blockTokens <= s.mu.accepted; at += blockTokens {
		block := s.mu.blockIDs(at)
		if block == nil {
			break
		}
		ids = append(ids, block...)
	}
	if len(ids) == 0 {
		return
	}
	names := newNamer(s.srv.key, s.spec, s.profile).chain(s.mu.names[:len(s.mu.names):len(s.mu.names)], ids, s.mu.exactUntil)
	if fresh := names[len(s.mu.names):]; len(fresh) > 0 {
		s.mu.names = names
		s.srv.names.add(s, fresh)
	}
}

// blockIDs returns the ids of the block that begins at position at, in spans
// or in the tail; nil if one is not known.
func (st *state) blockIDs(at uint64) []uint64 {
	ids := make([]uint64, 0, blockTokens)
	for _, r := range st.spans {
		if end := r.Start + uint64(r.limit); at < end && len(ids) < blockTokens {
			to := min(end, at+uint64(blockTokens-len(ids)))
			ids = append(ids, r.TokenIDs[at-r.Start:to-r.Start]...)
			at = to
		}
	}
	if rest := blockTokens - len(ids); rest > 0 {
		lo := at - st.sealed()
		if lo+uint64(rest) > uint64(len(st.ids)) {
			return nil
		}
		ids = append(ids, st.ids[lo:lo+uint64(rest)]...)
	}
	if slices.Contains(ids, noToken) {
		return nil
	}
	return ids
}
