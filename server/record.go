package server

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"time"

	"google.golang.org/protobuf/encoding/protojson"

	"kvtier/compress"
	kvtierv1 "kvtier/proto/kvtier/v1"
	"kvtier/tiers"
	"kvtier/tiers/taillog"
)

// Records of a tail's log.
const (
	logRows     taillog.Kind = 1 // tokens, with all layers' rows
	logLabels   taillog.Kind = 2 // labelled spans
	logTruncate taillog.Kind = 3 // keep so many tokens
	logSealed   taillog.Kind = 4 // what follows was logged after a sealing: its mark
)

// maxTexts bounds the text of the tokens of one record, in bytes.
const maxTexts = 64 << 20

// rowsRecord is the content of a logRows record: tokens [start, start+n).
type rowsRecord struct {
	start      uint64
	n          int
	exactUntil uint64
	ids        []uint64 // n
	texts      [][]byte // n, or none
	k, v       [][]byte // by layer; n rows each
	textless   error    // why it has no texts although some were written
}

// marshal returns the record's parts, rows uncopied.
func (r *rowsRecord) marshal() [][]byte {
	le := binary.LittleEndian
	head := le.AppendUint64(nil, r.start)
	head = le.AppendUint64(head, r.exactUntil)
	head = le.AppendUint32(head, uint32(r.n))
	texts := packTexts(r.texts)
	head = le.AppendUint32(head, uint32(len(texts)))
	for _, id := range r.ids {
		head = le.AppendUint64(head, id)
	}
	parts := [][]byte{append(head, texts...)}
	for l := range r.k {
		parts = append(parts, r.k[l], r.v[l])
	}
	return parts
}

// from returns the record's tokens from start on, start being less than its end.
func (r *rowsRecord) from(start uint64, rowBytes int) *rowsRecord {
	if start <= r.start {
		return r
	}
	cut := int(start - r.start)
	out := &rowsRecord{start: start, n: r.n - cut, exactUntil: r.exactUntil, ids: r.ids[cut:], texts: r.texts[cut:]}
	for l := range r.k {
		out.k, out.v = append(out.k, r.k[l][cut*rowBytes:]), append(out.v, r.v[l][cut*rowBytes:])
	}
	return out
}

func parseRows(b []byte, sp *spec) (*rowsRecord, error) {
	const fixed = 24
	bad := fmt.Errorf("log record of rows: %w", tiers.ErrCorrupt)
	if len(b) < fixed {
		return nil, bad
	}
	le := binary.LittleEndian
	r := &rowsRecord{start: le.Uint64(b), exactUntil: le.Uint64(b[8:]), n: int(le.Uint32(b[16:]))}
	texts := int(le.Uint32(b[20:]))
	b = b[fixed:]
	if r.n < 1 || r.n > len(b)/8 || texts > len(b)-8*r.n || len(b)-8*r.n-texts != r.n*sp.tokenBytes() {
		return nil, bad
	}
	for range r.n {
		r.ids = append(r.ids, le.Uint64(b))
		b = b[8:]
	}
	if r.texts, r.textless = unpackTexts(b[:texts], r.n); r.textless != nil {
		r.texts = make([][]byte, r.n) // no reason to lose the rows, or the daemon's start
	}
	b = b[texts:]
	size := r.n * sp.rowBytes()
	for range sp.layers {
		r.k, r.v = append(r.k, b[:size:size]), append(r.v, b[size:2*size:2*size])
		b = b[2*size:]
	}
	return r, nil
}

// logPlace says where the tail is in a sequence's log. A log that sealing went on with begins before the sealed part's end, and
// what it holds up to the mark the sequence's record in the catalogue knows already, but for the rows behind the sealed part.
type logPlace struct {
	Gen  uint64 `json:"log"`                // of the log
	From uint64 `json:"log_from,omitempty"` // the log's first token, if there is a mark; else it begins at the sealed part's end
	Mark uint64 `json:"log_mark,omitempty"` // of the last sealing, if it went on with the log
}

