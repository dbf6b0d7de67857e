package speed

import (
	"context"
	"errors"

	"golang.org/x/sys/unix"
)

// PeerOptions of a comparison; zero values are defaults.
type PeerOptions struct {
	Shape          // 65,536 tokens, head dimension 128, 8 KV heads, 4 query heads each
	Repeats int    // 7
	Python  string // that has the package kvtier
	Say     func(format string, args ...any)
}

func (o *PeerOptions) fill() {
	for _, f := range []struct {
		field *int
		zero  int
	}{{&o.Tokens, 65536}, {&o.HeadDim, 128}, {&o.KVHeads, 8}, {&o.Repeats, 7}} {
		if *f.field == 0 {
			*f.field = f.zero
		}
	}
	if o.QueryHeads == 0 {
		o.QueryHeads = 4 * o.KVHeads
	}
	if o.Say == nil {
		o.Say = func(string, ...any) {}
	}
}

// PeerReport compares dense attention of one position over a layer's K/V.
type PeerReport struct {
	Shape Shape
	Ggml  PeerAbout
	Rows  []PeerRow
}

// PeerRow is one way of attending, on so many threads.
type PeerRow struct {
	What    string // a kernel of ours, or ggml's type
	Layout  string // of ggml, see PeerWay
	Threads int
	Ms      Spread  // milliseconds
	Equal   Spread  // of ggml: its time over that of our kernel of equal width, in the same repeat
	Planes  Spread  // its time over that of our 4-bit planes, likewise
	Error   float64 // of ggml's output, relative; the last one's
}

// equals names our kernel that reads as many bits as each of ggml's types.
var equals = map[string]string{"f16": "attention, bfloat16", "q8_0": "attention, 8-bit planes", "q4_0": planes4}

// PeerWay is a type of ggml's K/V, f16, q8_0 or q4_0, and how they lie: "head"
// is [head][token][dim], "token" [token][head][dim], as in llama.cpp's cache.
type PeerWay struct {
	Type   string `json:"type"`
	Layout string `json:"layout"`
}

// peerWays are all that are compared with kernels.
var peerWays = []PeerWay{{"f16", "head"}, {"f16", "token"}, {"q8_0", "head"}, {"q8_0", "token"}, {"q4_0", "head"}, {"q4_0", "token"}}

// MeasurePeers times our kernels of dense attention and ggml's operator in turns.
func MeasurePeers(ctx context.Context, o PeerOptions) (*PeerReport, error) {
	o.fill()
	if err := o.check(); err != nil {
		return nil, err
	}
	p, err := StartPeer(ctx, o.Python, o.Shape)
	if err != nil {
		return nil, err
	}
	defer p.Close()
	pages := (o.Tokens + block - 1) / block * o.KVHeads
	buf, err := memory(pages * 2 * block * 4 * o.HeadDim)
	if err != nil {
		return nil, err
	}
	defer unix.Munmap(buf)
	rep := &PeerReport{Shape: o.Shape, Ggml: p.About}
	for _, threads := range []int{1, 2} {
		rows, err := o.inTurns(ctx, p, buf, pages, threads)
		if err != nil {
			return nil, err
		}
		rep.Rows = append(rep.Rows, rows...)
	}
	return rep, nil
}

// turn is one repeat, in milliseconds.
type turn struct {
	ours   map[string]float64 // by kernel
	theirs map[PeerWay]PeerTime
}

func (t *turn) theirMs(w PeerWay) float64 { return 1e3 * t.theirs[w].Seconds }

// inTurns measures everything on so many threads; ours comes first.
func (o *PeerOptions) inTurns(ctx context.Context, p *Peer, buf []byte, pages, threads int) ([]PeerRow, error) {
	var turns []turn
	for repeat := range o.Repeats {
		t := turn{ours: map[string]float64{}, theirs: map[PeerWay]PeerTime{}}
		for _, k := range attentionKernels(o.HeadDim) {
			n := pages * k.unit
			gbs := rate(k, buf[:n], threads, fastest(), Options{Rows: o.QueryHeads / o.KVHeads, HeadDim: o.HeadDim})
			t.ours[k.name] = float64(n) / gbs / 1e6
		}
		for _, w := range peerWays {
			took, err := p.Time(w, threads)
			if err := errors.Join(err, ctx.Err()); err != nil {
				return nil, err
			}
			t.theirs[w] = took
		}
		turns = append(turns, t)
		o.Say("threads: %d, repeat %d of %d", threads, repeat+1, o.Repeats)
	}
	return o.rows(turns, threads), nil
}

func (o *PeerOptions) rows(turns []turn, threads int) (out []PeerRow) {
	of := func(ms func(t *turn) float64) Spread {
		return spreadOf(len(turns), func(i int) float64 { return ms(&turns[i]) })
	}
	for _, k := range attentionKernels(o.HeadDim) {
		out = append(out, PeerRow{What: k.name, Threads: threads, Ms: of(func(t *turn) float64 { return t.ours[k.name] })})
	}
	for _, w := range peerWays {
		out = append(out, PeerRow{What: w.Type, Layout: w.Layout, Threads: threads,
			Ms:     of(func(t *turn) float64 { return t.theirMs(w) }),
			Equal:  of(func(t *turn) float64 { return t.theirMs(w) / t.ours[equals[w.Type]] }),
			Planes: of(func(t *turn) float64 { return t.theirMs(w) / t.ours[planes4] }),
			Error:  turns[len(turns)-1].theirs[w].Error})
	}
	return out
}
