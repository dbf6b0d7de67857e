package attention

import (
	"math"
	"math/rand/v2"
	"reflect"
	"testing"

	"kvtier/attention/kernels"
)

func randn(rng *rand.Rand, n int, scale float64) []float32 {
	x := make([]float32, n)
	for i := range x {
		x[i] = float32(scale * rng.NormFloat64())
	}
	return x
}

// dense is attention in float64: output and log-sum-exp of one query row.
func dense(q, k, v []float32, d int, softcap float64) ([]float64, float64) {
	n := len(k) / d
	s := make([]float64, n)
	hi := math.Inf(-1)
	for t := range s {
		for j := range d {
			s[t] += float64(q[j]) * float64(k[t*d+j])
		}
		if softcap != 0 {
			s[t] = softcap * math.Tanh(s[t]/softcap)
		}
		hi = max(hi, s[t])
	}
	out, sum := make([]float64, d), 0.
	for t := range s {
		w := math.Exp(s[t] - hi)
		sum += w
		for j := range d {
			out[j] += w * float64(v[t*d+j])
		}
	}
	for j := range out {
		out[j] /= sum
	}
	return out, hi + math.Log(sum)
}

// near says whether a partial is what dense computed.
func near(t *testing.T, p *Partial, want []float64, lse float64) {
	t.Helper()
	got := make([]float32, len(want))
	p.Output(got)
	for j, w := range want {
		if !(math.Abs(float64(got[j])-w) <= 2e-5*(1+math.Abs(w))) {
			t.Fatalf("dim %d: %v, want %v", j, got[j], w)
		}
	}
	if !(math.Abs(float64(p.LSE())-lse) <= 2e-6*(10+math.Abs(lse))) {
		t.Fatalf("log-sum-exp %v, want %v", p.LSE(), lse)
	}
}

// Partials over any split, merged in any order, are dense attention.
func TestMergeAnySplit(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	for range 300 {
		d, n := 16*(1+rng.IntN(4)), 1+rng.IntN(200)
		scale := []float64{.01, 1, 10}[rng.IntN(3)]
		softcap := []float32{0, 0, 30}[rng.IntN(3)]
		q, k, v := randn(rng, d, scale/math.Sqrt(float64(d))), randn(rng, n*d, 1), randn(rng, n*d, 1)
		parts := NewPartials(1+rng.IntN(8), d) // some of them stay empty
		for a := 0; a < n; {
			b := min(n, a+1+rng.IntN(50))
			i := rng.IntN(len(parts))
			Attend(parts[i:i+1], q, k[a*d:b*d], v[a*d:b*d], d, softcap, nil)
			a = b
		}
		sum := NewPartials(1, d)[0]
		for _, i := range rng.Perm(len(parts)) {
			p := parts[i]
			if rng.IntN(2) == 0 { // by way of what a worker hands over
				out := make([]float32, d)
				p.Output(out)
				p = FromOutput(out, p.LSE())
			}
			sum.Merge(&p)
		}
		want, lse := dense(q, k, v, d, float64(softcap))
		near(t, &sum, want, lse)
	}
}

func TestPartialExtremes(t *testing.T) {
	const d = 16
	inf := float32(math.Inf(1))
	ones := make([]float32, d)
	for i := range ones {
		ones[i] = 1
	}
	out := make([]float32, d)

	p := NewPartials(1, d)[0]
	p.Output(out)
	if p.LSE() != -inf || out[0] != 0 {
		t.Errorf("empty: lse %v, output %v", p.LSE(), out[0])
	}
	p.Add(-inf, ones)
	p.AddMass(-inf)
	if p.Sum != 0 || p.LSE() != -inf {
		t.Errorf("a masked token counts: %+v", p)
	}
	e := FromOutput(ones, -inf)
	p.Merge(&e)
	if p.Sum != 0 {
		t.Errorf("an empty partial counts: %+v", p)
	}
	p.Add(-3e38, ones)
	p.Add(3e38, ones)
	p.Add(-inf, ones)
	p.Output(out)
	if p.LSE() != 3e38 || out[3] != 1 {
		t.Errorf("huge scores: lse %v, output %v", p.LSE(), out[3])
	}
	p = NewPartials(1, d)[0]
	p.Add(2, ones)
	p.AddMass(2) // a sink takes half
	if p.Output(out); out[0] != .5 {
		t.Errorf("sink: output %v", out[0])
	}
	// Every token masked: nothing changes, and there is no NaN.
	p = NewPartials(1, d)[0]
	q, k := make([]float32, d), make([]float32, 2*d)
	q[0], k[0], k[d] = 1, -inf, -inf
	Attend([]Partial{p}, q, k, append(ones, ones...), d, 0, nil)
	if p.Sum != 0 {
		t.Errorf("masked rows: %+v", p)
	}
}

