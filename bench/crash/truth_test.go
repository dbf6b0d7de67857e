package crash

import (
	"encoding/binary"
	"math"
	"math/rand/v2"

	kvtierv1 "kvtier/proto/kvtier/v1"
)

// A token is a number; its rows and queries follow from it, its position and
// its layer. So what a sequence should hold is a list of numbers.

// kinds of models: full layers, and sliding windows with a soft cap and learned sinks.
func specs() []*kvtierv1.ModelSpec {
	full := &kvtierv1.ModelSpec{Layers: 2, QueryHeads: 4, KvHeads: 2, HeadDim: 32, Fingerprint: []byte("crash, full"),
		KvDtype: kvtierv1.ElementType_ELEMENT_TYPE_BF16}
	sliding := &kvtierv1.ModelSpec{Layers: 3, QueryHeads: 2, KvHeads: 1, HeadDim: 16, Fingerprint: []byte("crash, sliding"), Softcap: 30,
		KvDtype:    kvtierv1.ElementType_ELEMENT_TYPE_BF16,
		LayerKinds: []*kvtierv1.LayerKind{{SlidingWindow: 50}, {}, {SlidingWindow: 300}},
		SinkLogits: []float32{.5, -1, 0, 1, 0, 0}}
	return []*kvtierv1.ModelSpec{full, sliding}
}

// mix is splitmix64.
func mix(x *uint64) uint64 {
	*x += 0x9e3779b97f4a7c15
	z := *x
	z = (z ^ z>>30) * 0xbf58476d1ce4e5b9
	z = (z ^ z>>27) * 0x94d049bb133111eb
	return z ^ z>>31
}

const topics = 32

var topicRows = func() (x [topics][32]float32) {
	rng := rand.New(rand.NewPCG(5, 5))
	for i := range x {
		for j := range x[i] {
			x[i][j] = float32(rng.NormFloat64())
		}
	}
	return x
}()

// vector writes one token's vector: its topic, which changes slowly with the
// position, and noise of its own. what tells keys, values and queries apart.
func vector(dst []float32, token uint64, pos, layer, head, what int) {
	topic := &topicRows[(pos/40*7+3*layer+11*what)%topics]
	x := token ^ uint64(layer)<<40 ^ uint64(head)<<48 ^ uint64(what)<<56
	for i := range dst {
		// Two uniform numbers make noise of a variance near a quarter.
		r := mix(&x)
		noise := (float32(r>>40)+float32(r&0xffffff))/(1<<24) - 1
		dst[i] = round(1.5*topic[i] + 1.2*noise)
	}
}

// round makes a float representable as bf16.
func round(x float32) float32 {
	return math.Float32frombits((math.Float32bits(x) + 0x8000) &^ 0xffff)
}

const (
	keys = iota
	values
	queries
)

// rows returns vectors [n][heads][headDim] of tokens that begin at position at.
func rows(tokens []uint64, at, layer, heads, d, what int) []float32 {
	out := make([]float32, len(tokens)*heads*d)
	for t, token := range tokens {
		for h := range heads {
			vector(out[(t*heads+h)*d:(t*heads+h+1)*d], token, at+t, layer, h, what)
		}
	}
	return out
}

func bf16(x []float32) []byte {
	b := make([]byte, 0, 2*len(x))
	for _, f := range x {
		u := math.Float32bits(f) >> 16
		b = append(b, byte(u), byte(u>>8))
	}
	return b
}

func fromBF16(b []byte) []float32 {
	x := make([]float32, len(b)/2)
	for i := range x {
		x[i] = math.Float32frombits(uint32(b[2*i])<<16 | uint32(b[2*i+1])<<24)
	}
	return x
}

// dense is attention in float64 of the last token over all of tokens.
func dense(sp *kvtierv1.ModelSpec, layer int, tokens []uint64) []float32 {
	d, group := int(sp.HeadDim), int(sp.QueryHeads/sp.KvHeads)
	pos := len(tokens) - 1
	lo := 0
	if len(sp.LayerKinds) > 0 {
		if w := int(sp.LayerKinds[layer].SlidingWindow); w > 0 {
			lo = max(0, pos+1-w)
		}
	}
	k := rows(tokens[lo:], lo, layer, int(sp.KvHeads), d, keys)
	v := rows(tokens[lo:], lo, layer, int(sp.KvHeads), d, values)
	q := rows(tokens[pos:], pos, layer, int(sp.QueryHeads), d, queries)
	out := make([]float32, 0, len(q))
	for h := range int(sp.QueryHeads) {
		var sink *float32
		if len(sp.SinkLogits) > 0 {
			sink = &sp.SinkLogits[layer*int(sp.QueryHeads)+h]
		}
		out = append(out, attend(q[h*d:(h+1)*d], k, v, h/group, int(sp.KvHeads), sp.Softcap, sink)...)
	}
	return out
}

func attend(q, k, v []float32, head, heads int, softcap float32, sink *float32) []float32 {
	d := len(q)
	n := len(k) / (heads * d)
	scores := make([]float64, n)
	top := math.Inf(-1)
	for t := range scores {
		var s float64
		for i, x := range k[(t*heads+head)*d : (t*heads+head+1)*d] {
			s += float64(x) * float64(q[i])
		}
		s /= math.Sqrt(float64(d))
		if c := float64(softcap); c > 0 {
			s = c * math.Tanh(s/c)
		}
		scores[t] = s
		top = max(top, s)
	}
	acc, sum := make([]float64, d), 0.0
	if sink != nil {
		sum = math.Exp(float64(*sink) - top)
	}
	for t, s := range scores {
		w := math.Exp(s - top)
		sum += w
		for i, x := range v[(t*heads+head)*d : (t*heads+head+1)*d] {
			acc[i] += w * float64(x)
		}
	}
	out := make([]float32, d)
	for i := range out {
		out[i] = float32(acc[i] / sum)
	}
	return out
}

// apart returns the largest relative distance of vectors of d elements.
func apart(got, want []float32, d int) (worst float64) {
	for i := 0; i < len(want); i += d {
		var diff, norm float64
		for j := i; j < i+d; j++ {
			diff += float64(got[j]-want[j]) * float64(got[j]-want[j])
			norm += float64(want[j]) * float64(want[j])
		}
		if e := math.Sqrt(diff / max(norm, 1e-30)); e > worst || e != e {
			worst = e
		}
	}
	return worst
}

func fromF32(b []byte) []float32 {
	x := make([]float32, len(b)/4)
	for i := range x {
		x[i] = math.Float32frombits(binary.LittleEndian.Uint32(b[4*i:]))
	}
	return x
}
