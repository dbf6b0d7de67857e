package speed

import (
	"context"
	"fmt"
	"slices"

	"kvtier/bench/planted"
	"kvtier/server/sparse"
)

// AttendOptions of a measurement of whole answers; zero values are defaults.
type AttendOptions struct {
	Tokens  []int     // lengths, ascending; 1,024 to 262,144
	HeadDim int       // 128
	KVHeads int       // 8
	Group   int       // query heads a KV head; 4
	Budgets []float64 // shares of the bytes at 4 bits; .2 and .1
	Threads int       // 2
	Repeats int       // 5
	Seed    uint64
	Python  string // that has the package kvtier, to measure ggml beside; "": without
	Say     func(format string, args ...any)
}

func (o *AttendOptions) fill() {
	if len(o.Tokens) == 0 {
		for n := 1 << 10; n <= 256<<10; n *= 2 {
			o.Tokens = append(o.Tokens, n)
		}
	}
	if len(o.Budgets) == 0 {
		o.Budgets = []float64{.2, .1}
	}
	for _, f := range []struct {
		field *int
		zero  int
	}{{&o.HeadDim, 128}, {&o.KVHeads, 8}, {&o.Group, 4}, {&o.Threads, 2}, {&o.Repeats, 5}} {
		if *f.field == 0 {
			*f.field = f.zero
		}
	}
	if o.Say == nil {
		o.Say = func(string, ...any) {}
	}
	o.Tokens = slices.Sorted(slices.Values(o.Tokens))
}

// AttendReport shows where the time of answers goes and how it grows.
type AttendReport struct {
	HeadDim, KVHeads, Group, Threads int
	Ggml                             *PeerAbout // nil: not measured
	Rows                             []AttendRow
}

// AttendRow is one way of answering one position from a context of so many tokens.
type AttendRow struct {
	Tokens, Sealed int
	What           string
	Ms             Spread  // milliseconds of an answer of all heads
	Dense          Spread  // its time over that of dense attention of ours, in the same repeat
	Stages         *Stages // of ours, but for dense attention
	Read           float64 // share of the 4-bit bytes that was moved, mean
	Error          float64 // relative, against dense attention, mean over heads and repeats; of ggml's, against numpy
}

// Stages is where the time goes: milliseconds, medians, summed over the KV
// heads, so that they add up to about Ms times the threads.
type Stages struct {
	Zone  float64 // exact zone: the first tokens and those not sealed yet
	Score float64 // page means, the choice of pages, what the answer and its error owe to means
	Scan  float64 // keys of chosen pages, the choice of where to read on; of everything: all arithmetic
	Fetch float64 // the choice of values, and the values; of everything: pinning
	Rest  float64 // plans, merging, rotating back
}

// way is one of our ways of answering.
type way struct {
	what   string
	budget *sparse.Budget // nil: dense
}

// ways lists ours, dense attention first.
func (o *AttendOptions) ways() []way {
	out := []way{{what: "dense, bfloat16"}, {"everything", &sparse.Budget{All: true}}}
	for _, b := range o.Budgets {
		out = append(out, way{fmt.Sprintf("share %g", b), &sparse.Budget{Share: float32(b)}},
			way{fmt.Sprintf("share %g, by page", b), &sparse.Budget{Share: float32(b), ByPage: true}})
	}
	return out
}

// besideAttend are ggml's that are measured beside.
var besideAttend = []PeerWay{{"f16", "head"}, {"q8_0", "head"}, {"q8_0", "token"}}

// MeasureAttend seals the longest context and answers from its first tokens,
// from RAM; the ways of one length take turns.
func MeasureAttend(ctx context.Context, o AttendOptions) (*AttendReport, error) {
	o.fill()
	if err := o.check(); err != nil {
		return nil, err
	}
	longest := o.Tokens[len(o.Tokens)-1]
	o.Say("%d tokens of one KV head: making and sealing them", longest)
	plain, err := planted.NewPlain(ctx, planted.Shape{HeadDim: o.HeadDim, Group: o.Group}, longest, o.Seed, o.Say)
	if err != nil {
		return nil, err
	}
	l, err := newLayer(plain, o, longest)
	if err != nil {
		return nil, err
	}
	defer l.close()
	rep := &AttendReport{HeadDim: o.HeadDim, KVHeads: o.KVHeads, Group: o.Group, Threads: o.Threads}
	for _, tokens := range o.Tokens {
		rows, err := o.length(ctx, l, tokens, rep)
		if err != nil {
			return nil, err
		}
		rep.Rows = append(rep.Rows, rows...)
		o.Say("%d tokens: measured", tokens)
	}
	return rep, nil
}

func (o *AttendOptions) check() error {
	if o.Threads < 1 || o.Repeats < 1 {
		return fmt.Errorf("%d threads, %d repeats: at least one of each", o.Threads, o.Repeats)
	}
	for _, b := range o.Budgets {
		if !(b > 0 && b <= 1) {
			return fmt.Errorf("budget %g: a share of the bytes lies in (0, 1]", b)
		}
	}
	return Shape{o.Tokens[0], o.HeadDim, o.KVHeads, o.KVHeads * o.Group}.check()
}

// length measures all ways for one length, and ggml's if there is one.
func (o *AttendOptions) length(ctx context.Context, l *layer, tokens int, rep *AttendReport) ([]AttendRow, error) {
	var peer *Peer
	if o.Python != "" {
		p, err := StartPeer(ctx, o.Python, Shape{tokens, o.HeadDim, o.KVHeads, o.KVHeads * o.Group})
		if err != nil {
			return nil, err
		}
		defer p.Close()
		peer, rep.Ggml = p, &p.About
	}
	ways := o.ways()
	ours, theirs := make([][]*layerAnswer, len(ways)), make([][]PeerTime, len(besideAttend))
	for repeat := range o.Repeats {
		queries := l.queries(tokens, repeat)
		for i, w := range ways {
			a, err := l.answer(ctx, tokens, queries, w.budget, o.Threads)
			if err != nil {
				return nil, fmt.Errorf("%d tokens, %s: %w", tokens, w.what, err)
			}
			ours[i] = append(ours[i], a)
		}
		if peer == nil {
			continue
		}
		for i, w := range besideAttend {
			t, err := peer.Time(w, o.Threads)
			if err != nil {
				return nil, err
			}
			theirs[i] = append(theirs[i], t)
		}
	}
	return l.report(tokens, ways, ours, theirs), nil
}
