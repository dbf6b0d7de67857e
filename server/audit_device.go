package server

import (
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"sync/atomic"
	"time"

	"kvtier/attention"
	kvtierv1 "kvtier/proto/kvtier/v1"
	"kvtier/server/sparse"
	"kvtier/tiers"
	"kvtier/tiers/gpu"
	"kvtier/tiers/store"
)

// Audits of the GPU answer a share of the calls that it took part in once more, on the host: everything that is stored of the same segments,
// read from disk, where every block has a checksum. A difference beyond what the device rounds, or a byte that changed in its memory, says that
// it cannot be trusted, and it is given up.
const (
	// outputLimit is the relative error of a query head's output, and lseLimit the error of its log-sum-exp, that the device's rounding
	// explains, with a margin: weights are rounded to 11 bits, and 4e-4 and 2e-5 are the largest that were measured.
	outputLimit, lseLimit = 1e-3, 2e-4
	// scoreUnit is what float32 leaves of a score besides, of its size: 8 units of its last place.
	scoreUnit = 1. / (1 << 20)
	// deviceRest is for how many times as long as an audit took there is no other: they take a twentieth of one core at most, and of its disk.
	deviceRest = 19
)

// pace lets one audit run at a time, and none for a while after it.
type pace struct {
	rest  time.Duration // so many times what the audit took
	began time.Time
	next  atomic.Int64 // when the next may be, in nanoseconds since then
}

func (p *pace) now() int64 { return time.Since(p.began).Nanoseconds() }

// take is true for who may begin an audit, and has to call give.
func (p *pace) take() bool {
	next := p.next.Load()
	return next <= p.now() && p.next.CompareAndSwap(next, math.MaxInt64)
}

func (p *pace) give(took time.Duration) { p.next.Store(p.now() + (p.rest * took).Nanoseconds()) }

// deviceAudit is the audit of what the GPU answered of one position of a call. It keeps nothing from being removed or evicted.
type deviceAudit struct {
	seq      *sequence
	layer    int
	position uint64
	segs     []sparse.Segment    // that lay on the device
	q        []float32           // [queryHeads][headDim], scaled
	got      []attention.Partial // [queryHeads], from the device, which read everything; nil: it did not, and is asked anew
}

// considerDevice queues an audit of what the GPU answered of a call.
func (a *auditor) considerDevice(c *call) {
	x := c.device
	if x == nil || x.partials == nil || !chance(a.srv.opt.GPUAuditShare) || !a.pace.take() {
		return
	}
	if !a.offer(newDeviceAudit(c, rand.IntN(c.n))) {
		a.pace.give(0)
	}
}

// newDeviceAudit is the audit of a call's i-th position.
func newDeviceAudit(c *call, i int) *deviceAudit {
	sp, x := c.seq.spec, c.device
	row, g := sp.queryHeads*sp.headDim, sp.group()
	j := &deviceAudit{seq: c.seq, layer: c.layer, position: c.start + uint64(i), segs: x.held(true), q: c.q[i*row : (i+1)*row]}
	if x.chose() {
		return j
	}
	for h := range sp.queryHeads {
		j.got = append(j.got, x.partials[(h/g*c.n+i)*g+h%g])
	}
	return j
}

func (j *deviceAudit) audit(ctx context.Context, a *auditor) {
	begin := time.Now()
	defer func() { a.pace.give(time.Since(begin)) }()
	if j.got == nil && !j.anew(ctx, a.srv.store) {
		return
	}
	want, err := j.onHost(ctx, a.srv.store.Disk())
	if err != nil {
		return // the segments may be gone; damage is noted by the store
	}
	d := j.compare(want)
	a.noteDevice(d)
	d.beyond = slices.DeleteFunc(d.beyond, func(h int) bool { return j.cancels(ctx, a.srv.store.Disk(), want, h) })
	if len(d.beyond) == 0 {
		// A bit that changed may be one that does not count here, as most bits of most keys: the bytes of one segment are compared, too.
		one := j.segs[rand.IntN(len(j.segs))].Header
		if _, err := a.srv.store.CheckDevice(ctx, []*tiers.Header{one}); errors.Is(err, tiers.ErrCorrupt) {
			a.giveUp(j, d, changed(err))
		}
		return
	}
	a.srv.store.StopDevice()
	a.giveUp(j, d, j.explain(ctx, a.srv.store))
}

// anew asks the device for the answer from everything that it still holds of the segments; false if that is nothing, or it failed.
func (j *deviceAudit) anew(ctx context.Context, st *store.Store) bool {
	x := &deviceAnswer{segs: j.segs, under: st.Attend(ctx, stored(j.segs), j.q, j.seq.spec.softcap, gpu.Choice{})}
	if x.under == nil {
		return false
	}
	x.wait(st)
	j.segs, j.got = x.held(true), x.partials
	return j.got != nil
}

// onHost answers by the plain loop, one KV head after the other: audits take one core.
func (j *deviceAudit) onHost(ctx context.Context, r sparse.Reader) ([]attention.Partial, error) {
	sp := j.seq.spec
	g, d := sp.group(), sp.headDim
	ps := attention.NewPartials(sp.queryHeads, d)
	for h := range sp.kvHeads {
		q := sparse.Query{Head: h, Q: j.q[h*g*d : (h+1)*g*d], Softcap: sp.softcap, Partials: ps[h*g : (h+1)*g]}
		if _, err := sparse.Attend(ctx, r, j.segs, q, sparse.Budget{All: true}, nil); err != nil {
			return nil, err
		}
	}
	return ps, nil
}

// difference is that of two answers.
type difference struct {
	output, lse float64 // the largest of any query head: relative, and absolute
	beyond      []int   // query heads that differ by more than rounding does
}

