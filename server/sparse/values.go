package sparse

import (
	"math/bits"
	"slices"

	"kvtier/attention/kernels"
	"kvtier/compress"
	"kvtier/tiers"
	"kvtier/tiers/seal"
)

// readValues reads the values of the best tokens of deep leaves.
func (u *run) readValues() error {
	u.normalise()
	return u.fetch(u.affordable())
}

// affordable marks the best tokens whose values the rest of the budget pays
// for, and returns them, in order. It takes them one after the other, as the cache lines that they
// share with better ones cost nothing more.
func (u *run) affordable() []int {
	lines := u.lines[:len(u.segs)]
	left, n := u.left, 0
	for _, key := range u.sortByUpper(u.candidates()) {
		token := int(uint32(key))
		leaf, t := leafOf(token)
		x := &u.leaves[leaf]
		if lines[x.seg].codes == nil {
			lines[x.seg] = newValueLines(u.segs[x.seg].view, u.lineArena.zeros)
		}
		if left -= lines[x.seg].take(u.segs[x.seg].view, x.place()+t); left < 0 && n > 0 {
			break
		}
		x.chosen |= 1 << t
		n++
	}
	u.chosen = u.chosen[:0]
	for _, i := range u.deep {
		for rest := u.leaves[i].chosen; rest != 0; rest &= rest - 1 {
			u.chosen = append(u.chosen, i*tiers.LeafTokens+bits.TrailingZeros16(rest))
		}
	}
	return u.chosen
}

// candidates returns the tokens of deep leaves among which those are that
// the rest of the budget can pay for: keys for sortByUpper, the best first, with the token below.
func (u *run) candidates() []uint64 {
	// No token costs less than its bytes.
	each := float32(compress.ValueScaleBytes + compress.ValueRowBytes(u.d))
	clear(u.hist[:])
	for _, i := range u.deep {
		x := &u.leaves[i]
		u.shareLines(x)
		for _, gain := range u.gainsOf(x)[:x.n] {
			u.hist.add(gain, each)
		}
	}
	least := max(u.hist.bin(u.left)-1, 0)
	n := 0
	keys := u.sortKeys(len(u.deep) * tiers.LeafTokens)
	for _, i := range u.deep {
		x := &u.leaves[i]
		for t, gain := range u.gainsOf(x)[:x.n] {
			if binOf(gain) >= least {
				keys[n] = descending(gain)<<32 | uint64(i*tiers.LeafTokens+t)
				n++
			}
		}
	}
	return keys[:n]
}

// shareLines lets tokens whose values begin in the same cache line be worth what they are together: it is read for all of them.
func (u *run) shareLines(x *leaf) {
	if compress.ValueRowBytes(u.d) >= tiers.LineSize {
		return
	}
	view, gains := &u.segs[x.seg].view, u.gainsOf(x)[:x.n]
	lineOf := func(t int) int {
		_, codes := view.ValueRanges(x.place() + t)
		return codes.Off / tiers.LineSize
	}
	for from, to := 0, 0; from < len(gains); from = to {
		var sum float32
		for to = from; to < len(gains) && lineOf(to) == lineOf(from); to++ {
			sum += gains[to]
		}
		for t := from; t < to; t++ {
			gains[t] = sum
		}
	}
}

// wantValues asks for the codes of tokens' values, and behind them for the
// scales, from the first to the last of each leaf's tokens. These are apart from each other, so that nothing is joined.
func (u *run) wantValues(seg int, tokens []int) {
	view := &u.segs[seg].view
	begin := len(u.ranges)
	for _, c := range tokens {
		_, codes := view.ValueRanges(u.place(c))
		u.ranges = append(u.ranges, codes)
	}
	last := -1
	for _, c := range tokens {
		scale, _ := view.ValueRanges(u.place(c))
		if leaf, _ := leafOf(c); leaf != last {
			last = leaf
			u.ranges = append(u.ranges, scale)
		}
		scales := &u.ranges[len(u.ranges)-1]
		scales.Len = scale.Off + scale.Len - scales.Off
	}
	u.wanted = append(u.wanted, wanted{seg, begin, len(u.ranges)})
}

// place returns where a token is stored.
func (u *run) place(token int) int {
	leaf, t := leafOf(token)
	return u.leaves[leaf].place() + t
}

// aheadValues is how many tokens before their use values are fetched into the cache.
const aheadValues = 16

