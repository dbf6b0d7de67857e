package server

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"kvtier/attention"
	"kvtier/server/sparse"
	"kvtier/tiers/gpu"
	"kvtier/tiers/seal"
	"kvtier/tiers/store"
)

// deviceAnswer is what the GPU answers of a call: all that is stored of the segments that lie in its memory.
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
	x := &deviceAnswer{segs: c.seq.srv.segmentsOf(c.st, c.layer, c.st.sealed())}
	whole := make([]store.Segment, 0, len(x.segs))
	for _, s := range x.segs {
		if s.Cut() {
			return nil // in a fork that ends inside a segment until it is sealed anew
		}
		whole = append(whole, store.Segment{Header: s.Header, Low: s.Low})
	}
	if x.under = c.seq.srv.store.Attend(ctx, whole, c.byHead, sp.softcap); x.under == nil {
		return nil
	}
	return x
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
	if err := c.sealed(ctx, head, q, res); err != nil || early {
		return err
	}
	if x.wait(st); x.partials == nil {
		return c.rows(ctx, head, x.held(true), q, res, 0, len(res.ps), float32(c.n))
	}
	x.mergeInto(res.ps, head)
	return nil
}

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
	a.Scanned, a.Read = x.under.Tokens, x.under.Tokens
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