// tailReader reads the records of a sequence's log, in order.
type tailReader struct {
	spec   *spec
	sealed uint64 // end of the sealed part
	at     uint64 // tokens so far
	mark   uint64 // until it is read, records are older than the sequence's; 0: they are not
	// textless says which tokens, the first that there are, are without their texts, and why; they begin at textlessFrom.
	textless     error
	textlessFrom uint64
}

func newTailReader(sp *spec, sealed uint64, p logPlace) *tailReader {
	t := &tailReader{spec: sp, sealed: sealed, at: sealed, mark: p.Mark}
	if p.Mark != 0 {
		t.at = min(p.From, sealed)
	}
	return t
}

// tailRecord is what a record says of the tail; one of the three is there, or none.
type tailRecord struct {
	rows   *rowsRecord // from the sealed part's end on
	labels []*kvtierv1.Span
	keeps  *uint64 // a truncation to so many tokens, those at least that are sealed
	// old says that the sequence's record knows what else followed from it.
	old bool
}

// next reads a record, which has to fit those before it.
func (t *tailReader) next(k taillog.Kind, body []byte) (r tailRecord, err error) {
	r.old = t.mark != 0
	switch k {
	case logRows:
		rows, err := parseRows(body, t.spec)
		if err != nil {
			return r, err
		}
		// Damage may have taken tokens that are sealed, and nothing else: appends went on behind them.
		if rows.start != t.at && (rows.start < t.at || rows.start > t.sealed) {
			return r, fmt.Errorf("log: tokens from %d, expected %d: %w", rows.start, t.at, tiers.ErrCorrupt)
		}
		t.at = rows.start + uint64(rows.n)
		if t.at > t.sealed {
			if rows.textless != nil && t.textless == nil {
				t.textlessFrom = max(rows.start, t.sealed)
				t.textless = fmt.Errorf("tokens %d to %d of the open tail are without their texts: %w", t.textlessFrom, t.at-1, rows.textless)
			}
			r.rows = rows.from(t.sealed, t.spec.rowBytes())
		}
	case logLabels:
		if r.old {
			return r, nil
		}
		var raw []json.RawMessage
		if err := json.Unmarshal(body, &raw); err != nil {
			return r, fmt.Errorf("log: labels: %w: %w", tiers.ErrCorrupt, err)
		}
		r.labels, err = parseLabels(raw)
	case logTruncate:
		if len(body) != 8 {
			return r, fmt.Errorf("log: truncation: %w", tiers.ErrCorrupt)
		}
		n := binary.LittleEndian.Uint64(body)
		if n < t.sealed && !r.old || n > t.at {
			return r, fmt.Errorf("log: truncation to %d: %w", n, tiers.ErrCorrupt)
		}
		if t.at = n; n <= t.textlessFrom {
			t.textless = nil
		}
		n = max(n, t.sealed)
		r.keeps = &n
	case logSealed:
		if len(body) != 8 {
			return r, fmt.Errorf("log: mark of a sealing: %w", tiers.ErrCorrupt)
		}
		if binary.LittleEndian.Uint64(body) == t.mark {
			t.mark = 0
		}
	default:
		return r, fmt.Errorf("log: record kind %d: %w", k, tiers.ErrVersion)
	}
	return r, err
}

// packTexts packs the texts of tokens; nothing if there are none.
func packTexts(texts [][]byte) []byte {
	var b []byte
	some := false
	for _, t := range texts {
		b = binary.AppendUvarint(b, uint64(len(t)))
		b = append(b, t...)
		some = some || len(t) > 0
	}
	if !some {
		return nil
	}
	return compress.PackBlob(b)
}

