package attention

import (
	"encoding/binary"
	"math"
)

// summaryMeta is the bytes of scales and spreads of one unit: four bfloat16.
const summaryMeta = 8

// SummaryBytes is the size of the summaries of some units of dimension d.
func SummaryBytes(units, d int) int { return units * (summaryMeta + 2*d) }

// Summaries is what is known of some units, pages or leaves, without reading
// them. For each unit: the scale of the mean key, the scale of the mean value,
// the spread of its keys in the query metric, the spread of its values, as
// bfloat16; then all mean keys int8 [units][d]; then all mean values int8 [units][d].
type Summaries struct {
	meta, k, v []byte
	d          int
}

// PackSummaries appends the summaries of the units that n = len(keys)/d
// tokens make, in runs of unit tokens, to b. keys and values are [n][d]; what
// space values are in is the caller's matter.
func PackSummaries(b []byte, keys, values []float32, d, unit int, m *Metric) []byte {
	n := len(keys) / d
	units := (n + unit - 1) / unit
	at := len(b)
	b = append(b, make([]byte, SummaryBytes(units, d))...)
	s := parseSummaries(b[at:], d, units)
	for u := range units {
		lo, hi := u*unit*d, min((u+1)*unit, n)*d
		s.put(u, keys[lo:hi], values[lo:hi], m)
	}
	return b
}

func (s Summaries) put(u int, keys, values []float32, m *Metric) {
	d := s.d
	mk, mv := Mean(keys, d), Mean(values, d)
	var spread, vspread float64
	for i := 0; i < len(keys); i += d {
		spread += float64(m.Spread(sub(keys[i:i+d], mk)))
		dv := sub(values[i:i+d], mv)
		vspread += float64(Dot(dv, dv))
	}
	n := float64(len(keys) / d)
	meta := s.meta[u*summaryMeta:]
	putBF16(meta[0:], packInt8(s.k[u*d:(u+1)*d], mk))
	putBF16(meta[2:], packInt8(s.v[u*d:(u+1)*d], mv))
	putBF16(meta[4:], bf16Up(float32(spread/n)))
	putBF16(meta[6:], bf16Up(float32(vspread/n)))
}

// ParseSummaries reads what PackSummaries wrote; ok is false if b has another size.
func ParseSummaries(b []byte, d, units int) (s Summaries, ok bool) {
	if len(b) != SummaryBytes(units, d) {
		return s, false
	}
	return parseSummaries(b, d, units), true
}

func parseSummaries(b []byte, d, units int) Summaries {
	m, k := units*summaryMeta, units*(summaryMeta+d)
	return Summaries{meta: b[:m], k: b[m:k], v: b[k:], d: d}
}

// Units returns the number of units.
func (s Summaries) Units() int { return len(s.meta) / summaryMeta }

// Score returns q.mu for unit u.
func (s Summaries) Score(u int, q []float32) float32 {
	return bf16(s.meta[u*summaryMeta:]) * dotInt8(s.k[u*s.d:(u+1)*s.d], q)
}

// Spread returns the variance of the score over unit queries within unit u.
func (s Summaries) Spread(u int) float32 { return bf16(s.meta[u*summaryMeta+4:]) }

// ValueSpread returns the mean of |v - mean|^2 within unit u.
func (s Summaries) ValueSpread(u int) float32 { return bf16(s.meta[u*summaryMeta+6:]) }

// Value writes the mean value of unit u to dst [d].
func (s Summaries) Value(dst []float32, u int) {
	f := bf16(s.meta[u*summaryMeta+2:])
	for i, c := range s.v[u*s.d : (u+1)*s.d] {
		dst[i] = f * float32(int8(c))
	}
}

func dotInt8(c []byte, q []float32) float32 {
	var s0, s1 float32
	q = q[:len(c)]
	for i := 0; i+2 <= len(c); i += 2 {
		s0 += float32(int8(c[i])) * q[i]
		s1 += float32(int8(c[i+1])) * q[i+1]
	}
	return s0 + s1
}

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

// massClip limits how far the spread of a unit's keys may raise the mass that
// stands for its tokens when they are not read (docs/decisions/0003-presence-and-mass.md).
const massClip = 1

// Presence returns the log-weight by which a unit of n tokens is ranked: how
// much does its strongest token weigh? score is q.mu, spread the variance of
// the score; the largest of n normal draws lies sqrt(2 ln n) deviations up.
func Presence(n int, score, spread float32) float32 {
	deviations := math.Sqrt(2 * math.Log(float64(max(n, 2))) * float64(spread))
	return logN(n) + score + float32(min(deviations, math.MaxFloat32/4))
}

// Mass returns the estimated log of the summed weights of a unit's n tokens:
// the second-order expansion of log E[exp(score)], clipped.
func Mass(n int, score, spread float32) float32 {
	return logN(n) + score + min(spread/2, massClip)
}

func logN(n int) float32 { return float32(math.Log(float64(n))) }