func (j *deviceAudit) compare(want []attention.Partial) (d difference) {
	for h := range want {
		got, out := j.outputs(want, h)
		e := float64(attention.RelativeError(got, out))
		lse := math.Abs(float64(j.got[h].LSE()) - float64(want[h].LSE()))
		d.output, d.lse = max(d.output, e), max(d.lse, lse)
		of := scoresRound(&want[h])
		if !(e <= outputLimit+of && lse <= lseLimit+of) {
			d.beyond = append(d.beyond, h)
		}
	}
	return d
}

// outputs are a query head's, from the device and from the host.
func (j *deviceAudit) outputs(want []attention.Partial, h int) (got, out []float32) {
	got, out = make([]float32, j.seq.spec.headDim), make([]float32, j.seq.spec.headDim)
	j.got[h].Output(got)
	want[h].Output(out)
	return got, out
}

// scoresRound is what float32 rounds of the scores that count, which are about as large as their log-sum-exp.
func scoresRound(p *attention.Partial) float64 { return math.Abs(float64(p.LSE())) * scoreUnit }

// explain says why the answers differ.
func (j *deviceAudit) explain(ctx context.Context, st *store.Store) error {
	var headers []*tiers.Header
	for _, s := range j.segs {
		headers = append(headers, s.Header)
	}
	same, err := st.CheckDevice(ctx, headers)
	switch {
	case errors.Is(err, tiers.ErrCorrupt):
		return changed(err)
	case err != nil:
		return fmt.Errorf("nobody can say why: %w", err)
	case same == 0:
		return errors.New("the segments lie in device memory no more: either its bytes had changed, or a kernel computes wrongly")
	}
	return fmt.Errorf("a kernel computes wrongly: the segments' %d bytes in device memory are right", same)
}

func changed(err error) error { return fmt.Errorf("bytes in device memory changed: %w", err) }

// cancels says whether a query head's outputs differ by rounding after all: values that cancel each other leave less than what was rounded of
// them. Each weight p is rounded by itself, so what is rounded of all is to be held against the root of the sum of (p |v|)^2, not against the output.
func (j *deviceAudit) cancels(ctx context.Context, r sparse.Reader, want []attention.Partial, h int) bool {
	sp, lse, of := j.seq.spec, float64(want[h].LSE()), scoresRound(&want[h])
	if !(math.Abs(float64(j.got[h].LSE())-lse) <= lseLimit+of) {
		return false // nothing cancels in a log-sum-exp
	}
	// Attention with twice the scores, over squared values, has p^2 v^2 in its sum.
	q, ps := make([]float32, sp.headDim), attention.NewPartials(1, sp.headDim)
	for i := range q {
		q[i] = 2 * j.q[h*sp.headDim+i]
	}
	for _, s := range j.segs {
		rows, _, err := sparse.Rows(ctx, r, s, h/sp.group())
		if err != nil {
			return false
		}
		for i, v := range rows.V { // rotated, which changes no length
			rows.V[i] = v * v
		}
		attention.Attend(ps, q, rows.K, rows.V, sp.headDim, 2*sp.softcap, nil)
	}
	squares := make([]float32, sp.headDim)
	ps[0].Output(squares)
	got, out := j.outputs(want, h)
	var rounded, differ float64
	for i := range squares {
		rounded += float64(squares[i]) * math.Exp(float64(ps[0].LSE())-2*lse)
		differ += math.Pow(float64(got[i])-float64(out[i]), 2)
	}
	return math.Sqrt(differ) <= (outputLimit+of)*math.Sqrt(rounded)
}

// giveUp takes the GPU out of service for good.
func (a *auditor) giveUp(j *deviceAudit, d difference, why error) {
	a.srv.log.Error("the GPU answers wrongly and is given up: all is answered from RAM and NVMe until the daemon is started again. See whether the device reports memory errors, and test it with `kvbench gpu`",
		"why", why, "sequence", j.seq.id, "layer", j.layer, "position", j.position, "query_heads", d.beyond,
		"segments", len(j.segs), "first_segment", j.segs[0].Header.ID, "error", d.output, "lse_error", d.lse)
	a.retire(why)
}

// retire gives the GPU back, and remembers why.
func (a *auditor) retire(why error) {
	a.mu.Lock()
	a.mu.device.gaveUp = why.Error()
	a.mu.Unlock()
	a.srv.metrics.deviceFailed.Inc()
	if err := a.srv.store.GiveUpDevice(why); err != nil {
		a.srv.log.Warn("giving the GPU's memory back", "error", err)
	}
}

// sealedWrongly gives the GPU up, which made another segment than the host.
func (a *auditor) sealedWrongly(sequence string, why error) {
	a.srv.store.StopDevice()
	a.srv.log.Error("the GPU seals wrongly: it is given up", "sequence", sequence, "error", why)
	a.retire(why)
}

// deviceAudits sum up audits of the GPU.
type deviceAudits struct {
	compared uint64
	largest  difference
	gaveUp   string // why
}

// noteDevice counts an audit.
func (a *auditor) noteDevice(d difference) {
	a.srv.metrics.deviceAudited(d)
	a.mu.Lock()
	defer a.mu.Unlock()
	s := &a.mu.device
	s.compared++
	s.largest.output, s.largest.lse = max(s.largest.output, d.output), max(s.largest.lse, d.lse)
}

// deviceStats are for people; nil where there is no GPU tier.
func (a *auditor) deviceStats() *kvtierv1.GPUAudits {
	if !a.srv.store.HasDevice() {
		return nil
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	s := a.mu.device
	return &kvtierv1.GPUAudits{Compared: s.compared, LargestError: s.largest.output, LargestLseError: s.largest.lse, GivenUp: s.gaveUp}
}
