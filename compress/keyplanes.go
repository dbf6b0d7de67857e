package compress

import (
	"encoding/binary"
	"fmt"
	"math"

	"kvtier/attention/kernels"
)

// Shrink2 draws 2-bit midpoints towards the centre of the range.
const Shrink2 = kernels.Shrink2

const (
	// groupDims is how many channels a line holds.
	groupDims = kernels.LineTokens
	// lineBytes is the size of a line: 2 bits of 16 channels of 16 tokens.
	lineBytes = kernels.Line
	// levels is how often the 2 bits of a channel come: 8 bits in all.
	levels = 4
	// NumKeyPlanes is how many planes the lines of keys are cut into.
	NumKeyPlanes = 5
)

// KeyNoise is the variance of what 2, 4, 6 and 8 bits leave unknown of a
// channel whose 256 values are a bell, over the square of their range; with no
// bits it is that of the bell itself.
var KeyNoise = [levels + 1]float32{1. / 45, .14 / 31, 1. / (12 << 8), 1. / (12 << 12), 1. / (12 << 16)}

// KeyOrder says which bits of a head's keys come first: those that change
// scores most. Channels are stored by importance, 16 of them are a group. A
// leaf is d/4 lines of 64 bytes; line i holds the next 2 bits of group Lines[i].
type KeyOrder struct {
	Channels []uint8 // [d], the channel at each place
	Lines    []uint8 // [d/4], each group four times
	// Scatter [d/16] is, by group, the root of the mean square of what keys deviate by from others that share their bins, channels weighted as queries
	// do; binary16 in the units of bins. It stands for bins that are not read.
	Scatter []byte
}

// KeyOrderBytes is the stored size of an order: whole lines.
func KeyOrderBytes(d int) int { return (keyOrderUsed(d) + lineBytes - 1) / lineBytes * lineBytes }

func keyOrderUsed(d int) int { return d + d/4 + d/8 }

// FitKeyOrder orders channels by importance [d]: the mean square of what the
// channel's variation adds to a score, at least 0. Then each line goes to the
// group where 2 more bits take away most. The first d/8 lines hold 2 bits of
// every group at least. square [d] is what of the importance is the mean square of queries, more than 0; exp is that of KeyExp.
func FitKeyOrder(importance, square []float32, exp int) KeyOrder {
	d := len(importance)
	o := KeyOrder{Channels: make([]uint8, d)}
	for i := range o.Channels {
		o.Channels[i] = uint8(i)
	}
	sortChannels(o.Channels, importance)
	groups := d / groupDims
	weight, level := make([]float64, groups), make([]int, groups)
	for i, c := range o.Channels {
		weight[i/groupDims] += float64(importance[c])
	}
	for g, sum := range weight {
		var squares float64
		for _, c := range o.Channels[g*groupDims:][:groupDims] {
			squares += float64(square[c])
		}
		deviation := float32(math.Sqrt(float64(float32(sum / squares)))) // a root in float32, rounded correctly
		o.Scatter = binary.LittleEndian.AppendUint16(o.Scatter, f16Ceil(min(math.Ldexp(float64(deviation), -exp), mostScatter)))
	}
	for unknown := groups; len(o.Lines) < d/4; {
		best, most := -1, -1.
		for g, l := range level {
			if l == levels || l > 0 && len(o.Lines)+unknown >= 2*groups && unknown > 0 {
				continue
			}
			if gain := weight[g] * float64(KeyNoise[l]-KeyNoise[l+1]); gain > most {
				best, most = g, gain
			}
		}
		if level[best]++; level[best] == 1 {
			unknown--
		}
		o.Lines = append(o.Lines, uint8(best))
	}
	return o
}

// mostScatter is the largest binary16.
const mostScatter = 65504

// standInPart is how much of a group's scatter stands for that of its channels: errors come out best with it.
const standInPart = .7

// standIn is the size of the bins in which keys deviate by as much as a scatter of 1 stands for.
var standIn = standInPart / (256 * math.Sqrt(float64(KeyNoise[0])))