func TestAttendVisible(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 4))
	const d, n, rows = 32, 20, 5
	q, k, v := randn(rng, rows*d, .3), randn(rng, n*d, 1), randn(rng, n*d, 1)
	visible := []int{0, 1, 7, 20, 99}
	ps := NewPartials(rows, d)
	Attend(ps, q, k, v, d, 0, visible)
	if ps[0].Sum != 0 {
		t.Error("row 0 sees nothing")
	}
	for r := 1; r < rows; r++ {
		m := min(visible[r], n)
		want, lse := dense(q[r*d:(r+1)*d], k[:m*d], v[:m*d], d, 0)
		near(t, &ps[r], want, lse)
	}
}

// All variants of kernels agree with each other and with attention in order,
// which has the same bits in all of them.
func TestVariantsAgree(t *testing.T) {
	for _, d := range []int{16, 24, 64, 80, 128, 256} {
		for _, rows := range []int{1, 4, 5, 19} {
			const n = 150
			rng := rand.New(rand.NewPCG(uint64(d), uint64(rows)))
			q, k, v := randn(rng, rows*d, 1/math.Sqrt(float64(d))), randn(rng, n*d, 1), randn(rng, n*d, 1)
			var first []Partial
			for _, variant := range kernels.Variants() {
				undo := kernels.Use(variant)
				ps, same := NewPartials(rows, d), NewPartials(rows, d)
				Attend(ps, q, k, v, d, 0, nil)
				AttendInOrder(same, q, k, v, d)
				undo()
				if first == nil {
					first = same
				}
				if !reflect.DeepEqual(first, same) {
					t.Errorf("d %d, %v: attention in order has other bits", d, variant)
				}
				for r := range ps {
					a, b := make([]float32, d), make([]float32, d)
					ps[r].Output(a)
					same[r].Output(b)
					if e := RelativeError(a, b); e > 1e-6 || math.Abs(float64(ps[r].LSE()-same[r].LSE())) > 1e-5 {
						t.Errorf("d %d, %v, row %d: off by %v", d, variant, r, e)
					}
				}
			}
		}
	}
}

func TestRelativeError(t *testing.T) {
	a, b := []float32{3, 4}, []float32{0, 0}
	if e := RelativeError(b, a); e != 1 {
		t.Errorf("all lost: %v", e)
	}
	if e := RelativeError(b, b); e != 0 {
		t.Errorf("both zero: %v", e)
	}
	if e := RelativeError(a, b); e != 1 {
		t.Errorf("nothing expected: %v", e)
	}
}

// Attention to rows of bfloat16 is that to the floats that they are.
func TestAttendBF16(t *testing.T) {
	rng := rand.New(rand.NewPCG(7, 8))
	for _, d := range []int{16, 64, 128} {
		for _, n := range []int{0, 1, 63, 64, 200} {
			const rows = 3
			rounded := func() (b []byte, wide []float32) {
				b, wide = make([]byte, 2*n*d), make([]float32, n*d)
				for i := range wide {
					putBF16(b[2*i:], float32(rng.NormFloat64()))
					wide[i] = bf16(b[2*i:])
				}
				return b, wide
			}
			k, wideK := rounded()
			v, wideV := rounded()
			q := randn(rng, rows*d, 1)
			got, want := NewPartials(rows, d), NewPartials(rows, d)
			AttendBF16(got, q, k, v, d, 20)
			Attend(want, q, wideK, wideV, d, 20, nil)
			a, b := make([]float32, d), make([]float32, d)
			for r := range got {
				got[r].Output(a)
				want[r].Output(b)
				if e := RelativeError(a, b); e > 1e-5 || math.Abs(float64(got[r].LSE()-want[r].LSE())) > 1e-5 {
					t.Errorf("d %d, %d tokens: error %v", d, n, e)
				}
			}
		}
	}
}

func TestAllocations(t *testing.T) {
	const d, n = 64, 128
	rng := rand.New(rand.NewPCG(5, 6))
	ps, q, k, v := NewPartials(2, d), randn(rng, 2*d, 1), randn(rng, n*d, 1), randn(rng, n*d, 1)
	if a := testing.AllocsPerRun(10, func() {
		Attend(ps, q, k, v, d, 0, nil)
		ps[0].Merge(&ps[1])
	}); a != 0 {
		t.Errorf("%v allocations", a)
	}
}

func BenchmarkAttend(b *testing.B) {
	const d, n = 64, 2048
	rng := rand.New(rand.NewPCG(5, 6))
	ps, q, k, v := NewPartials(3, d), randn(rng, 3*d, 1), randn(rng, n*d, 1), randn(rng, n*d, 1)
	for b.Loop() {
		Attend(ps, q, k, v, d, 0, nil)
	}
}
