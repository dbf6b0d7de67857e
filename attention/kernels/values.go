package kernels

import (
	"encoding/binary"
	"math"
	"sync"
	"unsafe"
)

const (
	// ValueTokens is how many tokens a ValueBatch holds: sums of products of weights and codes fit 32 bits.
	ValueTokens = 256
	// ValueScale is the size of a stored step and zero point.
	ValueScale = 3

	valueRows    = 4   // of weights at a time
	mostValueDim = 256 // channels
	// mostWeight is the largest word that weights of a batch, or a row of floats, become.
	mostWeight = mostWord
	// leastWeight keeps what weights are divided by from being 0 or having no reciprocal.
	leastWeight = 0x1p-110
)

// ValueBatch is stored values of up to ValueTokens tokens, wherever they lie, to be added to sums
// together. A value has d codes x of 8 bits and is (x + offset) step. The high 4 bits of codes lie in rows of
// d/2 bytes: byte j holds channel j in its low and channel j + d/2 in its high nibble; the low 4 lie in rows of
// the same form, or are 0 if there are none. Its zero value is empty.
type ValueBatch struct {
	n, row       int // tokens, bytes of a row
	ahead        int // how far rows are fetched ahead
	all          bool
	step, offset [ValueTokens]float32
	runs         []valueRun // of rows that lie one after the other
	// Where each token's rows lie, low if all: for assembly. The garbage collector knows them by runs, and has nothing to do with each.
	high, low [ValueTokens]uintptr
}

// valueRun is rows of n tokens.
type valueRun struct {
	n         int
	high, low []byte // low if there are any
}

// Len returns how many tokens it holds.
func (b *ValueBatch) Len() int { return b.n }

// Reset empties the batch.
func (b *ValueBatch) Reset() { b.n, b.runs = 0, b.runs[:0] }

// Append takes in a token's value, of which scale, high and low are stored. Rows are of one size, and either
// all tokens have low codes, or low is nil of all. It returns false, and takes in
// nothing, if the token does not fit in.
func (b *ValueBatch) Append(scale, high, low []byte) bool {
	if !b.fits(1, len(high), low != nil) {
		return false
	}
	b.ahead = 0
	must(len(scale) >= ValueScale && (low == nil || len(low) >= b.row), "a scale or a row of codes is too short")
	b.step[b.n], b.offset[b.n] = ParseValueScale(scale, b.all)
	b.place(1, high, low)
	return true
}

// AppendRun is Append of n tokens of which scales, rows of high and rows of low codes, if there
// are any, lie one after the other, d channels a row. When AddTo reads a row, what lies ahead bytes behind it is fetched, for later; what counts
// is the ahead of what was appended last.
func (b *ValueBatch) AppendRun(scales, high, low []byte, n, d, ahead int) bool {
	must(d%2 == 0 && n >= 0, "d is odd, or n negative")
	if !b.fits(n, d/2, low != nil) {
		return false
	}
	b.ahead = ahead
	must(len(scales) >= n*ValueScale && len(high) >= n*b.row && (low == nil || len(low) >= n*b.row), "there are fewer scales or codes")
	if n > 0 {
		readValueScales(b.step[b.n:b.n+n], b.offset[b.n:b.n+n], scales, b.all)
		b.place(n, high, low)
	}
	return true
}

// place takes in the rows of n tokens.
func (b *ValueBatch) place(n int, high, low []byte) {
	b.runs = append(b.runs, valueRun{n, high, low})
	placeRows(b.high[b.n:b.n+n], high, b.row)
	if b.all {
		placeRows(b.low[b.n:b.n+n], low, b.row)
	}
	b.n += n
}

func placeRows(dst []uintptr, rows []byte, size int) {
	at := uintptr(unsafe.Pointer(&rows[0]))
	for t := range dst {
		dst[t] = at
		at += uintptr(size)
	}
}

// fits says whether n tokens fit in. The first ones say how long rows are, and whether there are low codes.
func (b *ValueBatch) fits(n, row int, all bool) bool {
	if n > ValueTokens-b.n || b.n > 0 && all != b.all {
		return false
	}
	must(row > 0 && row <= mostValueDim/2 && (b.n == 0 || row == b.row), "rows of codes differ, or are too long")
	b.row, b.all = row, all
	return true
}

// ParseValueScale parses a stored scale, bits 15 to 30 of the step as a float32 and the zero point: code x, of
// which the low 4 bits are 0 unless all 8 are known, stands for (x + offset) step.
func ParseValueScale(scale []byte, all bool) (step, offset float32) {
	return math.Float32frombits(uint32(binary.LittleEndian.Uint16(scale)) << 15), binMiddle(all) - float32(scale[2])
}

// binMiddle is where in its bin a code is read, in units of its last bit.
func binMiddle(all bool) float32 {
	if all {
		return .5
	}
	return 8
}

// AddTo adds to each row of out, at least [d], the values, weighted by its row of w [rows][Len()], a row
// beginning every stride weights. Weights times steps are rounded to 15 bits of the largest magnitude
// that they have in a row.
func (b *ValueBatch) AddTo(out [][]float32, w []float32, stride int) {
	mustAdd(out, len(w), stride, b.n, 2*b.row)
	if b.n == 0 {
		return
	}
	r := rooms.Get().(*room)
	defer rooms.Put(r)
	inGo := variant(2*b.row) == Go
	if !inGo {
		b.pad()
	}
	for first := 0; first < len(out); first += valueRows {
		to, from := out[first:min(first+valueRows, len(out))], w[first*stride:]
		switch {
		case inGo:
			b.plainWeigh(&r.weights, len(to), from, stride)
			b.plainAdd(to, &r.weights)
		case b.n%LineTokens != 0:
			for i := range to {
				row := r.padded[i][:b.padded()]
				clear(row[copy(row, from[i*stride:][:b.n]):])
			}
			weigh(&r.weights, b, len(to), r.padded[0][:], ValueTokens)
			addValues(to, r, b)
		default:
			weigh(&r.weights, b, len(to), from, stride)
			addValues(to, r, b)
		}
	}
}

// room is what sums and scores need besides, which goroutines' stacks should not have to grow for.
type room struct {
	weights valueWeights
	padded  [valueRows][ValueTokens]float32
	tiles   [roomBytes]byte
}

const roomBytes = 20 << 10 // as gen has it

var rooms = sync.Pool{New: func() any { return new(room) }}

// pad fills the batch up to what vectors hold, by tokens of step 0.
func (b *ValueBatch) pad() {
	for t := b.n; t < b.padded(); t++ {
		b.step[t], b.offset[t], b.high[t], b.low[t] = 0, 0, b.high[b.n-1], b.low[b.n-1]
	}
}

func (b *ValueBatch) padded() int { return (b.n + LineTokens - 1) &^ (LineTokens - 1) }

// valueWeights are what up to valueRows rows give to a batch: weights times steps are words times
// scale, of codes' last bits that are known; these times offsets come to offset.
type valueWeights struct {
	words [valueRows][ValueTokens]int16
	place [valueRows]struct{ scale, offset float32 }
}

// unit is the last bit that is known.
func (b *ValueBatch) unit() float32 {
	if b.all {
		return 1
	}
	return 16
}
