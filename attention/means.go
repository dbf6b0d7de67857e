package attention

import (
	"encoding/binary"
	"math"

	"kvtier/attention/kernels"
)

// meanMeta is the bytes of a unit's scale and spread: two bfloat16.
const meanMeta = 4

// MeansBytes is the size of the mean rows of some units of dimension d.
func MeansBytes(units, d int) int { return units * (meanMeta + d) }

// MeansMetaBytes is the size of what comes before the rows: scales and spreads.
func MeansMetaBytes(units int) int { return units * meanMeta }

// Spreads are numbers, at least 0, as bfloat16: the spread of the rows of some units whose means are elsewhere.
type Spreads []byte

// SpreadsBytes is the size of the spreads of some units.
func SpreadsBytes(units int) int { return 2 * units }

// Of returns the spread of unit u.
func (s Spreads) Of(u int) float32 { return bf16(s[2*u:]) }

// Read writes the spreads of the first len(dst) units to dst.
func (s Spreads) Read(dst []float32) { kernels.WidenBF16(dst, s) }

// Means is what is known of the rows of some units, pages or leaves, without
// reading them: for each unit the scale of its mean row and the spread of its
// rows, as bfloat16; then all means int8 [units][d].
type Means struct {
	meta, codes []byte
	d           int
}

// Units are rows [n][d] in runs of some, each with its mean row.
type Units struct {
	Means  []float32 // [units][d]
	Deltas []float32 // [n][d], the rows less their units' means
	d, run int
}

// NewUnits makes units of rows x [n][d] in runs of so many; deltas is room for as many rows.
func NewUnits(deltas, x []float32, d, run int) *Units {
	u := &Units{Deltas: deltas[:len(x)], d: d, run: run}
	for lo := 0; lo < len(x); lo += run * d {
		hi := min(lo+run*d, len(x))
		mean := Mean(x[lo:hi], d)
		kernels.Deviations(u.Deltas[lo:hi], x[lo:hi], mean)
		u.Means = append(u.Means, mean...)
	}
	return u
}

// Deviate makes the rows x [n][d], of which the units are, deviate from other means [units][d].
func (u *Units) Deviate(x, means []float32) {
	u.Means = means
	for i, size := 0, u.run*u.d; i*size < len(x); i++ {
		lo, hi := i*size, min((i+1)*size, len(x))
		kernels.Deviations(u.Deltas[lo:hi], x[lo:hi], means[i*u.d:(i+1)*u.d])
	}
}

// Append appends the units' means as Means has them. spreads says of rows' distances [..][d] from their unit's mean how far that is:
// a square, of which the mean over the unit is kept, rounded up; nil: 0.
func (u *Units) Append(b []byte, spreads func(deltas []float32) []float32) []byte {
	units, at := len(u.Means)/u.d, len(b)
	b = append(b, make([]byte, MeansBytes(units, u.d))...)
	m := parseMeans(b[at:], u.d, units)
	for i := range units {
		putBF16(m.meta[i*meanMeta:], packInt8(m.codes[i*u.d:(i+1)*u.d], u.Means[i*u.d:(i+1)*u.d]))
	}
	if spreads != nil {
		for i, x := range u.spreads(spreads(u.Deltas)) {
			putBF16(m.meta[i*meanMeta+2:], x)
		}
	}
	return b
}

// AppendSpreads appends the units' spreads alone, as Spreads has them.
func (u *Units) AppendSpreads(b []byte, spreads func(deltas []float32) []float32) []byte {
	for _, x := range u.spreads(spreads(u.Deltas)) {
		b = append(b, 0, 0)
		putBF16(b[len(b)-2:], x)
	}
	return b
}

// spreads returns the means over units of x [n], rounded up to a bfloat16.
func (u *Units) spreads(x []float32) (out []float32) {
	for ; len(x) > 0; x = x[min(u.run, len(x)):] {
		run, sum := x[:min(u.run, len(x))], 0.
		for _, y := range run {
			sum += float64(y)
		}
		out = append(out, bf16Up(float32(sum/float64(len(run)))))
	}
	return out
}

// MeansOf returns the means of units of which meta holds scales and spreads and rows the rows; without rows what this returns is for Add.
func MeansOf(meta, rows []byte, d int) Means { return Means{meta: meta, codes: rows, d: d} }

func parseMeans(b []byte, d, units int) Means {
	return Means{meta: b[:units*meanMeta], codes: b[units*meanMeta:], d: d}
}

// Add appends units [lo, hi) of another, of the same dimension: a copy. The zero Means takes any. Rows that are missing
// are 0 until they are put in.
func (m *Means) Add(o Means, lo, hi int) {
	m.d = o.d
	m.meta = append(m.meta, o.meta[lo*meanMeta:hi*meanMeta]...)
	if o.codes == nil {
		m.codes = append(m.codes, make([]byte, (hi-lo)*o.d)...)
		return
	}
	m.codes = append(m.codes, o.codes[lo*o.d:hi*o.d]...)
}

// Put puts in the mean row of unit u, as it is stored, [d].
func (m *Means) Put(u int, row []byte) { copy(m.codes[u*m.d:(u+1)*m.d], row) }

// Reset takes all units out of what Add made.
func (m *Means) Reset() { m.meta, m.codes = m.meta[:0], m.codes[:0] }

// Units returns the number of units.
func (m Means) Units() int { return len(m.meta) / meanMeta }