// StandIn fills s, of all channels, with what stands for bins that are not read. exp is that of FitKeyOrder.
func (o *KeyOrder) StandIn(s KeySteps, exp int) {
	clear(s.Lo)
	var steps [MaxHeadDim / groupDims]float32
	o.StandInSteps(steps[:], exp)
	for i := range s.Step {
		s.Step[i] = steps[i/groupDims]
	}
}

// StandInSteps writes the steps of the bins that stand for those of each group of channels to dst.
func (o *KeyOrder) StandInSteps(dst []float32, exp int) {
	unit := math.Ldexp(standIn, exp)
	for g := range len(o.Scatter) / 2 {
		scatter := f16To32(binary.LittleEndian.Uint16(o.Scatter[g*2:]))
		dst[g] = float32(min(float64(scatter)*unit, mostStandIn))
	}
}

// mostStandIn is about the largest step that bins have.
const mostStandIn = 0x1p119

// sortChannels sorts by falling importance; equal ones by number.
func sortChannels(channels []uint8, importance []float32) {
	for i := 1; i < len(channels); i++ { // insertion: 256 at most, once a segment
		for j := i; j > 0 && importance[channels[j]] > importance[channels[j-1]]; j-- {
			channels[j], channels[j-1] = channels[j-1], channels[j]
		}
	}
}

// Append appends the stored form.
func (o KeyOrder) Append(b []byte) []byte {
	d := len(o.Channels)
	b = append(append(append(b, o.Channels...), o.Lines...), o.Scatter...)
	return append(b, make([]byte, KeyOrderBytes(d)-d-d/4-len(o.Scatter))...)
}

// ParseKeyOrder reads the first KeyOrderBytes(d) bytes of b. The error is ErrCorrupt.
func ParseKeyOrder(b []byte, d int) (KeyOrder, error) {
	bad := func(what string) (KeyOrder, error) {
		return KeyOrder{}, fmt.Errorf("key order: %s: %w", what, ErrCorrupt)
	}
	if !validDim(d) || len(b) < KeyOrderBytes(d) {
		return bad(fmt.Sprintf("%d bytes for %d channels", len(b), d))
	}
	lines := d + d/4
	o := KeyOrder{b[:d:d], b[d:lines:lines], b[lines:keyOrderUsed(d):keyOrderUsed(d)]}
	var seen [MaxHeadDim]bool
	for _, c := range o.Channels {
		if int(c) >= d || seen[c] {
			return bad("channels are no permutation")
		}
		seen[c] = true
	}
	var count [MaxHeadDim / groupDims]int
	known := 0 // groups: they become known in their order
	for i, g := range o.Lines {
		if int(g) > known || int(g) >= d/groupDims || count[g] == levels {
			return bad("lines are out of order")
		}
		if count[g]++; count[g] == 1 {
			known++
		}
		if i+1 == 2*d/groupDims && known < d/groupDims {
			return bad("a group is not in the first lines")
		}
	}
	for i := 0; i < len(o.Scatter); i += 2 {
		if binary.LittleEndian.Uint16(o.Scatter[i:]) > f16Max {
			return bad("a scatter is no number")
		}
	}
	return o, nil
}

// Permute writes rows x [n][d] with channels in stored order to dst.
func (o KeyOrder) Permute(dst, x []float32) {
	d := len(o.Channels)
	for ; len(x) >= d; x, dst = x[d:], dst[d:] {
		from, to := x[:d:d], dst[:d:d]
		for i, c := range o.Channels[:len(to)] {
			to[i] = from[c]
		}
	}
}

// Restore is the inverse of Permute.
func (o KeyOrder) Restore(dst, x []float32) {
	d := len(o.Channels)
	for ; len(x) >= d; x, dst = x[d:], dst[d:] {
		for i, c := range o.Channels {
			dst[c] = x[i]
		}
	}
}

