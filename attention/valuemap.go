package attention

import (
	"math"

	"gonum.org/v1/gonum/floats"
	"gonum.org/v1/gonum/mat"

	"kvtier/attention/kernels"
)

// MapRank is how many directions of keys a ValueMap looks at.
const MapRank = 16

// ValueMapBytes is the stored size of a map of dimension d.
func ValueMapBytes(d int) int { return MeansBytes(2*MapRank, d) }

// ValueMap predicts by how a token's key deviates from its page's mean how its
// value does: keys and values are made of the same hidden states. It is read as it is stored.
type ValueMap struct{ in, out Means }

// FittedMap is a map that is not stored yet.
type FittedMap struct {
	in, out []float32 // [MapRank][d]
	d       int
}

// mapFloor is the floor under the variance of keys, of the mean channel's.
const mapFloor = .02

// FitValueMap finds the map of rank MapRank that leaves least of dv [n][d],
// given dk [n][d]: both are deviations from means.
func FitValueMap(dk, dv []float32, d int) *FittedMap {
	return FitProducts(products(dk, dk, d), products(dk, dv, d), d)
}

// FitProducts is FitValueMap given dk' dk and dk' dv, [d][d] each.
func FitProducts(keys, values []float64, d int) *FittedMap {
	kk, kv := mat.NewDense(d, d, keys), mat.NewDense(d, d, values)
	ridge := mat.NewSymDense(d, nil)
	floor := mapFloor*mat.Trace(kk)/float64(d) + 1e-30
	for i := range d {
		for j := i; j < d; j++ {
			ridge.SetSym(i, j, kk.At(i, j))
		}
		ridge.SetSym(i, i, kk.At(i, i)+floor)
	}
	m := &FittedMap{in: make([]float32, MapRank*d), out: make([]float32, MapRank*d), d: d}
	var chol mat.Cholesky
	var b mat.Dense // [d][d]: dv is about dk b
	if !chol.Factorize(ridge) || chol.SolveTo(&b, kv) != nil {
		return m
	}
	// The directions of values in which predictions vary most: the main ones of b' kk b.
	var half, spread mat.Dense
	half.Scale(-floor, &b) // kk b is kv less what the floor adds
	half.Add(&half, kv)
	spread.Mul(b.T(), &half)
	v := mainDirections(&spread, min(MapRank, d))
	var in mat.Dense
	in.Mul(v, b.T())
	for i := range min(MapRank, d) {
		for j := range d {
			a, b := in.At(i, j), v.At(i, j)
			if !(math.Abs(a) < mostIn) || !(math.Abs(b) <= 2) {
				clear(m.in) // nothing is said of values that are out of all proportion to keys
				return m
			}
			m.in[i*d+j], m.out[i*d+j] = float32(a), float32(b)
		}
	}
	return m
}

// mostIn bounds a map, so that what it says stays finite.
const mostIn = 1e6

// mainDirections returns about the first r eigenvectors [r][d] of the
// symmetric matrix a, by subspace iteration; zeros for those of no weight.
func mainDirections(a *mat.Dense, r int) *mat.Dense {
	d, _ := a.Dims()
	v := mat.DenseCopyOf(a.Slice(0, r, 0, d))
	next := mat.NewDense(r, d, nil)
	for range 8 {
		next.Mul(v, a)
		orthonormalise(next)
		v, next = next, v
	}
	return v
}

// orthonormalise takes of each row what lies along those before it, and brings it to length 1; rows of which nothing is left become 0.
func orthonormalise(v *mat.Dense) {
	const nothing = 1e-12 // of a row
	rows, _ := v.Dims()
	for i := range rows {
		x := v.RawRowView(i)
		length := floats.Norm(x, 2)
		for j := range i {
			y := v.RawRowView(j)
			floats.AddScaled(x, -floats.Dot(x, y), y)
		}
		if left := floats.Norm(x, 2); left > nothing*length {
			floats.Scale(1/left, x)
		} else {
			clear(x)
		}
	}
}

// products returns the sum of x^T y over rows x and y [n][d]: in float32 within a block of rows.
func products(x, y []float32, d int) []float64 {
	const block = 256
	sum, part := make([]float64, d*d), make([]float32, d*d)
	for lo := 0; lo < len(x); lo += block * d {
		hi := min(lo+block*d, len(x))
		kernels.MatMul(part, x[lo:hi], 1, d, y[lo:hi], d, (hi-lo)/d, d)
		for i, p := range part {
			sum[i] += float64(p)
		}
	}
	return sum
}

// Append appends the stored form: 2 MapRank rows, as means of one row each.
func (m *FittedMap) Append(b []byte) []byte {
	deltas := make([]float32, len(m.in))
	b = NewUnits(deltas, m.in, m.d, 1).Append(b, nil)
	return NewUnits(deltas, m.out, m.d, 1).Append(b, nil)
}

// ParseValueMap reads what Append wrote; ok is false if b has another size.
func ParseValueMap(b []byte, d int) (m ValueMap, ok bool) {
	if len(b) != ValueMapBytes(d) {
		return m, false
	}
	half := MeansBytes(MapRank, d)
	return ValueMap{parseMeans(b[:half], d, MapRank), parseMeans(b[half:], d, MapRank)}, true
}

// Add adds what the deviations dk [rows][d] of keys say of their values' to the rows of dst, at least [d].
// scratch has room for MapRank numbers a row.
func (m *ValueMap) Add(dst [][]float32, dk, scratch []float32) {
	m.in.Scores(scratch, MapRank, dk)
	m.out.AddTo(dst, scratch, MapRank)
}