// Scores writes the products of the rows q [rows][d] and all means to dst
// [rows][units], a row beginning every stride.
func (m Means) Scores(dst []float32, stride int, q []float32) {
	kernels.DotsInt8(dst, stride, q, m.codes, m.d)
	m.scaleRows(dst, stride, len(q)/m.d)
}

// AddTo adds to each row of out, at least [d], all means, weighted by its row of w [rows][units], a row
// beginning every stride. It multiplies w by the means' scales.
func (m Means) AddTo(out [][]float32, w []float32, stride int) {
	m.scaleRows(w, stride, len(out))
	kernels.AxpysInt8(out, w, stride, m.codes, m.d)
}

// Prefetch has the processor fetch the mean rows, and PrefetchMeta their scales and spreads.
func (m Means) Prefetch()     { kernels.Prefetch(m.codes) }
func (m Means) PrefetchMeta() { kernels.Prefetch(m.meta) }

// Norms2 writes the squares of the norms of all means to dst [units].
func (m Means) Norms2(dst []float32) {
	kernels.SquaresInt8(dst, m.codes, m.d)
	m.scaleRows(dst, 0, 1)
	m.scaleRows(dst, 0, 1)
}

// scaleRows multiplies rows of x, [units] each, by the means' scales.
func (m Means) scaleRows(x []float32, stride, rows int) {
	var scales [64]float32 // of some units: they are decoded once for all rows
	for at, n := 0, m.Units(); at < n; at += len(scales) {
		some := scales[:min(len(scales), n-at)]
		for i, meta := 0, m.meta[at*meanMeta:]; i < len(some); i, meta = i+1, meta[meanMeta:] {
			some[i] = bf16(meta)
		}
		for r := range rows {
			kernels.Multiply(x[r*stride+at:][:len(some)], some)
		}
	}
}

func (m Means) scale(u int) float32 { return bf16(m.meta[u*meanMeta:]) }

// Spread returns the mean of the spread within unit u.
func (m Means) Spread(u int) float32 { return bf16(m.meta[u*meanMeta+2:]) }

// SumOfSpreads returns the sum of the spreads of all units.
func (m Means) SumOfSpreads() (sum float32) {
	for meta := m.meta; len(meta) >= meanMeta; meta = meta[meanMeta:] {
		sum += bf16(meta[2:])
	}
	return sum
}

// Row writes the mean of unit u to dst [d].
func (m Means) Row(dst []float32, u int) {
	f := m.scale(u)
	for i, c := range m.codes[u*m.d : (u+1)*m.d] {
		dst[i] = f * float32(int8(c))
	}
}

// Norms2 is the spread of values, of rows deltas [n][d]: |delta|^2.
func Norms2(deltas []float32, d int) []float32 {
	out := make([]float32, len(deltas)/d)
	for i := range out {
		out[i] = Norm2(deltas[i*d : (i+1)*d])
	}
	return out
}

// Norm2 returns |delta|^2.
func Norm2(delta []float32) float32 { return Dot(delta, delta) }

// packInt8 writes round(x/scale) and returns the scale, a bfloat16.
func packInt8(dst []byte, x []float32) float32 {
	var hi float32
	for _, v := range x {
		hi = max(hi, float32(math.Abs(float64(v))))
	}
	scale := bf16Up(hi / 127)
	if scale == 0 {
		return 0
	}
	for i, v := range x {
		dst[i] = byte(int8(min(127, max(-127, math.RoundToEven(float64(v/scale))))))
	}
	return scale
}

// bf16Up returns the least bfloat16 that is not below x, x >= 0; at most the largest finite one.
func bf16Up(x float32) float32 {
	bits := math.Float32bits(x)
	if bits&0xffff != 0 {
		bits = bits&^0xffff + 0x10000
	}
	return math.Float32frombits(min(bits, 0x7f7f0000))
}

func bf16(b []byte) float32 {
	return math.Float32frombits(uint32(binary.LittleEndian.Uint16(b)) << 16)
}

func putBF16(b []byte, x float32) {
	binary.LittleEndian.PutUint16(b, uint16(math.Float32bits(x)>>16))
}

// MassClip limits how far the spread of a unit's keys may raise the mass that
// stands for its tokens when they are not read (docs/decisions/0003-presence-and-mass.md).
const MassClip = 1

// Presence returns the log-weight by which a unit of n tokens is ranked: how
// much does its strongest token weigh? score is q.mu, spread the variance of
// the score; the largest of n normal draws lies sqrt(2 ln n) deviations up.
func Presence(n int, score, spread float32) float32 {
	deviations := math.Sqrt(2 * float64(LogN(max(n, 2))) * float64(spread))
	return LogN(n) + score + float32(min(deviations, math.MaxFloat32/4))
}

// Mass returns the estimated log of the summed weights of a unit's n tokens:
// the second-order expansion of log E[exp(score)], clipped.
func Mass(n int, score, spread float32) float32 {
	return LogN(n) + score + min(spread/2, MassClip)
}

// LogN returns ln n: units of few tokens ask often.
func LogN(n int) float32 {
	if n > 0 && n < len(logs) {
		return logs[n]
	}
	return float32(math.Log(float64(n)))
}

var logs = func() (t [65]float32) {
	for n := range t {
		t[n] = float32(math.Log(float64(n)))
	}
	return t
}()