// KeyCodes writes the 8-bit floor codes of rows [n][d] to dst [n][d]:
// (x - Lo) / Step, rounded down and clipped to 0..255. s is that of the group
// of up to 256 tokens to which all the rows belong. With feedback, which may be nil, channels
// make up for the errors of those before them: a code may then be up to kernels.MostFeedback bins away from that of the key.
func KeyCodes(dst []uint8, rows []float32, d int, s KeySteps, feedback KeyFeedback) {
	inverse := make([]float32, d)
	for j, w := range s.Step[:d] {
		inverse[j] = 1 / w
	}
	if feedback == nil {
		kernels.Quantise(dst, rows, s.Lo[:d], inverse, 0)
		return
	}
	kernels.QuantiseWithFeedback(dst, rows, s.Lo[:d], s.Step[:d], inverse, feedback)
}

// KeyPlaneLines is how many lines of a leaf each plane holds. The first plane
// is for looking at many tokens: half a bit a channel, on average. The first two
// have 1 bit a channel, the first three 2, the first four 5, all of them 8 (at
// dimensions below 64 some have more).
func KeyPlaneLines(d int) [NumKeyPlanes]int {
	groups := d / groupDims
	first := (groups + 3) / 4
	third := max(1, groups-2*first)
	main := 2*groups + 2*first
	return [NumKeyPlanes]int{first, first, third, main - 2*first - third, 4*groups - main}
}

// KeyPlaneBytes is the size of a leaf in each plane.
func KeyPlaneBytes(d int) [NumKeyPlanes]int {
	n := KeyPlaneLines(d)
	for i := range n {
		n[i] *= lineBytes
	}
	return n
}

// PackKeyPlanes cuts codes [n][d], channels in stored order, into planes of
// ceil(n/16) leaves; the last one is padded with zero codes. lines is KeyOrder.Lines.
//
// A line holds a little-endian 32-bit word for each of the 16 tokens. In it,
// channel 4r + b of the group has its 2 bits in bits 2r and 2r+1 of byte b: so
// one mask and one dot product of bytes handles 4 channels of 16 tokens, and no
// lane is summed across.
func PackKeyPlanes(codes []uint8, n, d int, lines []uint8) (planes [NumKeyPlanes][]byte) {
	leaves := (n + leafTokens - 1) / leafTokens
	for p, size := range KeyPlaneBytes(d) {
		planes[p] = make([]byte, leaves*size)
	}
	for leaf := range leaves {
		eachLine(d, lines, NumKeyPlanes, func(p, at, group, shift int) {
			line := planes[p][leaf*KeyPlaneBytes(d)[p]+at:][:lineBytes]
			for t := range min(leafTokens, n-leaf*leafTokens) {
				packWord(line[4*t:], codes[(leaf*leafTokens+t)*d+group*groupDims:][:groupDims], shift)
			}
		})
	}
	return planes
}

// eachLine goes through the lines of a leaf's first planes: where each lies in
// its plane, and which bits of which group it holds.
func eachLine(d int, lines []uint8, planes int, use func(plane, at, group, shift int)) {
	var level [MaxHeadDim / groupDims]int
	i := 0
	for p, n := range KeyPlaneLines(d) {
		if p == planes {
			return
		}
		for l := range n {
			g := int(lines[i])
			use(p, l*lineBytes, g, 6-2*level[g])
			level[g]++
			i++
		}
	}
}

// fours is a mask of 2 bits in each byte.
const fours = 0x03030303

// packWord writes the word of a token from the 16 codes of its group. Four
// codes at a time are the four bytes of a word.
func packWord(dst []byte, codes []uint8, shift int) {
	var w uint32
	for r := range 4 {
		w |= binary.LittleEndian.Uint32(codes[4*r:]) >> shift & fours << (2 * r)
	}
	binary.LittleEndian.PutUint32(dst, w)
}

// UnpackKeys is KeyLayout.Unpack of one leaf. It returns how many channels are known.
func UnpackKeys(dst []float32, d int, lines []uint8, s KeySteps, planes ...[]byte) (known int) {
	l := NewKeyLayout(d, lines, len(planes))
	l.Unpack(dst, s, planes)
	return l.Known()
}
