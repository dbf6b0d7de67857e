package server

import (
	"context"
	"math"
	"slices"
	"sync"
	"time"

	"kvtier/attention"
	kvtierv1 "kvtier/proto/kvtier/v1"
)

// Audits answer a share of the sparse calls once more, from all stored bytes,
// in the background, and measure the true error: what stated errors are
// calibrated with. They never hold a call up: when the queue is full a call
// goes unaudited.
const (
	auditQueue   = 64
	auditKept    = 16384 // that can be listed
	auditRecent  = 4096  // newest audits that status sums up
	auditTimeout = time.Minute
)

// auditJob is the audit of one call.
type auditJob interface {
	// audit ends with ctx.
	audit(ctx context.Context, a *auditor)
}

// auditor does audits in the background, one after the other.
type auditor struct {
	srv    *Server
	jobs   chan auditJob
	cancel context.CancelFunc
	done   sync.WaitGroup
	pace   pace // of audits of the GPU
	mu     struct {
		sync.Mutex
		notes  ring[*kvtierv1.Audit]
		sum    float64
		device deviceAudits
	}
}

func newAuditor(srv *Server) *auditor {
	ctx, cancel := context.WithCancel(context.Background())
	a := &auditor{srv: srv, jobs: make(chan auditJob, auditQueue), cancel: cancel, pace: pace{rest: deviceRest, began: time.Now()}}
	a.done.Add(1)
	go func() {
		defer a.done.Done()
		for {
			select {
			case <-ctx.Done():
				return
			case j := <-a.jobs:
				a.run(ctx, j)
			}
		}
	}()
	return a
}

// run does one audit.
func (a *auditor) run(ctx context.Context, j auditJob) {
	ctx, cancel := context.WithTimeout(ctx, auditTimeout)
	defer cancel()
	// A panic here would be a defect, but it must not take the daemon down.
	defer func() {
		if r := recover(); r != nil {
			a.srv.log.Error("an audit failed", "panic", r)
		}
	}()
	j.audit(ctx, a)
}

func (a *auditor) close() {
	a.cancel()
	a.done.Wait()
}

// offer queues an audit; false if the queue is full.
func (a *auditor) offer(j auditJob) bool {
	select {
	case a.jobs <- j:
		return true
	default:
		return false
	}
}

// sparseAudit is that of a sparse call.
type sparseAudit struct {
	exact *call
	out   []float32
	note  *kvtierv1.Audit // but for what the audit finds
	key   modelKey
	kind  kind
	raw   float32
}

// consider queues a sparse call for audit. ps already holds the answer;
// answers that contain a worker's partial cannot be compared. One of which
// something was late is none of those that factors are for: its raw error errs
// by less (docs/decisions/0020-late-reads.md). And an audit reads everything, of
// a disk that does not keep up.
func (a *auditor) consider(c *call, ps []attention.Partial, merged bool) {
	if c.acc.Estimated == 0 || c.acc.Late > 0 || merged || !chance(a.srv.opt.AuditShare) {
		return
	}
	note := &kvtierv1.Audit{SequenceId: c.seq.id, Layer: uint32(c.layer), Position: c.start, Positions: uint32(c.n),
		Budget: c.budget.proto(), EstimatedError: c.stated.estimate, ErrorP95: c.stated.p95,
		ShareRead: float32(float64(c.acc.Moved.GPU+c.acc.Moved.RAM+c.acc.Moved.NVMe) / float64(max(1, c.acc.Full)))}
	for h := range c.heads {
		note.HeadRawErrors = append(note.HeadRawErrors, c.heads[h].rawError())
	}
	exact := &call{seq: c.seq, st: c.st, layer: c.layer, start: c.start, n: c.n, q: c.q,
		budget: budget{mode: kvtierv1.AttendMode_ATTEND_MODE_EXACT}}
	a.offer(&sparseAudit{exact, c.seq.finish(ps).out, note, c.seq.key(), c.kind(), c.acc.Error})
}

func (j *sparseAudit) audit(ctx context.Context, a *auditor) {
	ps, err := j.exact.answer(ctx)
	if err != nil {
		return // the sequence may be gone; damage is noted by the store
	}
	n := j.note
	n.HeadErrors = headErrors(j.out, j.exact.seq.finish(ps).out, j.exact.seq.spec)
	var sum float32
	for _, e := range n.HeadErrors {
		sum += e
	}
	n.TrueError = sum / float32(len(n.HeadErrors))
	a.srv.metrics.audited(n)
	a.srv.calibration.add(j.key, int(n.Layer), j.kind, j.raw, n.ErrorP95, n.TrueError)
	for h, e := range n.HeadErrors {
		if n.HeadRawErrors[h] > 0 && j.kind < deviceKinds { // what is learned of heads is for what the host chooses
			a.srv.calibration.addHead(j.key, int(n.Layer), h, n.HeadRawErrors[h], e)
		}
	}
	a.note(n)
	if n.Number%saveEvery != 0 {
		return
	}
	if err := a.srv.calibration.save(a.srv.opt.FS, a.srv.opt.DataDir); err != nil {
		a.srv.log.Warn("keeping what audits taught", "error", err)
	}
}

// note numbers an audit and keeps it.
func (a *auditor) note(n *kvtierv1.Audit) {
	a.mu.Lock()
	defer a.mu.Unlock()
	n.Number = a.mu.notes.total + 1
	a.mu.sum += float64(n.TrueError)
	a.mu.notes.add(n, auditKept)
}

// headErrors returns the relative error of out against truth by KV head, mean over positions and query heads.
func headErrors(out, truth []float32, sp *spec) []float32 {
	d := sp.headDim
	sums := make([]float32, sp.kvHeads)
	for i := 0; i < len(truth); i += d {
		sums[i/d%sp.queryHeads/sp.group()] += attention.RelativeError(out[i:i+d], truth[i:i+d])
	}
	for h := range sums {
		sums[h] *= float32(d*sp.kvHeads) / float32(len(truth))
	}
	return sums
}

// auditStats sum up audits.
type auditStats struct {
	n         uint64
	mean, p95 float64 // of true errors: of all audits, and of the newest
	coverage  float64 // share of the newest whose stated error held
}

func (a *auditor) stats() (s auditStats) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.mu.notes.total == 0 {
		return s
	}
	newest := a.mu.notes.newest(auditRecent)
	errors := make([]float64, len(newest))
	held := 0
	for i, n := range newest {
		errors[i] = float64(n.TrueError)
		if n.TrueError <= n.ErrorP95 {
			held++
		}
	}
	slices.Sort(errors)
	at := int(math.Ceil(.95*float64(len(errors)))) - 1
	s.n, s.mean, s.p95 = a.mu.notes.total, a.mu.sum/float64(a.mu.notes.total), errors[at]
	s.coverage = float64(held) / float64(len(errors))
	return s
}

// list returns the newest audits after a number, at most limit (0: auditRecent), from the oldest to the newest.
func (a *auditor) list(sequence string, after uint64, limit int) []*kvtierv1.Audit {
	a.mu.Lock()
	all := a.mu.notes.newest(int(min(auditKept, a.mu.notes.total-min(after, a.mu.notes.total))))
	a.mu.Unlock()
	all = slices.DeleteFunc(all, func(n *kvtierv1.Audit) bool {
		return n.Number <= after || sequence != "" && n.SequenceId != sequence
	})
	if limit == 0 {
		limit = auditRecent
	}
	return all[max(0, len(all)-limit):]
}
