package server

import (
	"context"
	"math"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"kvtier/attention"
	kvtierv1 "kvtier/proto/kvtier/v1"
	"kvtier/server/sparse"
	"kvtier/tiers/gpu"
	"kvtier/tiers/seal"
	"kvtier/tiers/store"
)

// deviceAnswer is what the GPU answers of a call, of the segments that lie in its memory: all that is stored, or of much, and in mode budget, of the pages
// that matter most.
type deviceAnswer struct {
	segs  []sparse.Segment // of the sealed part
	under *gpu.Answer

	once     sync.Once
	done     atomic.Bool
	partials []attention.Partial // [kvHeads][rows], once it is done; nil: the device failed
	ns       int64
}

// startDevice begins what the GPU answers of the call; nil if it holds nothing of the layer.
func (c *call) startDevice(ctx context.Context) *deviceAnswer {
	sp := c.seq.spec
	if c.trace != nil || sp.window[c.layer] > 0 || c.st.sealed() == 0 || c.start+1 < c.st.sealed() || !c.seq.srv.store.HasDevice() {
		return nil
	}
	x := &deviceAnswer{segs: c.sealedSegments()}
	for _, s := range x.segs {
		if s.Cut() {
			return nil // in a fork that ends inside a segment until it is sealed anew
		}
	}
	these := stored(x.segs)
	x.under = c.seq.srv.store.Attend(ctx, these, c.byHead, sp.softcap, c.choice())
	if x.under == nil || slices.Contains(x.under.Held, false) {
		c.askAhead(these)
	}
	if x.under == nil {
		return nil
	}
	return x
}

// stored are segments as the store knows them.
func stored(segs []sparse.Segment) []store.Segment {
	out := make([]store.Segment, len(segs))
	for i, s := range segs {
		out[i] = store.Segment{Header: s.Header, Low: s.Low}
	}
	return out
}

// choice says how much of what the GPU holds it reads.
func (c *call) choice() gpu.Choice {
	above := c.seq.srv.opt.GPUChooseAbove
	if c.budget.mode != kvtierv1.AttendMode_ATTEND_MODE_BUDGET || above == 0 {
		return gpu.Choice{}
	}
	return gpu.Choice{Share: c.asked(), Group: c.seq.spec.group(), Above: int64(above)}
}

// askAhead tells the store that the next full layer's segments probably come next, after those of this one, which were not all on the GPU.
func (c *call) askAhead(these []store.Segment) {
	sp := c.seq.spec
	for l := (c.layer + 1) % sp.layers; l != c.layer; l = (l + 1) % sp.layers {
		if sp.window[l] > 0 {
			continue
		}
		c.seq.srv.store.Ahead(these, stored(c.seq.srv.segmentsOf(c.st, l, c.st.sealed())))
		return
	}
}

// withDevice answers a KV head's sealed part together with the GPU. What the host chooses to read depends on what the GPU's part weighs, so it waits for that first; where it
// reads everything both work at once. A GPU that failed leaves its segments to the host.
func (c *call) withDevice(ctx context.Context, head int, q []float32, res *headResult) error {
	x, st := c.device, c.seq.srv.store
	if res.share*float32(c.n) < wholeShare {
		x.wait(st)
	}
	early := x.done.Load()
	res.onDevice = !early || x.partials != nil
	if early {
		x.mergeInto(res.ps, head)
	}
	if err := c.sealed(ctx, head, q, res); err != nil {
		return err
	}
	if !early {
		if x.wait(st); x.partials == nil {
			return c.rows(ctx, head, x.held(true), q, res, 0, len(res.ps), float32(c.n))
		}
		x.mergeInto(res.ps, head)
	}
	res.unread = x.errorOf(res.ps, head)
	return nil
}

// chose says whether the GPU left pages unread.
func (x *deviceAnswer) chose() bool { return x != nil && x.partials != nil && x.under.Errors != nil }

// errorOf estimates the relative error of a KV head's output by what the GPU did not read, mean over rows: ps hold all there is.
func (x *deviceAnswer) errorOf(ps []attention.Partial, head int) (mean float32) {
	if !x.chose() {
		return 0
	}
	for i := range ps {
		at, norm2 := head*len(ps)+i, 0.
		for _, y := range ps[i].Out {
			norm2 += float64(y) * float64(y)
		}
		share := math.Exp(float64(x.partials[at].LSE()) - float64(ps[i].LSE()))
		e := deviceErrorScale * share * x.under.Errors[at] * ps[i].Sum / math.Sqrt(norm2)
		if !(e < 1) { // or no number
			e = 1
		}
		mean += float32(e) / float32(len(ps))
	}
	return mean
}

// deviceErrorScale is what errors are raised by that pages are not read for: keys err, too, and pages do not err independently. Audits say how well
// that holds.
const deviceErrorScale = 3

// wait waits for the device once; every deviceAnswer is waited for.
func (x *deviceAnswer) wait(st *store.Store) {
	if x == nil {
		return
	}
	x.once.Do(func() {
		begin := time.Now()
		x.partials = st.Wait(x.under)
		x.ns = time.Since(begin).Nanoseconds()
		x.done.Store(true)
	})
}

// mergeInto merges a KV head's partials, if the device did not fail.
func (x *deviceAnswer) mergeInto(ps []attention.Partial, head int) {
	if x.partials == nil {
		return
	}
	for i := range ps {
		ps[i].Merge(&x.partials[head*len(ps)+i])
	}
}

// held returns the segments that lie on the device, or the others.
func (x *deviceAnswer) held(on bool) (out []sparse.Segment) {
	for i, s := range x.segs {
		if x.under.Held[i] == on {
			out = append(out, s)
		}
	}
	return out
}

// account is what the device did.
func (x *deviceAnswer) account() (a sparse.Account) {
	if x == nil || x.partials == nil {
		return a
	}
	a.Moved.GPU = x.under.Bytes
	a.Scanned, a.Read, a.Estimated = x.under.Scanned, x.under.Read, x.under.Estimated
	a.NsScan = x.ns
	for i, s := range x.segs {
		if x.under.Held[i] {
			for h := range s.Header.Heads {
				a.Full += int64(seal.View{D: s.Header.HeadDim, Info: s.Header.Heads[h]}.BytesAt4Bits())
			}
		}
	}
	return a
}
