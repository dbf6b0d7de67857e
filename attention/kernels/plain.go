package kernels

import (
	"encoding/binary"
	"math"
)

// The plain loops: what kernels compute.

func plainDots(dst []float32, stride int, q, k []float32, rows, n, d int) {
	for r := range rows {
		for t := range n {
			dst[r*stride+t] = Dot(q[r*d:(r+1)*d], k[t*d:(t+1)*d])
		}
	}
}

func plainDotsBF16(dst []float32, stride int, q []float32, k []byte, rows, n, pitch, d int) {
	row := make([]float32, d)
	for t := range n {
		plainWidenBF16(row, k[2*t*pitch:])
		for r := range rows {
			dst[r*stride+t] = Dot(q[r*d:(r+1)*d], row)
		}
	}
}

func plainAxpysBF16(out [][]float32, w []float32, stride int, v []byte, n, pitch, d int) {
	row := make([]float32, d)
	for t := range n {
		plainWidenBF16(row, v[2*t*pitch:])
		for r, y := range out {
			Axpy(y[:d], w[r*stride+t], row)
		}
	}
}

func plainToWords(x *wordRows, q []float32, rows, d int) {
	for r := range rows {
		q, most := q[r*d:][:d], float32(leastWeight)
		for _, y := range q {
			most = max(most, float32(math.Abs(float64(y))))
		}
		inverse := mostWeight / most
		x.scale[r] = most / mostWeight
		for i, y := range q {
			x.words[r*d+i] = int16(math.RoundToEven(float64(y * inverse)))
		}
	}
}

func plainDotsWords(dst []float32, stride int, x *wordRows, k []byte, rows, n, d int) {
	for r := range rows {
		words := x.words[r*d:][:d]
		for t := range n {
			var sum int32
			for i, c := range k[t*d:][:d] {
				sum += int32(words[i]) * int32(int8(c))
			}
			dst[r*stride+t] = float32(sum) * x.scale[r]
		}
	}
}

func plainAxpys(out [][]float32, w []float32, stride int, v []float32, n, d, cols int) {
	for t := range n {
		x := v[t*d:][:cols]
		for r, y := range out {
			Axpy(y[:cols], w[r*stride+t], x)
		}
	}
}

func plainAxpysInt8(out [][]float32, w []float32, stride int, v []byte, n, d int) {
	for t := range n {
		for r, y := range out {
			a := w[r*stride+t]
			for j, c := range v[t*d:][:d] {
				y[j] += a * float32(int8(c))
			}
		}
	}
}

func plainSquaresInt8(dst []float32, c []byte, n, d int) {
	for t := range n {
		var sum int32
		for _, x := range c[t*d : (t+1)*d] {
			sum += int32(int8(x)) * int32(int8(x))
		}
		dst[t] = float32(sum)
	}
}

// plainWeigh makes whole numbers of weights times steps.
func (b *ValueBatch) plainWeigh(x *valueWeights, rows int, w []float32, stride int) {
	for r := range rows {
		w, most := w[r*stride:][:b.n], float32(leastWeight)
		for t, a := range w {
			most = max(most, float32(math.Abs(float64(a*b.step[t]))))
		}
		inverse, scale, sum := mostWeight/most, most/mostWeight, float32(0)
		for t, a := range w {
			word := float32(math.RoundToEven(float64(a * b.step[t] * inverse)))
			x.words[r][t] = int16(word)
			sum += word * b.offset[t] // NaN if a weight is infinite or NaN, and so are all outputs
		}
		x.place[r].scale, x.place[r].offset = scale*b.unit(), scale*sum
	}
}

func (b *ValueBatch) plainAdd(out [][]float32, x *valueWeights) {
	for r, to := range out {
		var first, second [mostValueDim / 2]int32
		t := 0
		for _, run := range b.runs {
			for i := range run.n {
				w, low := int32(x.words[r][t]), []byte(nil)
				if b.all {
					low = run.low[i*b.row:]
				}
				for j, c := range run.high[i*b.row:][:b.row] {
					y, z := int32(c&15), int32(c>>4)
					if low != nil {
						y, z = y<<4|int32(low[j]&15), z<<4|int32(low[j]>>4)
					}
					first[j] += w * y
					second[j] += w * z
				}
				t++
			}
		}
		p := x.place[r]
		for j := range b.row {
			to[j] += float32(float32(first[j])*p.scale) + p.offset
			to[b.row+j] += float32(float32(second[j])*p.scale) + p.offset
		}
	}
}

func plainReadValueScales(step, offset []float32, src []byte, all bool) {
	for t := range step {
		step[t], offset[t] = ParseValueScale(src[t*ValueScale:], all)
	}
}

