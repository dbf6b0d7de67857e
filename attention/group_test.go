package attention

import (
	"cmp"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"testing"

	"gonum.org/v1/gonum/mat"

	"kvtier/attention/kernels"
)

func TestArrange(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	sizes := []int{1, 2, 15, 16, 17, 63, 64, 65, 255, 256, 257, 300, 511, 1000, 1999, 2032, 2047, 2048}
	for range 10 {
		sizes = append(sizes, 1+rng.IntN(2048))
	}
	for _, n := range sizes {
		const d = 16
		keys := randn(rng, n*d, 1)
		if n%2 == 0 { // with many equal keys
			for t := range n / 2 {
				copy(keys[t*d:(t+1)*d], keys[:d])
			}
		}
		m := NewQuerySum(d).Metric()
		values := randn(rng, n*d, 1)
		o := Arrange(keys, values, d, m, 7)
		if !slices.Equal(o.Tokens, Arrange(keys, values, d, m, 7).Tokens) {
			t.Fatalf("n %d: not repeatable", n)
		}
		outliers := 0
		if n >= minGrouped {
			outliers = n - (n-n/outlierShare)/PageTokens*PageTokens
		}
		if o.Body != n-outliers || len(o.Tokens) != n {
			t.Fatalf("n %d: body %d of %d places", n, o.Body, len(o.Tokens))
		}
		drainsAreSmallest(t, o, values, d)
		sorted := slices.Clone(o.Tokens)
		slices.Sort(sorted)
		for i, x := range sorted {
			if i != x {
				t.Fatalf("n %d: no permutation", n)
			}
		}
	}
}

// The outliers' first leaf holds the tokens of the smallest values.
func drainsAreSmallest(t *testing.T, o Order, values []float32, d int) {
	t.Helper()
	out := o.Tokens[o.Body:]
	drains := out[:min(LeafTokens, len(out))]
	norm := func(x int) float32 { return Norm2(values[x*d : (x+1)*d]) }
	all := slices.Clone(o.Tokens)
	slices.SortFunc(all, func(i, j int) int { return cmp.Compare(norm(i), norm(j)) })
	for _, x := range drains {
		if norm(x) > norm(all[len(drains)-1]) {
			t.Fatalf("n %d: token %d is no drain", len(o.Tokens), x)
		}
	}
}

// Tokens of one cluster lie together, and a token unlike all others is an outlier.
func TestArrangeGroups(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 4))
	const d, n = 32, 2048
	keys := randn(rng, n*d, .1)
	centres := randn(rng, 31*d, 3)
	for t := range n {
		if t%32 == 5 {
			copy(keys[t*d:(t+1)*d], randn(rng, d, 9)) // like nothing else
		} else {
			Axpy(keys[t*d:(t+1)*d], 1, centres[t%31*d:(t%31+1)*d])
		}
	}
	o := Arrange(keys, randn(rng, n*d, 1), d, NewQuerySum(d).Metric(), 1)
	for _, x := range o.Tokens[o.Body+LeafTokens:] {
		if x%32 != 5 {
			t.Errorf("token %d is no outlier", x)
		}
	}
	mixed := 0
	for l := 0; l < o.Body; l += LeafTokens {
		leaf := o.Tokens[l:min(l+LeafTokens, o.Body)]
		for _, x := range leaf[1:] {
			if x%31 != leaf[0]%31 {
				mixed++
				break
			}
		}
	}
	if mixed > 40 { // clusters of 64 or so on 31 pages: borders cannot all agree
		t.Errorf("%d of 124 leaves are mixed", mixed)
	}
}

