package gpu

import (
	"context"
	"fmt"
	"math/rand/v2"

	"kvtier/attention"
	"kvtier/bench/stats"
	"kvtier/tiers"
	"kvtier/tiers/gpu/cuda"
	"kvtier/tiers/gpu/kernels"
)

// mostError is how much an answer of the device may differ from the Go loop's over the same codes, relative.
const mostError = 1e-3

// Shape is what one self-test asks.
type Shape struct {
	HeadDim, Heads, Rows int
	Tokens               []int // of the segments
	Profile              string
	Low                  bool
	Softcap, Strength    float32
}

// Checked is a self-test's result: the largest relative error of any row's
// output, and the largest difference of a log-sum-exp.
type Checked struct {
	Shape
	Error, LSE float64
	Fail       string // why it failed; "": it did not
}

// shapes are all that are tested: every head dimension and profile, lengths that end anywhere in a page, any number of rows.
func shapes(short bool) (out []Shape) {
	add := func(d, heads, rows int, profile string, low bool, softcap, strength float32, tokens ...int) {
		out = append(out, Shape{d, heads, rows, tokens, profile, low, softcap, strength})
	}
	long := 2048
	if short {
		long = 600
	}
	for _, d := range kernels.HeadDims {
		add(d, 1, 4, "balanced", false, 0, 1, long)
		add(d, 2, 1, "balanced", false, 0, 4, 700, 333)
		add(d, 1, 8, "neutral", true, 0, 2, 517)
		add(d, 1, 3, "balanced", true, 0, 2, 512)
		add(d, 1, 11, "balanced", false, 0, 2, 290)
		add(d, 1, 2, "balanced", false, 30, 3, 300)
		add(d, 1, 2, "balanced", false, 0, 2, 17)
		add(d, 1, 2, "balanced", false, 0, 2, 1)
	}
	if !short {
		add(128, 8, 4, "balanced", false, 0, 4, 2032, 2048, 2048, 100)
		add(64, 3, 3, "balanced", false, 0, 12, 2032, 2048, 2048, 2048, 2048)
		add(256, 1, 4, "neutral", true, 50, 4, 2048, 1999)
	}
	return out
}

func profileOf(name string) tiers.Profile {
	if name == "neutral" {
		return tiers.ProfileNeutral
	}
	return tiers.ProfileBalanced
}

// SelfTest compares the device's answers with the Go loop's. An error that is returned is of the test itself.
func SelfTest(ctx context.Context, d *cuda.Device, short bool, say func(string, ...any)) ([]Checked, error) {
	a, err := kernels.New(ctx, d)
	if err != nil {
		return nil, err
	}
	defer a.Close(context.WithoutCancel(ctx))
	var out []Checked
	for i, s := range shapes(short) {
		c, err := check(ctx, d, a, s, uint64(i))
		if err != nil {
			return out, fmt.Errorf("self-test, %+v: %w", s, err)
		}
		if say != nil {
			say("self-test %+v: error %.1e, lse %.1e %s", s, c.Error, c.LSE, c.Fail)
		}
		out = append(out, c)
	}
	return out, nil
}

func check(ctx context.Context, d *cuda.Device, a *kernels.Attention, s Shape, seed uint64) (c Checked, err error) {
	c.Shape = s
	l, err := makeLayer(ctx, s.Tokens, s.Heads, s.HeadDim, profileOf(s.Profile), s.Low, seed)
	if err != nil {
		return c, err
	}
	res := &resident{device: d}
	defer func() {
		if e := res.free(context.WithoutCancel(ctx)); err == nil {
			err = e
		}
	}()
	var segments []kernels.Segment
	for i, x := range l.segments {
		k, err := res.upload(ctx, x, l.pieces[i])
		if err != nil {
			return c, err
		}
		segments = append(segments, k)
	}
	q := l.queries(s.Rows, s.Strength, rand.New(rand.NewPCG(seed, 99)))
	want, err := l.loop(ctx, l.segments, q, s.Softcap)
	if err != nil {
		return c, err
	}
	for _, warps := range []kernels.Warps{{Most: 1, Full: 1}, {Most: 64, Full: 64}} {
		for _, share := range []uint32{kernels.Everything, kernels.Everything - 1} { // of which the second chooses, all
			got, err := answer(ctx, a, segments, warps, q, s.Softcap, share)
			if err != nil {
				return c, err
			}
			c.compare(got, want)
		}
	}
	return c, nil
}

// answer attends once.
func answer(ctx context.Context, a *kernels.Attention, segments []kernels.Segment, warps kernels.Warps, q []float32, softcap float32, share uint32) ([]attention.Partial, error) {
	t, err := a.Upload(ctx, kernels.NewPlan(segments, warps))
	if err != nil {
		return nil, err
	}
	defer a.FreeTables(context.WithoutCancel(ctx), t)
	n, err := a.StartChoosing(ctx, t, q, softcap, share)
	if err != nil {
		return nil, err
	}
	return n.Wait(ctx)
}

func (c *Checked) compare(got, want []attention.Partial) {
	g, w := make([]float32, c.HeadDim), make([]float32, c.HeadDim)
	for i := range got {
		got[i].Output(g)
		want[i].Output(w)
		e := stats.RelativeError(g, w)
		lse := float64(got[i].LSE()) - float64(want[i].LSE())
		c.Error, c.LSE = max(c.Error, e), max(c.LSE, lse, -lse)
		if !(e <= mostError) || !(lse <= mostError && -lse <= mostError) {
			c.Fail = fmt.Sprintf("head %d, row %d: error %v, lse %v", i/c.Rows, i%c.Rows, e, lse)
		}
	}
}