// fetch reads the values of the chosen tokens and adds them to the partials.
// Those that are late stay unread: their weights stand for them.
func (u *run) fetch(chosen []int) error {
	chosen, low, err := u.drainValues(chosen)
	if err != nil {
		return err
	}
	for rest := chosen; len(rest) > 0; {
		seg := u.segmentOf(rest[0])
		u.wantValues(seg, u.ofSegment(&rest, seg, leafIndex))
	}
	values := newSum(u)
	err = u.each(tiers.PlaneV4, func(seg int, got got) error {
		tokens := u.ofSegment(&chosen, seg, leafIndex)
		codes, scales, last, first := got.b[:len(tokens)], got.b[len(tokens)-1:], -1, 0
		for i, c := range tokens {
			kernels.Prefetch(codes[min(i+aheadValues, len(codes)-1)])
			leaf, t := leafOf(c)
			if leaf != last {
				last, first, scales = leaf, t, scales[1:]
			}
			x := &u.leaves[leaf]
			if codes[i] == nil || scales[0] == nil {
				u.leave(x, t)
				continue
			}
			u.acc.Read++
			u.traceRead(seg, x, t)
			u.segs[seg].received += values.add(scales[0][(t-first)*compress.ValueScaleBytes:], codes[i], low[c], u.weightsOf(x)[t:])
		}
		return nil
	})
	values.flush()
	return err
}

// leave leaves a token that was chosen unread, because its value is late.
func (u *run) leave(x *leaf, t int) {
	x.chosen &^= 1 << t
	u.isLate(x, 1<<t)
}

// traceRead tells of a token whose value was read.
func (u *run) traceRead(seg int, x *leaf, t int) {
	if u.tr.Token == nil {
		return
	}
	for r := range u.rows {
		u.tr.Token(r, u.segs[seg].index, x.place()+t, u.logOf(r, u.weightsOf(x)[r*tiers.LeafTokens+t]), Read)
	}
}

// drainValues reads the low codes of the chosen tokens that are drains, and takes those out of which they are late.
func (u *run) drainValues(chosen []int) (inTime []int, low map[int][]byte, err error) {
	drains := u.list[:0]
	for _, c := range chosen {
		leaf, _ := leafOf(c)
		x := &u.leaves[leaf]
		if v := &u.segs[x.seg].view; v.IsDrain(int(x.i)) {
			drains = append(drains, c)
			u.want(int(x.seg), v.DrainValue(u.place(c)))
		}
	}
	u.list = drains
	low = make(map[int][]byte)
	err = u.each(tiers.PlaneDrains, func(seg int, got got) error {
		for _, c := range u.ofSegment(&drains, seg, leafIndex) {
			low[c] = got.next(compress.ValueRowBytes(u.d))
		}
		return nil
	})
	if u.anyLate() {
		chosen = slices.DeleteFunc(chosen, func(c int) bool {
			b, isDrain := low[c]
			if late := isDrain && b == nil; !late {
				return false
			}
			leaf, t := leafOf(c)
			u.leave(&u.leaves[leaf], t)
			return true
		})
	}
	return chosen, low, err
}

// leafIndex returns the index of a token's leaf.
func leafIndex(token int) int { return token / tiers.LeafTokens }

// segmentOf returns the segment of a token.
func (u *run) segmentOf(token int) int { return int(u.leaves[leafIndex(token)].seg) }

// valueLines are the cache lines of a segment's values that were taken: bit sets.
type valueLines struct{ scales, codes, drains []uint64 }

func newValueLines(v seal.View, zeros func(n int) []uint64) valueLines {
	set := func(bytes int) []uint64 { return zeros(bytes/tiers.LineSize/64 + 1) }
	n := v.BytesAt4Bits()
	return valueLines{set(n), set(n), set(v.DrainValue(v.Info.Body + v.Drains()).Off)}
}

// take adds the value at place t and returns how many more bytes that takes.
func (l *valueLines) take(v seal.View, t int) float64 {
	scale, codes := v.ValueRanges(t)
	n := touch(l.scales, scale) + touch(l.codes, codes)
	if v.IsDrain(t / tiers.LeafTokens) {
		n += touch(l.drains, v.DrainValue(t))
	}
	return float64(n * tiers.LineSize)
}

// touch marks the lines of a range, and returns how many were not marked.
func touch(lines []uint64, r tiers.Range) (n int) {
	for l := r.Off / tiers.LineSize; l <= (r.Off+r.Len-1)/tiers.LineSize; l++ {
		if bit := uint64(1) << (l % 64); lines[l/64]&bit == 0 {
			lines[l/64] |= bit
			n++
		}
	}
	return n
}