// codes unpacks a group's codes, [16 tokens][16 channels], from its lines, the
// first of which is the at-th; the 4 channels of a quad at a time.
func codes(l *Layout, planes [][]byte, at, levels int) (out [LineTokens][LineTokens]uint8) {
	const twoBits = 0x03030303 // of each byte
	for level := range levels {
		line := l.line(planes, at+level)
		for t := range out {
			w := binary.LittleEndian.Uint32(line[4*t:])
			for r := range 4 {
				quad := out[t][4*r:]
				c := binary.LittleEndian.Uint32(quad) | w>>(2*r)&twoBits<<(6-2*level)
				binary.LittleEndian.PutUint32(quad, c)
			}
		}
	}
	return out
}

// inOrder returns a group's words by channel.
func inOrder(words []int16) (out [LineTokens]int32) {
	for c, w := range words[:LineTokens] {
		out[Place(c)] = int32(w)
	}
	return out
}

func plainScoreLeaves(dst []float32, leafStride, stride int, q KeyQuery, l *Layout, planes [][]byte, steps []int, leaves, rows int) {
	var leaf [mostPlanes][]byte
	for i := range leaves {
		for p := range l.planes {
			leaf[p] = planes[p]
			if i > 0 {
				leaf[p] = planes[p][i*steps[p]:]
			}
		}
		plainScoreKeys(dst[i*leafStride:], stride, q, l, leaf[:l.planes], rows)
	}
}

func plainScoreKeys(dst []float32, stride int, q KeyQuery, l *Layout, planes [][]byte, rows int) {
	for first := 0; first < rows; first += LineTokens {
		plainScoreRows(dst, stride, q, l, planes, first, min(LineTokens, rows-first), rows)
	}
}

// plainScoreRows scores for n rows of the query.
func plainScoreRows(dst []float32, stride int, q KeyQuery, l *Layout, planes [][]byte, first, n, rows int) {
	var sums [LineTokens][LineTokens]int32 // [rows][tokens]
	at := 0
	for g, level := range l.Levels() {
		tokens := codes(l, planes, at, int(level))
		at += int(level)
		for r := range n {
			words := inOrder(q.Words[(g*rows+first+r)*LineTokens:])
			for t := range tokens {
				x := &tokens[t]
				var sum int32
				for c, w := range words {
					sum += w * int32(x[c])
				}
				sums[r][t] += sum
			}
		}
	}
	for r := range n {
		scale, offset := q.Scale[2*(first+r)], q.Scale[2*(first+r)+1]
		for t, s := range sums[r] {
			dst[(first+r)*stride+t] = float32(float32(s)*scale) + offset
		}
	}
}

func plainSumCodes(out [][]float32, w []float32, stride int, l *Layout, planes [][]byte) {
	at := 0
	for g, level := range l.Levels() {
		tokens := codes(l, planes, at, int(level))
		at += int(level)
		for r, to := range out {
			to = to[g*LineTokens:][:LineTokens]
			for t := range tokens {
				a := w[r*stride+t]
				for c, x := range tokens[t] {
					to[c] += a * float32(x)
				}
			}
		}
	}
}

func plainUnpackKeys(dst []float32, d int, l *Layout, planes [][]byte, lo, step []float32) {
	at := 0
	for g, level := range l.Levels() {
		tokens := codes(l, planes, at, int(level))
		at += int(level)
		half := float32(uint(256)>>(2*level)) / 2
		for t := range tokens {
			for c, x := range tokens[t] {
				bins := float32(x) + half
				if level == 1 {
					bins = 128 + float32((bins-128)*Shrink2)
				}
				j := g*LineTokens + c
				dst[t*d+j] = lo[j] + float32(bins*step[j])
			}
		}
	}
}

func plainGatherDots(dst, x []float32, tokens []int, w []float32) {
	d := len(w)
	for i, t := range tokens {
		dst[i] = Dot(w, x[t*d:(t+1)*d])
	}
}

func plainGatherAxpy(out, w, x []float32, tokens []int) {
	d := len(out)
	for i, t := range tokens {
		Axpy(out, w[i], x[t*d:(t+1)*d])
	}
}

func plainWidenBF16(dst []float32, src []byte) {
	for i := range dst {
		dst[i] = math.Float32frombits(uint32(binary.LittleEndian.Uint16(src[2*i:])) << 16)
	}
}

func plainSweep(b []byte) (sum uint64) {
	for ; len(b) >= 8; b = b[8:] {
		sum += binary.LittleEndian.Uint64(b)
	}
	return sum
}
