package compress

import "kvtier/attention/kernels"

// BatchTokens is how many tokens a ValueBatch holds.
const BatchTokens = pageTokens

// ValueBatch collects stored values of up to BatchTokens tokens, wherever they lie, to
// add them to sums together. Its zero value is empty.
type ValueBatch struct {
	n         int
	all       bool                     // low codes are there
	scale     [2 * BatchTokens]float32 // [n][2], step and offset
	high, low [BatchTokens][]byte
}

// Len returns how many tokens it holds.
func (b *ValueBatch) Len() int { return b.n }

// Append takes in a token's value. Arguments are those of UnpackValue; either
// all tokens of a batch have low codes or none. It returns false, and takes in
// nothing, if the token does not fit in.
func (b *ValueBatch) Append(scale, high, low []byte) bool {
	if b.n == len(b.high) || b.n > 0 && (low != nil) != b.all {
		return false
	}
	b.all = low != nil
	b.scale[2*b.n], b.scale[2*b.n+1] = valueScale(scale, b.all)
	b.high[b.n], b.low[b.n] = high, low
	b.n++
	return true
}

// Fill takes in n tokens, at most BatchTokens, of which scales, rows of high and
// rows of low codes, if there are any, lie one after the other. What the batch held is gone.
func (b *ValueBatch) Fill(scales, high, low []byte, n, d int) {
	row := ValueRowBytes(d)
	b.n, b.all = n, low != nil
	for t := range n {
		b.scale[2*t], b.scale[2*t+1] = valueScale(scales[t*ValueScaleBytes:], b.all)
		b.high[t] = high[t*row : (t+1)*row]
		if b.all {
			b.low[t] = low[t*row : (t+1)*row]
		}
	}
}

// AddTo adds the values, which have d channels, to each row of out, at least [d], weighted by its row of
// w [rows][Len()], a row beginning every stride weights.
func (b *ValueBatch) AddTo(out [][]float32, w []float32, stride, d int) {
	var low [][]byte
	if b.all {
		low = b.low[:b.n]
	}
	kernels.AddValues(out, w, stride, b.scale[:], b.high[:b.n], low, d)
}

// Reset empties the batch.
func (b *ValueBatch) Reset() { b.n = 0 }
