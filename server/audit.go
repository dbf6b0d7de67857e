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
// in the background, and measure the true error. They never hold a call up:
// when the queue is full a call goes unaudited.
const (
	auditQueue   = 8
	auditKept    = 4096 // newest errors kept for quantiles
	auditTimeout = time.Minute
)

type auditJob struct {
	c   *call
	out []float32
}

type auditor struct {
	srv    *Server
	jobs   chan auditJob
	cancel context.CancelFunc
	done   sync.WaitGroup
	mu     struct {
		sync.Mutex
		errors []float64 // ring of the newest
		next   int
		count  uint64
		sum    float64
	}
}

func newAuditor(srv *Server) *auditor {
	ctx, cancel := context.WithCancel(context.Background())
	a := &auditor{srv: srv, jobs: make(chan auditJob, auditQueue), cancel: cancel}
	a.done.Add(1)
	go func() {
		defer a.done.Done()
		for {
			select {
			case <-ctx.Done():
				return
			case j := <-a.jobs:
				a.audit(ctx, j)
			}
		}
	}()
	return a
}

func (a *auditor) close() {
	a.cancel()
	a.done.Wait()
}

// consider queues a sparse call for audit. ps already holds the answer;
// answers that contain a worker's partial cannot be compared.
func (a *auditor) consider(c *call, ps []attention.Partial, merged bool) {
	if c.acc.Estimated == 0 || merged || !chance(a.srv.opt.AuditShare) {
		return
	}
	exact := *c
	exact.budget = budget{mode: kvtierv1.AttendMode_ATTEND_MODE_EXACT}
	select {
	case a.jobs <- auditJob{&exact, c.seq.finish(ps).out}:
	default:
	}
}

func (a *auditor) audit(ctx context.Context, j auditJob) {
	ctx, cancel := context.WithTimeout(ctx, auditTimeout)
	defer cancel()
	ps, err := j.c.answer(ctx)
	if err != nil {
		return // the sequence may be gone; damage is noted by the store
	}
	truth := j.c.seq.finish(ps).out
	d := j.c.seq.spec.headDim
	var sum float64
	for i := 0; i < len(truth); i += d {
		sum += float64(attention.RelativeError(j.out[i:i+d], truth[i:i+d]))
	}
	e := sum / float64(len(truth)/d)
	a.srv.metrics.auditError.Observe(e)
	a.mu.Lock()
	defer a.mu.Unlock()
	a.mu.count++
	a.mu.sum += e
	if len(a.mu.errors) < auditKept {
		a.mu.errors = append(a.mu.errors, e)
		return
	}
	a.mu.errors[a.mu.next] = e
	a.mu.next = (a.mu.next + 1) % auditKept
}

// stats returns how many audits there were, their mean error, and the 95th
// percentile of the newest.
func (a *auditor) stats() (n uint64, mean, p95 float64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.mu.count == 0 {
		return 0, 0, 0
	}
	sorted := slices.Sorted(slices.Values(a.mu.errors))
	at := int(math.Ceil(.95*float64(len(sorted)))) - 1
	return a.mu.count, a.mu.sum / float64(a.mu.count), sorted[at]
}
