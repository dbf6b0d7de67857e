package server

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"sync"

	"kvtier/tiers"
	"kvtier/tiers/files"
	"kvtier/tiers/store"
)

// CheckOptions of a check.
type CheckOptions struct {
	DataDir string
	FS      files.FS // where the data folder is; the operating system's
	// Progress, if there is one, is told how many bytes of how many were read. It is
	// called often, by one goroutine at a time.
	Progress func(done, total int64)
}

// CheckReport says what a check read and found.
type CheckReport struct {
	Folder    string         `json:"folder"`
	Findings  []CheckFinding `json:"findings"` // damage first, then what could not be read, then notes
	Damage    int            `json:"damage"`   // how many of each
	Unread    int            `json:"unread"`
	Notes     int            `json:"notes"`
	Sequences int            `json:"sequences"`
	Spans     int            `json:"spans"`
	Segments  int            `json:"segments"`
	Logs      int            `json:"logs"`
	Bytes     int64          `json:"bytes"` // read of segments and logs
	// StrayBytes are those of segments and logs that nothing refers to any more.
	StrayBytes int64 `json:"stray_bytes"`
	// FreeBytes is the room in extents that no record names: the daemon writes there.
	FreeBytes int64 `json:"free_bytes"`
}

// CheckFinding is a finding, and what of which sequences it concerns.
type CheckFinding struct {
	store.Finding
	Affected []Affected `json:"affected,omitempty"`
}

// Affected is a part of a sequence.
type Affected struct {
	Sequence string `json:"sequence"`
	Name     string `json:"name,omitempty"`
	Layer    int    `json:"layer"` // AllLayers: every one
	// Start and End are the tokens [Start, End); End is 0 where it is not known.
	Start uint64 `json:"start"`
	End   uint64 `json:"end"`
}

// AllLayers is the layer of what concerns every layer.
const AllLayers = allLayers

// checker checks one folder. Its fields are made by one goroutine before
// segments are read by several.
type checker struct {
	*store.Inspection
	dir       string
	report    *CheckReport
	spans     map[string]*span
	sequences []*checkedSequence
	logs      map[string]int64 // sizes of the logs that there are
	progress  func(done, total int64)
	total     int64
	mu        struct {
		sync.Mutex
		findings []CheckFinding
		done     int64
	}
}

// checkedSequence is a sequence's record and what follows from it.
type checkedSequence struct {
	*sequenceRecord
	spec  *spec
	spans []spanRef
	end   uint64 // of the sealed part
	whole bool   // spec and spans are known
}

// Check reads all that outlives a daemon in a data folder on which none runs,
// checks it with the code that the daemon reads it with, and writes nothing.
// It reads extents in the order of the disk and checks on all cores. Memory is
// that of the catalogue's records and the longest record of a log, and besides,
// for each core and one more, 4 MiB or the longest part of a segment.
//
// The error says why nothing was found out: tiers.ErrNotFound, files.ErrLocked
// (a daemon runs), tiers.ErrVersion, ctx's or the system's.
func Check(ctx context.Context, o CheckOptions) (*CheckReport, error) {
	if o.FS == nil {
		o.FS = files.OS
	}
	if o.Progress == nil {
		o.Progress = func(int64, int64) {}
	}
	c := &checker{dir: o.DataDir, report: &CheckReport{Folder: o.DataDir, Findings: []CheckFinding{}}, spans: map[string]*span{}, logs: map[string]int64{}, progress: o.Progress}
	x, err := store.Inspect(ctx, o.FS, o.DataDir, func(f store.Finding) { c.find(f) })
	if err != nil {
		return nil, err
	}
	c.Inspection = x
	err = c.check(ctx)
	if err = cmp.Or(err, x.Close()); err != nil {
		return nil, err
	}
	return c.sum(), nil
}

