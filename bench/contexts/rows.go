package contexts

import (
	"encoding/binary"
	"math"
	"math/rand/v2"
)

// Geometry of SmolLM2-135M, but for the number of layers.
const (
	kvHeads    = 3
	queryHeads = 9
	headDim    = 64
	group      = queryHeads / kvHeads
	rowLen     = kvHeads * headDim
	queryLen   = queryHeads * headDim
)

const (
	topics    = 16
	runTokens = 64 // consecutive tokens of one topic
	// Topics lie far enough apart that most of the softmax goes to one.
	keyScale, valueScale, noiseScale = 1, 1, .5
)

// noise is read at places that depend on what a row belongs to: making rows must
// not take longer than storing them.
var noise = func() (out [1<<16 + headDim]float32) {
	rng := rand.New(rand.NewPCG(1, 0))
	for i := range out {
		out[i] = noiseScale * float32(rng.NormFloat64())
	}
	return out
}()

// mix hashes some numbers (the finaliser of MurmurHash3).
func mix(numbers ...uint64) (h uint64) {
	for _, x := range numbers {
		h ^= x + 0x9e3779b97f4a7c15
		h ^= h >> 33
		h *= 0xff51afd7ed558ccd
		h ^= h >> 33
		h *= 0xc4ceb9fe1a85ec53
		h ^= h >> 33
	}
	return h
}

// What a direction or a piece of noise is for.
const (
	forKey = iota
	forValue
	forQuery
	forTopic
)

// rows makes the rows of one context: those below shared are of the prefix that
// it has in common with others.
type rows struct {
	seed, prefix uint64
	shared       int
}

func (r rows) seedAt(pos int) uint64 {
	if pos < r.shared {
		return r.prefix
	}
	return r.seed
}

// topic returns what a token belongs to.
func (r rows) topic(pos int) uint64 {
	return mix(r.seedAt(pos), forTopic, uint64(pos/runTokens)) % topics
}

// add writes a topic's direction times scale and noise to dst. The directions of
// a prefix hold for all that follows it, so that queries find it.
func (r rows) add(dst []float32, what, topic uint64, layer, head int, scale float32, salt uint64) {
	base := r.seed
	if r.shared > 0 {
		base = r.prefix
	}
	direction := noise[mix(base, what, topic, uint64(layer), uint64(head))%(1<<16):]
	own := noise[mix(salt, what, uint64(layer), uint64(head))%(1<<16):]
	for i := range dst {
		dst[i] = scale/noiseScale*direction[i] + own[i]
	}
}

// kv writes the key and the value of one token, [kvHeads][headDim] each, rounded
// to bfloat16.
func (r rows) kv(k, v []float32, layer, pos int) {
	topic, salt := r.topic(pos), mix(r.seedAt(pos), uint64(pos))
	for h := range kvHeads {
		at := h * headDim
		r.add(k[at:at+headDim], forKey, topic, layer, h, keyScale, salt)
		r.add(v[at:at+headDim], forValue, topic, layer, h, valueScale, salt)
	}
	for i := range rowLen {
		k[i], v[i] = round(k[i]), round(v[i])
	}
}

// query returns the queries of a position, [queryHeads][headDim]: each looks for
// the topic of some earlier token.
func (r rows) query(layer, pos int) []float32 {
	out := make([]float32, queryLen)
	for h := range queryHeads {
		salt := mix(r.seed, forQuery, uint64(pos), uint64(layer), uint64(h))
		r.add(out[h*headDim:(h+1)*headDim], forKey, r.topic(int(salt%uint64(pos+1))), layer, h/group, keyScale, salt)
	}
	return out
}

// bytes returns tokens [lo, hi) of a layer as bfloat16.
func (r rows) bytes(layer, lo, hi int) (kb, vb []byte) {
	var k, v [rowLen]float32
	kb, vb = make([]byte, 0, 2*rowLen*(hi-lo)), make([]byte, 0, 2*rowLen*(hi-lo))
	for pos := lo; pos < hi; pos++ {
		r.kv(k[:], v[:], layer, pos)
		kb, vb = appendBF16(kb, k[:]), appendBF16(vb, v[:])
	}
	return kb, vb
}

// round rounds to bfloat16, which the daemon then stores without loss.
func round(x float32) float32 {
	b := math.Float32bits(x)
	return math.Float32frombits((b + 0x7fff + b>>16&1) &^ 0xffff)
}

// appendBF16 appends rounded numbers.
func appendBF16(b []byte, x []float32) []byte {
	for _, f := range x {
		b = binary.LittleEndian.AppendUint16(b, uint16(math.Float32bits(f)>>16))
	}
	return b
}

func floatBytes(x []float32) []byte {
	b := make([]byte, 0, 4*len(x))
	for _, f := range x {
		b = binary.LittleEndian.AppendUint32(b, math.Float32bits(f))
	}
	return b
}

func floats(b []byte) []float64 {
	x := make([]float64, len(b)/4)
	for i := range x {
		x[i] = float64(math.Float32frombits(binary.LittleEndian.Uint32(b[4*i:])))
	}
	return x
}

// dense is attention in float64 of a position's queries q over tokens [0, n):
// outputs [queryHeads][headDim] and log-sum-exps [queryHeads].
func (r rows) dense(layer, n int, q []float32) (out, lse []float64) {
	scale := 1 / math.Sqrt(headDim)
	out, lse = make([]float64, queryLen), make([]float64, queryHeads)
	sum, top := make([]float64, queryHeads), make([]float64, queryHeads)
	for h := range top {
		top[h] = math.Inf(-1)
	}
	var k, v [rowLen]float32
	for pos := range n {
		r.kv(k[:], v[:], layer, pos)
		for h := range queryHeads {
			kv := h / group * headDim
			s := 0.
			for i := range headDim {
				s += float64(q[h*headDim+i]) * float64(k[kv+i])
			}
			s *= scale
			o := out[h*headDim : (h+1)*headDim]
			if s > top[h] {
				f := math.Exp(top[h] - s)
				sum[h] *= f
				for i := range o {
					o[i] *= f
				}
				top[h] = s
			}
			w := math.Exp(s - top[h])
			sum[h] += w
			for i := range o {
				o[i] += w * float64(v[kv+i])
			}
		}
	}
	for h := range queryHeads {
		lse[h] = top[h] + math.Log(sum[h])
		for i := range headDim {
			out[h*headDim+i] /= sum[h]
		}
	}
	return out, lse
}
