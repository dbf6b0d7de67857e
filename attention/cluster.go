package attention

import (
	"math"
	"math/rand/v2"
	"slices"
	"sync"

	"kvtier/attention/kernels"
)

// Sizes of the grouping; docs/format.md fixes them for stored segments.
const (
	PageTokens = 64
	LeafTokens = 16
	// outlierShare: one token in 32 is set apart, a page of a full segment
	// (docs/decisions/0005-storing-order.md), and more if whole pages do not remain.
	outlierShare = 32
	// minGrouped is the least number of tokens for which outliers are set apart.
	minGrouped = 256
)

// Order is how n tokens are stored: index of the token at each place. The
// first Body places are grouped: page after page, leaf after leaf. The outliers
// follow, their first leaf being drains; if there are any, the body is whole
// pages. Only the last page and leaf of all may be short.
type Order struct {
	Tokens []int
	Body   int
}

// Arrange groups keys [n][d] by balanced recursive bisection in the metric:
// each half is split along its principal direction, refined by two-means and
// cut at the median, down to pages and then leaves. Outliers are set apart: first
// the drains, the tokens of the smallest values, to which a head attends that
// finds nothing to say, so that every error of them counts
// (docs/decisions/0010-drains.md); then the tokens least like their leaf, which
// are grouped among themselves. seed makes it repeatable.
func Arrange(keys, values []float32, d int, m *Metric, seed uint64) Order {
	n := len(keys) / d
	b := bisectors.Get().(*bisector)
	defer bisectors.Put(b)
	b.begin(n, d, seed)
	kernels.Deviations(b.deltas, keys, Mean(keys, d)) // no grouping depends on the mean, but float32 products do
	m.apply(b.x, b.deltas)
	all := make([]int, n)
	for i := range all {
		all[i] = i
	}
	whole, first := Grouping(n)
	if whole == n {
		b.split(all, LeafTokens)
		return Order{Tokens: all, Body: n}
	}
	count := n - whole
	for t := range b.proj {
		b.proj[t] = Norm2(values[t*d : (t+1)*d])
	}
	all, drains := b.setApart(all, first)
	b.split(all, LeafTokens)
	for i := 0; i < len(all); i += LeafTokens {
		b.fromMean(all[i:min(i+LeafTokens, len(all))])
	}
	body, out := b.setApart(all, count-len(drains))
	b.split(body, PageTokens)
	for i := 0; i < len(body); i += PageTokens {
		b.split(body[i:min(i+PageTokens, len(body))], LeafTokens)
	}
	b.split(out, LeafTokens)
	return Order{Tokens: slices.Concat(body, drains, out), Body: len(body)}
}

// Grouping returns how many of n tokens Arrange groups; the others are set apart, of which the first are drains.
func Grouping(n int) (body, drains int) {
	if n < minGrouped {
		return n, 0
	}
	body = (n - n/outlierShare) / PageTokens * PageTokens
	return body, min(LeafTokens, n-body)
}

// Split is a division of a run of places: the first Left become a group, and the rest.
type Split struct{ From, Count, Left int }

// Splits returns the divisions that Arrange makes of n tokens, in its order, which is also that of their Directions: first those by which it finds the
// tokens unlike their leaf (none if nothing is set apart), of all but the drains, then those of the order that is stored.
func Splits(n int) (unlike, stored []Split) {
	body, drains := Grouping(n)
	if body == n {
		return nil, appendSplits(nil, 0, n, LeafTokens)
	}
	unlike = appendSplits(nil, 0, n-drains, LeafTokens)
	stored = appendSplits(nil, 0, body, PageTokens)
	for i := 0; i < body; i += PageTokens {
		stored = appendSplits(stored, i, PageTokens, LeafTokens)
	}
	return unlike, appendSplits(stored, body+drains, n-body-drains, LeafTokens)
}

func appendSplits(to []Split, from, n, unit int) []Split {
	if n <= unit {
		return to
	}
	left := leftOf(n, unit)
	to = append(to, Split{from, n, left})
	return appendSplits(appendSplits(to, from, left, unit), from+left, n-left, unit)
}

// leftOf is how many of n tokens are the first half: whole units, the larger half first.
func leftOf(n, unit int) int { return ((n+unit-1)/unit + 1) / 2 * unit }

// Directions fills dst [splits][d] with the directions at which Arrange begins to look for the principal ones.
func Directions(dst []float32, seed uint64) {
	rng := directions(seed)
	for i := range dst {
		dst[i] = float32(rng.NormFloat64())
	}
}

func directions(seed uint64) *rand.Rand { return rand.New(rand.NewPCG(seed, 0x6b76)) }

// Mean returns the mean row [d] of x [n][d], n >= 1.
func Mean(x []float32, d int) []float32 {
	sum := make([]float64, d)
	kernels.AddRows(sum, x)
	out := make([]float32, d)
	for j, s := range sum {
		out[j] = float32(s * float64(d) / float64(len(x)))
	}
	return out
}

type bisector struct {
	deltas, x []float32 // [n][d], from the mean: as they are, and in the metric
	d         int
	rng       *rand.Rand
	proj      []float32 // [n], position of each token along the current direction
	// Scratch: something for each of some tokens, and rows.
	weights           []float32
	keys, keys2       []uint64
	rest              []int
	center, part, off []float32
	along, next       []float32
}

// bisectors are some megabytes, which sealing needs again and again.
var bisectors = sync.Pool{New: func() any { return new(bisector) }}