func (c *checker) check(ctx context.Context) error {
	c.listLogs()
	segments, extents := c.Bytes()
	c.total, c.report.FreeBytes = segments, extents-segments
	for _, n := range c.logs {
		c.total += n
	}
	c.loadSpans()
	c.loadSequences()
	c.checkFiles()
	c.checkStray()
	if err := c.checkTails(ctx); err != nil {
		return err
	}
	return c.CheckSegments(ctx, c.advance)
}

// find takes in a finding.
func (c *checker) find(f store.Finding, affected ...Affected) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.mu.findings = append(c.mu.findings, CheckFinding{f, affected})
}

// advance notes that bytes were read.
func (c *checker) advance(bytes int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.mu.done += bytes
	c.progress(c.mu.done, c.total)
}

// sum makes the report. Whose segments are damaged is known only now.
func (c *checker) sum() *CheckReport {
	r := c.report
	r.Findings = append(r.Findings, c.mu.findings...)
	r.Bytes, r.Segments, r.Logs = c.mu.done, len(c.Headers), len(c.logs)
	r.Spans, r.Sequences = len(c.spans), len(c.sequences)
	var none tiers.ID
	for i := range r.Findings {
		f := &r.Findings[i]
		switch f.Verdict {
		case store.Damage:
			r.Damage++
		case store.Unread:
			r.Unread++
		default:
			r.Notes++
		}
		if f.Segment != none {
			f.Affected = c.users(f.Segment)
		}
	}
	slices.SortStableFunc(r.Findings, func(a, b CheckFinding) int {
		return cmp.Or(cmp.Compare(a.Verdict, b.Verdict), cmp.Compare(a.File, b.File), cmp.Compare(a.Offset, b.Offset), cmp.Compare(a.What, b.What))
	})
	return r
}

// users lists what of which sequences lies in a segment.
func (c *checker) users(id tiers.ID) (out []Affected) {
	for _, s := range c.sequences {
		for _, ref := range s.spans {
			for l, h := range ref.segments {
				if h != nil && h.ID == id {
					out = append(out, s.affected(l, ref.Start, ref.end()))
				}
			}
		}
	}
	return out
}

func (s *checkedSequence) affected(layer int, start, end uint64) Affected {
	return Affected{Sequence: s.ID, Name: s.Name, Layer: layer, Start: start, End: end}
}

// catalogue reports damage of the catalogue's records: the daemon does not start on it.
func (c *checker) catalogue(err error, affected ...Affected) {
	c.find(store.Finding{Verdict: store.Damage, File: "catalogue", Offset: store.Nowhere, What: err.Error(),
		Advice: store.AdviseRestore}, affected...)
}

func (c *checker) loadSpans() {
	c.Records(store.KindSpan, func(key, value []byte) {
		r, ids, err := parseSpan(value)
		if err == nil && r.ID != string(key) {
			err = fmt.Errorf("span %s under the key %q: %w", r.ID, key, tiers.ErrCorrupt)
		}
		if err != nil {
			c.catalogue(err)
			return
		}
		sp := &span{spanRecord: r}
		for l, id := range ids {
			h := c.Headers[id]
			switch {
			case h == nil && !c.Whole: // its record is among those that are lost
			case h == nil:
				c.catalogue(fmt.Errorf("span %s: its segment %v of layer %d has no record: %w", r.ID, id, l, tiers.ErrNotFound))
			case h.Layer != l || h.Start != r.Start || h.Tokens != r.Tokens:
				c.catalogue(fmt.Errorf("span %s: its segment %v of layer %d is one of layer %d, %d tokens from %d on, not %d from %d on: %w",
					r.ID, id, l, h.Layer, h.Tokens, h.Start, r.Tokens, r.Start, tiers.ErrCorrupt))
			}
			sp.segments = append(sp.segments, h)
		}
		c.spans[r.ID] = sp
	})
}

func (c *checker) loadSequences() {
	c.Records(store.KindSequence, func(key, value []byte) {
		r, err := parseSequence(key, value)
		if err != nil {
			c.catalogue(err)
			return
		}
		s := &checkedSequence{sequenceRecord: r}
		c.sequences = append(c.sequences, s)
		if err := c.join(s); err != nil && c.Whole {
			c.catalogue(fmt.Errorf("sequence %s: %w", r.ID, err), s.affected(AllLayers, s.end, 0))
		}
	})
}