func TestMetric(t *testing.T) {
	rng := rand.New(rand.NewPCG(5, 6))
	const d, n = 24, 500
	q := randn(rng, n*d, 1)
	for i := range q {
		q[i] *= float32(1+i%d) / 4
	}
	sum := NewQuerySum(d)
	sum.Add(q[:100*d])
	half := sum.Clone()
	sum.Add(q[100*d:])
	if half.Rows() != 100 || sum.Rows() != n {
		t.Fatalf("rows %v, %v", half.Rows(), sum.Rows())
	}
	m := sum.Metric()

	// C by its definition.
	c, norm2 := make([]float64, d*d), 0.
	for r := range n {
		row := q[r*d : (r+1)*d]
		n2 := 0.
		for _, x := range row {
			n2 += float64(x) * float64(x)
		}
		norm2 += n2 / n
		for i := range d {
			for j := range d {
				c[i*d+j] += float64(row[i]) * float64(row[j]) / n2 / n
			}
		}
	}
	trace := 0.
	for i := range c {
		if math.Abs(c[i]-float64(m.C[i])) > 1e-5 {
			t.Fatalf("C[%d] = %v, want %v", i, m.C[i], c[i])
		}
		if i%(d+1) == 0 {
			trace += float64(m.C[i])
		}
	}
	if math.Abs(trace-1) > 1e-5 || math.Abs(norm2/float64(m.Norm2)-1) > 1e-5 {
		t.Fatalf("trace %v, norm2 %v, want %v", trace, m.Norm2, norm2)
	}
	// W is symmetric, and W^4 is C with a floor of a tenth of the mean eigenvalue.
	w := mat.NewDense(d, d, nil)
	for i := range d {
		for j := range d {
			if math.Abs(float64(m.W[i*d+j]-m.W[j*d+i])) > 1e-6 {
				t.Fatal("W is not symmetric")
			}
			w.Set(i, j, float64(m.W[i*d+j]))
		}
	}
	var w2, w4 mat.Dense
	w2.Mul(w, w)
	w4.Mul(&w2, &w2)
	for i := range d {
		for j := range d {
			want := c[i*d+j]
			if i == j {
				want += metricFloor / d
			}
			if math.Abs(w4.At(i, j)-want) > 1e-5 {
				t.Fatalf("W^4[%d,%d] = %v, want %v", i, j, w4.At(i, j), want)
			}
		}
	}
	// The spread of a displacement is the mean square of its scores.
	delta := randn(rng, d, 1)
	want := 0.
	for r := range n {
		row := q[r*d : (r+1)*d]
		s := float64(Dot(row, delta))
		want += s * s / float64(Dot(row, row)) / n
	}
	if got := float64(m.Spreads(delta)[0]); math.Abs(got/want-1) > 1e-4 {
		t.Fatalf("spread %v, want %v", got, want)
	}
	x := randn(rng, 2*d, 1)
	y := make([]float32, len(x))
	m.apply(y, x)
	for i := range d {
		if math.Abs(float64(y[d+i]-Dot(m.W[i*d:(i+1)*d], x[d:]))) > 1e-5 {
			t.Fatal("Apply is not W x")
		}
	}
}

func TestMetricOfFewQueries(t *testing.T) {
	const d = 16
	s := NewQuerySum(d)
	inf := float32(math.Inf(1))
	s.Add(make([]float32, 3*d))                   // zero queries have no direction
	s.Add(slices.Repeat([]float32{inf}, d))       // nor have these
	s.Add(slices.Repeat([]float32{-inf, inf}, 8)) // a NaN among its products
	s.Add(slices.Repeat([]float32{1e30}, d))      // |q|^2 overflows
	if s.Rows() != 0 {
		t.Fatalf("%v queries counted", s.Rows())
	}
	m := s.Metric()
	x := []float32{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16}
	y := make([]float32, len(x))
	if m.apply(y, x); m.W != nil || !slices.Equal(y, x) || m.Norm2 != 0 {
		t.Error("not the identity")
	}
	if got, want := m.Spreads(x)[0], Dot(x, x)/d; math.Abs(float64(got/want-1)) > 1e-6 {
		t.Errorf("spread %v, want %v", got, want)
	}
	// One direction only: the floor keeps W invertible.
	s.Add(slices.Repeat(append([]float32{2}, make([]float32, d-1)...), 20))
	s.Decay()
	m = s.Metric()
	if s.Rows() != 10 || m.Norm2 != 4 {
		t.Errorf("rows %v, norm2 %v", s.Rows(), m.Norm2)
	}
	if m.W[d+1] < .2 || m.W[0] < .9 {
		t.Errorf("W = diag(%v, %v, ...)", m.W[0], m.W[d+1])
	}
}

func TestTop(t *testing.T) {
	rng := rand.New(rand.NewPCG(7, 8))
	for range 3000 {
		n := rng.IntN(300)
		kinds := 1 + rng.IntN(1+n) // many duplicates, or few
		v := make([]float32, n)
		for i := range v {
			v[i] = float32(rng.IntN(kinds))
		}
		switch rng.IntN(4) {
		case 0:
			slices.Sort(v)
		case 1:
			slices.Sort(v)
			slices.Reverse(v)
		}
		k := rng.IntN(n+3) - 1
		want := make([]int, n)
		for i := range want {
			want[i] = i
		}
		slices.SortStableFunc(want, func(i, j int) int { return cmp.Compare(v[j], v[i]) })
		want = want[:max(0, min(k, n))]
		slices.Sort(want)
		if got := Top(v, k); !slices.Equal(got, want) {
			t.Fatalf("Top(%v, %d) = %v, want %v", v, k, got, want)
		}
	}
	inf := float32(math.Inf(1))
	if got := Top([]float32{0, inf, -inf, inf}, 2); !slices.Equal(got, []int{1, 3}) {
		t.Errorf("with infinities: %v", got)
	}
}

