package server

import (
	"context"
	"sync"
	"time"

	"kvtier/attention"
	"kvtier/server/sparse"
	"kvtier/tiers/gpu"
	"kvtier/tiers/seal"
	"kvtier/tiers/store"
)

// deviceAnswer is what the GPU answers of a call: all that is stored of the segments that lie in its memory, while the host attends to
// the exact zone. The host's own choice of what to read comes after it, because it depends on what attention goes elsewhere.
type deviceAnswer struct {
	segs  []sparse.Segment // of the sealed part
	under *gpu.Answer

	once     sync.Once
	partials []attention.Partial // [kvHeads][rows]; nil: the device failed
	ns       int64
}

// startDevice begins what the GPU answers of the call; nil if it holds nothing of the layer.
func (c *call) startDevice(ctx context.Context) *deviceAnswer {
	sp := c.seq.spec
	if c.trace != nil || sp.window[c.layer] > 0 || c.st.sealed() == 0 || c.start+1 < c.st.sealed() || !c.seq.srv.store.HasDevice() {
		return nil
	}
	x := &deviceAnswer{segs: c.seq.srv.segmentsOf(c.st, c.layer, c.st.sealed())}
	var whole []store.Segment
	for _, s := range x.segs {
		if s.Cut() {
			return nil // in a fork that ends inside a segment until it is sealed anew
		}
		whole = append(whole, store.Segment{Header: s.Header, Low: s.Low})
	}
	var q []float32
	for h := range sp.kvHeads {
		q = append(q, c.groupQueries(h)...)
	}
	if x.under = c.seq.srv.store.Attend(ctx, whole, q, sp.softcap); x.under == nil {
		return nil
	}
	return x
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
	})
}

// of returns a KV head's partials; nil if there are none.
func (x *deviceAnswer) of(head, rows int) []attention.Partial {
	if x == nil || x.partials == nil {
		return nil
	}
	return x.partials[head*rows : (head+1)*rows]
}

// rest leaves out the segments that the device attended to. segs are those of the sealed part.
func (x *deviceAnswer) rest(segs []sparse.Segment) []sparse.Segment {
	if x == nil || x.partials == nil {
		return segs
	}
	var out []sparse.Segment
	for i, s := range segs {
		if !x.under.Held[i] {
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