// unpackTexts reads the texts of n tokens; none if there are none.
func unpackTexts(b []byte, n int) ([][]byte, error) {
	if len(b) == 0 {
		return make([][]byte, n), nil
	}
	b, err := compress.UnpackBlob(b, maxTexts)
	if err != nil {
		return nil, fmt.Errorf("token texts: %w: %w", tiers.ErrCorrupt, err)
	}
	out := make([][]byte, n)
	for i := range out {
		l, k := binary.Uvarint(b)
		if k <= 0 || l > uint64(len(b)-k) {
			return nil, fmt.Errorf("token texts: %w", tiers.ErrCorrupt)
		}
		out[i] = b[k : k+int(l) : k+int(l)]
		b = b[k+int(l):]
	}
	return out, nil
}

// sequenceRecord is what the catalogue keeps of a sequence.
type sequenceRecord struct {
	ID      string          `json:"id"`
	Name    string          `json:"name,omitempty"`
	Parent  string          `json:"parent,omitempty"`
	Spec    json.RawMessage `json:"spec"`
	Profile tiers.Profile   `json:"profile"`
	Spans   []spanRefRecord `json:"spans"`
	logPlace
	ExactUntil uint64            `json:"exact_until"`
	Labels     []json.RawMessage `json:"labels,omitempty"`
	Created    int64             `json:"created"`
	Used       int64             `json:"used"`
}

// parseSequence reads a sequence's record.
func parseSequence(key, value []byte) (*sequenceRecord, error) {
	r := &sequenceRecord{}
	if err := json.Unmarshal(value, r); err != nil || r.ID != string(key) || r.From > 0 && r.Mark == 0 {
		return nil, fmt.Errorf("record of sequence %q: %w", key, tiers.ErrCorrupt)
	}
	return r, nil
}

// model returns the spec and the labels of a sequence's record.
func (r *sequenceRecord) model() (*spec, []*kvtierv1.Span, error) {
	var m kvtierv1.ModelSpec
	if err := protojson.Unmarshal(r.Spec, &m); err != nil {
		return nil, nil, fmt.Errorf("model spec: %w: %w", tiers.ErrCorrupt, err)
	}
	sp, err := newSpec(&m)
	if err != nil {
		return nil, nil, fmt.Errorf("model spec: %w: %w", tiers.ErrCorrupt, err)
	}
	labels, err := parseLabels(r.Labels)
	return sp, labels, err
}

type spanRefRecord struct {
	Span  string `json:"span"`
	Limit int    `json:"limit"`
}

// record returns the catalogue's record of a sequence in state st.
func (s *sequence) record(st *state, place logPlace) ([]byte, error) {
	sp, err := protojson.Marshal(s.spec.msg)
	if err != nil {
		return nil, err
	}
	r := sequenceRecord{ID: s.id, Name: s.name, Parent: s.parent, Spec: sp, Profile: s.profile, logPlace: place,
		ExactUntil: st.exactUntil, Created: s.created.Unix(), Used: time.Now().Unix()}
	for _, ref := range st.spans {
		r.Spans = append(r.Spans, spanRefRecord{ref.ID, ref.limit})
	}
	for _, l := range st.labels {
		b, err := protojson.Marshal(l)
		if err != nil {
			return nil, err
		}
		r.Labels = append(r.Labels, b)
	}
	return json.Marshal(r)
}

func parseLabels(in []json.RawMessage) ([]*kvtierv1.Span, error) {
	var out []*kvtierv1.Span
	for _, b := range in {
		var l kvtierv1.Span
		if err := protojson.Unmarshal(b, &l); err != nil {
			return nil, fmt.Errorf("labels: %w: %w", tiers.ErrCorrupt, err)
		}
		out = append(out, &l)
	}
	return out, nil
}

func marshalLabels(labels []*kvtierv1.Span) ([]byte, error) {
	var raw []json.RawMessage
	for _, l := range labels {
		b, err := protojson.Marshal(l)
		if err != nil {
			return nil, err
		}
		raw = append(raw, b)
	}
	return json.Marshal(raw)
}
