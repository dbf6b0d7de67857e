package attention

import (
	"math"

	"kvtier/attention/kernels"
)

// Keys are compared after multiplication with C^(1/4). The full metric, C^(1/2), has lower mean error but hides
// single strong tokens. Both are from experiments on SmolLM2-135M and Gemma-3-270M (docs/decisions/0002-query-metric.md).
const (
	// metricFloor keeps directions that no query has used yet: a share of the
	// mean eigenvalue.
	metricFloor = .1
)

// QuerySum collects the second moment of the queries of one KV head's group:
// the metric in which keys are alike if queries treat them alike.
type QuerySum struct {
	d     int
	n     float64
	norm2 float64   // sum of |q|^2
	c     []float64 // sum of q q^T / |q|^2: the upper triangle, row by row; nil before the first query
}

// NewQuerySum returns an empty sum for head dimension d. It takes no memory to
// speak of before the first query, and 4 d² bytes then.
func NewQuerySum(d int) *QuerySum { return &QuerySum{d: d} }

// Add takes in queries q [rows][d], already scaled. Each counts with unit
// length, so that a head with large queries does not rule its group.
func (s *QuerySum) Add(q []float32) {
	for ; len(q) >= s.d; q = q[s.d:] {
		row := q[:s.d]
		n2 := float64(Dot(row, row))
		if n2 == 0 || math.IsInf(n2, 0) || math.IsNaN(n2) {
			continue // says nothing of a direction
		}
		if s.c == nil {
			s.c = make([]float64, s.d*(s.d+1)/2)
		}
		s.n++
		s.norm2 += n2
		c := s.c
		for i, a := range row {
			f := float64(a) / n2
			for j, b := range row[i:] {
				c[j] += f * float64(b)
			}
			c = c[s.d-i:]
		}
	}
}

// Decay halves the weight of what was seen so far, so that the metric follows the text.
func (s *QuerySum) Decay() {
	s.n, s.norm2 = s.n/2, s.norm2/2
	for i := range s.c {
		s.c[i] /= 2
	}
}

// Rows returns how many queries the sum stands for, after decay.
func (s *QuerySum) Rows() float64 { return s.n }

// Clone returns an independent copy.
func (s *QuerySum) Clone() *QuerySum {
	t := *s
	t.c = append([]float64(nil), s.c...)
	return &t
}

// Metric is how keys of one KV head are compared.
type Metric struct {
	d int
	// W [d][d] is (C + floor)^(1/4); nil means the identity.
	W []float32
	// C [d][d] is E[q q^T] of unit queries, with trace 1.
	C []float32
	// Norm2 is the mean of |q|^2; 0 if no queries were seen.
	Norm2 float32
}

// minQueries is how many queries a metric needs for each dimension; with
// fewer, keys are compared as they are.
const minQueries = .5

// Metric makes the metric of the queries seen.
func (s *QuerySum) Metric() *Metric {
	d := s.d
	m := &Metric{d: d, C: make([]float32, d*d)}
	if s.n < minQueries*float64(d) {
		for i := range d {
			m.C[i*d+i] = 1 / float32(d)
		}
		return m
	}
	m.Norm2 = float32(s.norm2 / s.n)
	c := s.c
	for i := range d {
		for j := i; j < d; j++ {
			v := float32(c[j-i] / s.n)
			m.C[i*d+j], m.C[j*d+i] = v, v
		}
		c = c[d-i:]
	}
	w := append([]float32(nil), m.C...)
	for i := 0; i < d*d; i += d + 1 {
		w[i] += metricFloor / float32(d) // the trace is 1
	}
	m.W = fourthRoot(w, d, metricFloor/float32(d))
	return m
}

// fourthRoot returns a^(1/4) of the symmetric positive definite a [d][d], of which no eigenvalue is below least; nil if it is not to be had. It is
// Newton's iteration for the inverse root, of products alone: while m = a/scale becomes the identity,
// x becomes m^(-1/4) (Guo and Higham, SIAM J. Matrix Anal. Appl. 28, 2006).
//
// A step takes each eigenvalue y of m to y (u (1 - c y))^4. Newton's c is 1/5, which takes small ones up by 2.4. With a larger c
// and u such that the largest of the results is 1, they go up by as much as c / .082, and those near 1 come down: as far as the least has come up, if
// c is chosen by it.
func fourthRoot(a []float32, d int, least float32) []float32 {
	const (
		most   = 60   // steps; 8 or so are needed
		near   = 1e-3 // what is lacking is squared once more
		newton = .2
		peak   = .08192 // c u^4, where the largest result, that of y = 1/(5c), is 1
	)
	scale := float32(math.Sqrt(float64(Norm2(a)))) // at least the largest eigenvalue
	base, m, x, t, u := make([]float32, d*d), make([]float32, d*d), make([]float32, d*d), make([]float32, d*d), make([]float32, d*d)
	for i, y := range a {
		base[i] = y / scale
	}
	copy(m, base)
	for i := 0; i < d*d; i += d + 1 {
		x[i] = 1
	}
	times := func(dst, y, z []float32) { kernels.MatMul(dst, y, d, 1, z, d, d, d) }
	low := float64(min(1, least/scale)) // no eigenvalue of m is below
	for range most {
		c := max(newton, 1-math.Sqrt(math.Sqrt(low)))
		unit := math.Sqrt(math.Sqrt(c / peak))
		low *= c / peak * math.Pow(1-c*low, 4)
		for i, y := range m {
			t[i] = float32(-c*unit) * y
		}
		off := float32(0) // sum of what eigenvalues, none of which is above 1, lack
		for i := 0; i < d*d; i += d + 1 {
			t[i] += float32(unit)
			off += 1 - m[i]
		}
		times(u, x, t)
		x, u = u, x
		if off < near {
			times(u, x, x)
			times(t, u, x)
			times(u, t, base)
			root := float32(math.Sqrt(math.Sqrt(float64(scale))))
			for i := range u {
				u[i] *= root
			}
			return u
		}
		times(u, t, t)
		times(t, u, u)
		times(u, t, m)
		m, u = u, m
	}
	return nil
}

// apply writes W x to y, for rows x [n][d].
func (m *Metric) apply(y, x []float32) {
	if m.W == nil {
		copy(y, x)
		return
	}
	kernels.MatMul(y, x, m.d, 1, m.W, len(x)/m.d, m.d, m.d) // W is symmetric
}

// Square returns E[q_j^2] of unit queries for channel j, with the floor.
func (m *Metric) Square(j int) float32 {
	return m.C[j*m.d+j] + metricFloor/float32(m.d)
}

// Spreads returns delta^T C delta of rows deltas [n][d]: the variance of the score, over unit
// queries, that a displacement delta of a key makes.
func (m *Metric) Spreads(deltas []float32) []float32 {
	d, n := m.d, len(deltas)/m.d
	const some = 64
	products, out := make([]float32, min(n, some)*d), make([]float32, 0, n)
	for ; len(deltas) > 0; deltas = deltas[min(some*d, len(deltas)):] {
		rows := deltas[:min(some*d, len(deltas))]
		kernels.MatMul(products, rows, d, 1, m.C, len(rows)/d, d, d)
		for at := 0; at < len(rows); at += d {
			out = append(out, max(0, Dot(products[at:at+d], rows[at:at+d])))
		}
	}
	return out
}