func (b *bisector) begin(n, d int, seed uint64) {
	b.d, b.rng = d, directions(seed)
	for _, x := range []*[]float32{&b.deltas, &b.x} {
		*x = sized(*x, n*d)
	}
	for _, x := range []*[]float32{&b.proj, &b.weights} {
		*x = sized(*x, n)
	}
	for _, x := range []*[]float32{&b.center, &b.part, &b.off, &b.along, &b.next} {
		*x = sized(*x, d)
	}
	b.keys, b.keys2, b.rest = sized(b.keys, n), sized(b.keys2, n), sized(b.rest, n)
}

// sized returns x with n elements, of which nothing is known.
func sized[T any](x []T, n int) []T { return slices.Grow(x[:0], n)[:n] }

func (b *bisector) row(t int) []float32 { return b.x[t*b.d : (t+1)*b.d] }

// split orders tokens so that every run of unit tokens is a group.
func (b *bisector) split(tokens []int, unit int) {
	n := len(tokens)
	if n <= unit {
		return
	}
	left := leftOf(n, unit)
	b.mean(b.center, tokens)
	b.project(tokens, b.principal(tokens, b.center))
	for range 3 {
		b.halve(tokens, left)
		// From the smaller half's mean to that of all: the direction in which the means differ.
		b.mean(b.part, tokens[left:])
		b.project(tokens, b.from(b.part, b.center))
	}
	b.halve(tokens, left)
	b.split(tokens[:left], unit)
	b.split(tokens[left:], unit)
}

// principal returns the main direction of the tokens' spread, by power iteration, until the next call.
func (b *bisector) principal(tokens []int, mean []float32) []float32 {
	w, next := b.along, b.next
	for i := range w {
		w[i] = float32(b.rng.NormFloat64())
	}
	for range 6 {
		clear(next)
		off, sum := Dot(mean, w), float32(0)
		for lo := 0; lo < len(tokens); lo += orderedBlock {
			some := tokens[lo:min(lo+orderedBlock, len(tokens))]
			along := b.weights[:len(some)]
			kernels.GatherDots(along, b.x, some, w)
			for i := range along {
				along[i] -= off
				sum += along[i]
			}
			kernels.GatherAxpy(next, along, b.x, some)
		}
		Axpy(next, -sum, mean)
		norm := float32(math.Sqrt(float64(Dot(next, next))))
		if norm == 0 || math.IsInf(float64(norm), 0) {
			break // all alike: any direction will do
		}
		for i := range w {
			w[i] = next[i] / norm
		}
	}
	return w
}

// mean writes the tokens' mean to out.
func (b *bisector) mean(out []float32, tokens []int) {
	clear(out)
	same := b.weights[:len(tokens)]
	for i := range same {
		same[i] = 1 / float32(len(tokens))
	}
	kernels.GatherAxpy(out, same, b.x, tokens)
}

// from returns x - y, until the next call.
func (b *bisector) from(x, y []float32) []float32 {
	for i := range b.off {
		b.off[i] = x[i] - y[i]
	}
	return b.off
}

func (b *bisector) project(tokens []int, w []float32) {
	along := b.weights[:len(tokens)]
	kernels.GatherDots(along, b.x, tokens, w)
	for i, t := range tokens {
		b.proj[t] = along[i]
	}
}

// halve brings the first count tokens by projection to the front. Both parts keep the order they came in.
func (b *bisector) halve(tokens []int, count int) {
	keys := b.keys[:len(tokens)]
	for i, t := range tokens {
		keys[i] = ascending(b.proj[t])<<32 | uint64(t) // of equal projections the lower token
	}
	limit := nth(b.keys2[:copy(b.keys2, keys)], count)
	n, rest := 0, b.rest[:0]
	for i, t := range tokens {
		if keys[i] < limit {
			tokens[n] = t
			n++
		} else {
			rest = append(rest, t)
		}
	}
	copy(tokens[n:], rest)
}

// ascending returns 32 bits that are in the order of numbers; what is no number comes first.
func ascending(x float32) uint64 {
	b := math.Float32bits(x + 0) // not -0
	switch {
	case x != x:
		return 0
	case b>>31 == 1:
		return uint64(^b)
	}
	return uint64(b | 1<<31)
}

// nth returns the key that n others are less than, 0 <= n < len(keys), of keys that all differ, and changes their order.
func nth(keys []uint64, n int) uint64 {
	for len(keys) > 16 {
		a, b, c := keys[0], keys[len(keys)/2], keys[len(keys)-1]
		pivot := max(min(a, b), min(max(a, b), c)) // the median
		less := 0
		for i, k := range keys {
			if k < pivot {
				keys[i], keys[less] = keys[less], k
				less++
			}
		}
		if n < less {
			keys = keys[:less]
		} else {
			keys, n = keys[less:], n-less
		}
	}
	slices.Sort(keys)
	return keys[n]
}

// fromMean places the tokens of a leaf by how near they are to its mean, the farthest first.
func (b *bisector) fromMean(leaf []int) {
	b.mean(b.center, leaf)
	for _, t := range leaf {
		b.proj[t] = -Norm2(b.from(b.row(t), b.center))
	}
}

// setApart takes the first count tokens by position along the current
// direction out. Both results are in token order.
func (b *bisector) setApart(tokens []int, count int) (body, out []int) {
	if count < len(tokens) {
		b.halve(tokens, count)
	}
	out, body = slices.Clone(tokens[:count]), slices.Clone(tokens[count:])
	slices.Sort(out)
	slices.Sort(body)
	return body, out
}