// join finds what a sequence's record names.
func (c *checker) join(s *checkedSequence) (err error) {
	if s.spec, _, err = s.model(); err != nil {
		return err
	}
	if s.spans, s.end, err = joinSpans(s.Spans, s.spec.layers, func(id string) *span { return c.spans[id] }); err != nil {
		return err
	}
	for _, ref := range s.spans {
		for l, h := range ref.segments {
			if h == nil {
				return nil // the span's finding says so
			}
			_, _, window := h.Piece(0, tiers.PlaneWindow)
			if len(h.Heads) != s.spec.kvHeads || h.HeadDim != s.spec.headDim || int(h.Type) != int(s.spec.typ) || window != (s.spec.window[l] > 0) {
				return fmt.Errorf("span %s: its segment %v is no segment of layer %d of this model: %w", ref.ID, h.ID, l, tiers.ErrCorrupt)
			}
		}
	}
	s.whole = true
	for l, w := range s.spec.window {
		if w == 0 || len(s.spans) == 0 {
			continue
		}
		if _, err := s.spec.windowSpans(s.spans, l); err != nil {
			c.find(store.Finding{Verdict: store.Damage, File: "catalogue", Offset: store.Nowhere, What: fmt.Sprintf("sequence %s: %v", s.ID, err),
				Advice: "delete the sequence and read it again"}, s.affected(l, s.end-min(s.end, uint64(w)), s.end))
		}
	}
	return nil
}

// checkFiles checks the small files that the server keeps.
func (c *checker) checkFiles() {
	if _, err := readCalibration(c.FS(), filepath.Join(c.dir, calibrationFile)); err != nil {
		c.find(store.Finding{Verdict: store.VerdictOf(err), File: calibrationFile, Offset: store.Nowhere, What: err.Error(),
			Advice: "remove it: audits teach anew how far stated errors hold"})
	}
	_, err := readTenantKey(c.FS(), filepath.Join(c.dir, tenantKeyFile))
	missing := errors.Is(err, fs.ErrNotExist)
	if err == nil || missing && len(c.sequences) == 0 {
		return
	}
	f := store.Finding{Verdict: store.VerdictOf(err), File: tenantKeyFile, Offset: store.Nowhere, What: err.Error(),
		Advice: "restore it, or remove it: the daemon does not start on it"}
	if missing {
		f.Verdict, f.What, f.Advice = store.Note, "it is missing", "nothing: the daemon makes another, and names of blocks that were given out before mean nothing any more"
	}
	c.find(f)
}

// checkStray looks for what nothing refers to. Where the catalogue is not whole,
// records that are lost may.
func (c *checker) checkStray() {
	if !c.Whole {
		return
	}
	spans, segments := map[string]bool{}, map[tiers.ID]bool{}
	for _, s := range c.sequences {
		for _, ref := range s.Spans {
			spans[ref.Span] = true
		}
	}
	for id, sp := range c.spans {
		var bytes int64
		for _, h := range sp.segments {
			if h == nil {
				continue
			}
			segments[h.ID] = true
			bytes += c.StoredBytes(h.ID)
		}
		if !spans[id] {
			c.report.StrayBytes += bytes
			c.stray("catalogue", fmt.Sprintf("span %s, %d tokens from %d on, is no sequence's: %d bytes", id, sp.Tokens, sp.Start, bytes),
				"nothing: the daemon's next start removes it")
		}
	}
	for id := range c.Headers {
		if !segments[id] {
			bytes := c.StoredBytes(id)
			c.report.StrayBytes += bytes
			c.stray("catalogue", fmt.Sprintf("segment %v is no span's: %d bytes", id, bytes), "nothing is lost by it; the room is not given back")
		}
	}
}

func (c *checker) stray(file, what, advice string) {
	c.find(store.Finding{Verdict: store.Note, File: file, Offset: store.Nowhere, What: what, Advice: advice})
}
