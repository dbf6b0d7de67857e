package quality

import (
	"archive/zip"
	"errors"
	"fmt"
	"math"
	"slices"
)

// Dump is one layer of a model over a text: post-RoPE, queries not scaled.
type Dump struct {
	Tokens, Heads, Group, Dim int // KV heads; query heads a KV head
	Queries                   int // the last positions, all of which are asked
	Q                         []float32
	K, V                      []float32 // [Tokens][Heads][Dim]
	Sample                    []float32 // [len(SamplePos)][Heads*Group][Dim], earlier queries
	SamplePos                 []int
}

// ReadDump reads a .npz with the arrays q [queries][q heads][dim], k and v
// [tokens][kv heads][dim], and optionally q_sample [m][q heads][dim] with
// q_sample_pos [m], in float32 or float16. scale multiplies queries; 0 means 1/sqrt(dim).
func ReadDump(path string, scale float64) (*Dump, error) {
	z, err := zip.OpenReader(path)
	if err != nil {
		return nil, fmt.Errorf("dump %s: %w", path, err)
	}
	defer z.Close()
	d, err := parseDump(&z.Reader, scale)
	if err != nil {
		return nil, fmt.Errorf("dump %s: %w", path, err)
	}
	return d, nil
}

func parseDump(z *zip.Reader, scale float64) (*Dump, error) {
	arrays := make(map[string]*array)
	for _, name := range []string{"q", "k", "v", "q_sample", "q_sample_pos"} {
		if name == "q_sample" && !has(z, "q_sample") {
			break
		}
		a, err := readArray(z, name)
		if err != nil {
			return nil, err
		}
		arrays[name] = a
	}
	q, k, v := arrays["q"], arrays["k"], arrays["v"]
	for _, a := range []*array{q, k, v} {
		if len(a.shape) != 3 || len(a.f32) == 0 {
			return nil, errors.New("q, k and v have to be [n][heads][dim], of floats, and not empty")
		}
	}
	d := &Dump{Tokens: k.shape[0], Heads: k.shape[1], Dim: k.shape[2], Queries: q.shape[0], Q: q.f32, K: k.f32, V: v.f32}
	d.Group = q.shape[1] / d.Heads
	switch {
	case !slices.Equal(k.shape, v.shape):
		return nil, fmt.Errorf("k is %v and v is %v", k.shape, v.shape)
	case q.shape[2] != d.Dim || q.shape[1] != d.Group*d.Heads:
		return nil, fmt.Errorf("q is %v and k is %v: head dimensions differ, or query heads are no multiple of KV heads", q.shape, k.shape)
	case d.Queries > d.Tokens:
		return nil, fmt.Errorf("%d queries of %d tokens", d.Queries, d.Tokens)
	}
	if err := d.sample(arrays["q_sample"], arrays["q_sample_pos"], q.shape); err != nil {
		return nil, err
	}
	if scale == 0 {
		scale = 1 / math.Sqrt(float64(d.Dim))
	}
	for _, x := range [][]float32{d.Q, d.Sample} {
		for i := range x {
			x[i] *= float32(scale)
		}
	}
	return d, nil
}

func (d *Dump) sample(s, pos *array, q []int) error {
	if s == nil {
		return nil
	}
	if len(s.shape) != 3 || s.f32 == nil || !slices.Equal(s.shape[1:], q[1:]) {
		return fmt.Errorf("q_sample is %v, not [m][%d][%d] of floats", s.shape, q[1], q[2])
	}
	if pos.i64 == nil || len(pos.i64) != s.shape[0] {
		return fmt.Errorf("q_sample_pos is %v, not one integer for each of %d samples", pos.shape, s.shape[0])
	}
	for i, p := range pos.i64 {
		if p < 0 || p >= int64(d.Tokens) || i > 0 && p <= pos.i64[i-1] {
			return errors.New("q_sample_pos has to rise, within the tokens")
		}
		d.SamplePos = append(d.SamplePos, int(p))
	}
	d.Sample = s.f32
	return nil
}

func has(z *zip.Reader, name string) bool {
	return slices.ContainsFunc(z.File, func(f *zip.File) bool { return f.Name == name+".npy" })
}

// query returns the queries of one KV head's group at the i-th position that
// asks: [Group][Dim].
func (d *Dump) query(head, i int) []float32 { return groupRows(d.Q, d, head, i) }

func groupRows(x []float32, d *Dump, head, i int) []float32 {
	w := d.Group * d.Dim
	at := (i*d.Heads + head) * w
	return x[at : at+w]
}

// sampled returns the sampled queries of a group at positions [lo, hi).
func (d *Dump) sampled(head, lo, hi int) (out []float32) {
	for i, p := range d.SamplePos {
		if p >= lo && p < hi {
			out = append(out, groupRows(d.Sample, d, head, i)...)
		}
	}
	return out
}

// head returns one KV head's rows of x [Tokens][Heads][Dim].
func (d *Dump) head(x []float32, head int) []float32 {
	out := make([]float32, 0, d.Tokens*d.Dim)
	for t := range d.Tokens {
		at := (t*d.Heads + head) * d.Dim
		out = append(out, x[at:at+d.Dim]...)
	}
	return out
}
