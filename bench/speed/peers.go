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
	Layout  string // of ggml: "head" or "token", see Peer.Time
	Threads int
	Ms      Spread  // milliseconds
	Equal   Spread  // of ggml: its time over that of our kernel of equal width, in the same repeat
	Planes  Spread  // its time over that of our 4-bit planes, likewise
	Error   float64 // of ggml's output, relative; the last one's
}

// equals names our kernel that reads as many bits as each of ggml's types.
var equals = map[string]string{"f16": "attention, bfloat16", "q8_0": "attention, 8-bit planes", "q4_0": planes4}

// peerKinds are ggml's types in the order of reports.
var peerKinds = []string{"f16", "q8_0", "q4_0"}

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

// peerSeries collects what becomes a row.
type peerSeries struct {
	PeerRow
	ms, equal, planes []float64
}

// inTurns measures everything on so many threads, ours first.
func (o *PeerOptions) inTurns(ctx context.Context, p *Peer, buf []byte, pages, threads int) ([]PeerRow, error) {
	kernelOptions := Options{Rows: o.QueryHeads / o.KVHeads, HeadDim: o.HeadDim}
	var all []*peerSeries
	for repeat := range o.Repeats {
		at := 0
		next := func(what, layout string) *peerSeries {
			if repeat == 0 {
				all = append(all, &peerSeries{PeerRow: PeerRow{What: what, Layout: layout, Threads: threads}})
			}
			at++
			return all[at-1]
		}
		ours := map[string]float64{}
		for _, k := range attentionKernels(o.HeadDim) {
			part := buf[:pages*k.unit]
			ms := float64(len(part)) / rate(k, part, threads, fastest(), kernelOptions) / 1e6
			s := next(k.name, "")
			s.ms, ours[k.name] = append(s.ms, ms), ms
		}
		for _, kind := range peerKinds {
			for _, layout := range []string{"head", "token"} {
				t, err := p.Time(kind, layout, threads)
				if err := errors.Join(err, ctx.Err()); err != nil {
					return nil, err
				}
				s, ms := next(kind, layout), 1e3*t.Seconds
				s.Error, s.ms = t.Error, append(s.ms, ms)
				s.equal, s.planes = append(s.equal, ms/ours[equals[kind]]), append(s.planes, ms/ours[planes4])
			}
		}
		o.Say("threads: %d, repeat %d of %d", threads, repeat+1, o.Repeats)
	}
	out := make([]PeerRow, len(all))
	for i, s := range all {
		s.Ms = spread(s.ms)
		if s.Layout != "" {
			s.Equal, s.Planes = spread(s.equal), spread(s.planes)
		}
		out[i] = s.PeerRow
	}
	return out, nil
}