func TestMeans(t *testing.T) {
	rng := rand.New(rand.NewPCG(9, 10))
	for _, d := range []int{16, 64, 80, 128, 256} {
		for _, n := range []int{1, 15, 16, 17, 100} {
			x := randn(rng, n*d, 2)
			sum := NewQuerySum(d)
			sum.Add(randn(rng, 2*d*d, 1))
			for _, spread := range []func([]float32) []float32{sum.Metric().Spreads, func(x []float32) []float32 { return Norms2(x, d) }} {
				units := (n + LeafTokens - 1) / LeafTokens
				b := NewUnits(make([]float32, len(x)), x, d, LeafTokens).Append([]byte("before"), spread)
				if len(b) != 6+MeansBytes(units, d) {
					t.Fatalf("%d bytes", len(b))
				}
				meta := 6 + MeansMetaBytes(units)
				m := MeansOf(b[6:meta], b[meta:], d)
				if m.Units() != units {
					t.Fatalf("%d units, not %d", m.Units(), units)
				}
				q := randn(rng, d, 1)
				for u := range units {
					checkMean(t, m, u, x[u*LeafTokens*d:min((u+1)*LeafTokens, n)*d], q, spread)
				}
			}
		}
	}
}

func checkMean(t *testing.T, m Means, u int, x, q []float32, spread func([]float32) []float32) {
	t.Helper()
	d := len(q)
	mean, got := Mean(x, d), make([]float32, d)
	scores, norms2 := make([]float32, m.Units()), make([]float32, m.Units())
	m.Scores(scores, m.Units(), q)
	if e := scores[u] - Dot(q, mean); float32(math.Abs(float64(e))) > bound(mean)*norm1(q) {
		t.Fatalf("score is off by %v", e)
	}
	m.Row(got, u)
	if m.Norms2(norms2); math.Abs(float64(norms2[u]-Norm2(got))) > 1e-5*float64(norms2[u]) {
		t.Fatalf("|mean|^2 is %v, not %v", norms2[u], Norm2(got))
	}
	for j := range got {
		if float32(math.Abs(float64(got[j]-mean[j]))) > bound(mean) {
			t.Fatalf("mean %v, want %v", got[j], mean[j])
		}
	}
	var want float64
	delta := make([]float32, d)
	for i := 0; i < len(x); i += d {
		kernels.Deviations(delta, x[i:i+d], mean)
		want += float64(spread(delta)[0]) / float64(len(x)/d)
	}
	if s := float64(m.Spread(u)); s < want*(1-1e-5) || s > want*1.01+1e-30 {
		t.Fatalf("spread %v, want %v", s, want)
	}
}

// bound is how far an int8 code may be off: half a step, rounded up to bfloat16.
func bound(x []float32) float32 {
	var hi float32
	for _, v := range x {
		hi = max(hi, float32(math.Abs(float64(v))))
	}
	return hi / 127 * .51
}

func norm1(x []float32) (s float32) {
	for _, v := range x {
		s += float32(math.Abs(float64(v)))
	}
	return s
}

func TestPresenceAndMass(t *testing.T) {
	if got, want := Mass(16, 2, 1), float32(math.Log(16))+2.5; math.Abs(float64(got-want)) > 1e-6 {
		t.Errorf("mass %v, want %v", got, want)
	}
	if Mass(1, 0, 1e9) != MassClip {
		t.Error("spread is not clipped")
	}
	if got, want := Presence(16, 2, 9), float32(math.Log(16)+2+3*math.Sqrt(2*math.Log(16))); math.Abs(float64(got-want)) > 1e-5 {
		t.Errorf("presence %v, want %v", got, want)
	}
	if p := Presence(16, 0, math.MaxFloat32); math.IsInf(float64(p), 0) || math.IsNaN(float64(p)) {
		t.Errorf("presence %v of the largest spread", p)
	}
	for _, x := range []float32{0, 1, 1.00001, 3e-39, math.MaxFloat32} {
		up := bf16Up(x)
		if math.Float32bits(up)&0xffff != 0 || up < x && x < 3e38 {
			t.Errorf("bf16Up(%v) = %v", x, up)
		}
	}
}

func BenchmarkArrange(b *testing.B) {
	for _, d := range []int{64, 256} {
		b.Run(map[int]string{64: "d64", 256: "d256"}[d], func(b *testing.B) {
			rng := rand.New(rand.NewPCG(5, 6))
			keys := randn(rng, 2048*d, 1)
			s := NewQuerySum(d)
			s.Add(randn(rng, d*d, 1))
			m := s.Metric()
			for b.Loop() {
				Arrange(keys, keys, d, m, 1)
			}
		})
	}
}

// BenchmarkMetric makes a metric of queries that lie in few directions.
func BenchmarkMetric(b *testing.B) {
	for _, d := range []int{64, 128, 256} {
		b.Run(fmt.Sprint(d), func(b *testing.B) {
			rng := rand.New(rand.NewPCG(5, 6))
			sum, q := NewQuerySum(d), randn(rng, 2*d*d, 1)
			for i := range q {
				q[i] /= float32(1 + i%d)
			}
			sum.Add(q)
			for b.Loop() {
				sum.Metric()
			}
		})
	}
}
