package server

import (
	"math"
	"slices"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	"kvtier/compress"
	kvtierv1 "kvtier/proto/kvtier/v1"
	"kvtier/tiers"
)

// spec is a checked model spec, with defaults filled in.
type spec struct {
	layers, queryHeads, kvHeads, headDim int
	window                               []int // by layer; 0: full
	scale, softcap                       float32
	sinks                                []float32 // [layers][queryHeads], or empty
	typ                                  compress.ElementType
	fingerprint                          []byte
	msg                                  *kvtierv1.ModelSpec // normalised
}

func (s *spec) group() int { return s.queryHeads / s.kvHeads }

// rowBytes is the size of one layer's K, or V, of one token.
func (s *spec) rowBytes() int { return s.kvHeads * s.headDim * s.typ.Size() }

// headBytes is the part of one KV head in that.
func (s *spec) headBytes() int { return s.headDim * s.typ.Size() }

// tokenBytes is the size of one token's K and V in all layers.
func (s *spec) tokenBytes() int { return 2 * s.layers * s.rowBytes() }

// firstFull returns the first layer that attends to everything; -1: none does.
func (s *spec) firstFull() int { return slices.Index(s.window, 0) }

// sliding says whether any layer keeps only a window.
func (s *spec) sliding() bool {
	for _, w := range s.window {
		if w > 0 {
			return true
		}
	}
	return false
}

func newSpec(m *kvtierv1.ModelSpec) (*spec, error) {
	bad := func(format string, a ...any) (*spec, error) { return nil, invalid(ReasonSpec, format, a...) }
	if m == nil {
		return bad("a model spec is needed for a new sequence")
	}
	m = proto.CloneOf(m)
	switch {
	case m.Layers < 1 || m.Layers > 1024:
		return bad("layers is %d, not 1 to 1024", m.Layers)
	case m.KvHeads < 1 || m.KvHeads > 256:
		return bad("kv_heads is %d, not 1 to 256", m.KvHeads)
	case m.QueryHeads < m.KvHeads || m.QueryHeads > 512 || m.QueryHeads%m.KvHeads != 0:
		return bad("query_heads is %d, not a multiple of kv_heads (%d) up to 512", m.QueryHeads, m.KvHeads)
	case m.HeadDim < 16 || m.HeadDim > 256 || m.HeadDim%16 != 0:
		return bad("head_dim is %d, not a multiple of 16 from 16 to 256", m.HeadDim)
	case len(m.Fingerprint) < 1 || len(m.Fingerprint) > 256:
		return bad("fingerprint has %d bytes, not 1 to 256: give a digest of weights, RoPE parameters and dtype", len(m.Fingerprint))
	case !finite(m.Scale) || m.Scale < 0:
		return bad("scale is %v: it must be finite and not negative", m.Scale)
	case !finite(m.Softcap) || m.Softcap < 0:
		return bad("softcap is %v: it must be finite and not negative", m.Softcap)
	case len(m.SinkLogits) != 0 && len(m.SinkLogits) != int(m.Layers*m.QueryHeads):
		return bad("sink_logits has %d entries, not layers*query_heads = %d", len(m.SinkLogits), m.Layers*m.QueryHeads)
	}
	for _, x := range m.SinkLogits {
		if !finite(x) {
			return bad("sink_logits holds NaN or infinity")
		}
	}
	if m.Scale == 0 {
		m.Scale = float32(1 / math.Sqrt(float64(m.HeadDim)))
	}
	if m.KvDtype == kvtierv1.ElementType_ELEMENT_TYPE_UNSPECIFIED {
		m.KvDtype = kvtierv1.ElementType_ELEMENT_TYPE_BF16
	}
	s := &spec{layers: int(m.Layers), queryHeads: int(m.QueryHeads), kvHeads: int(m.KvHeads), headDim: int(m.HeadDim),
		scale: m.Scale, softcap: m.Softcap, sinks: m.SinkLogits, typ: compress.ElementType(m.KvDtype),
		fingerprint: m.Fingerprint, msg: m}
	if s.typ.Size() == 0 {
		return bad("kv_dtype %d is unknown", m.KvDtype)
	}
	if err := s.kinds(m); err != nil {
		return nil, err
	}
	return s, nil
}

func finite(x float32) bool { return x-x == 0 }

// kinds spreads layer kinds over the layers, in the message too.
func (s *spec) kinds(m *kvtierv1.ModelSpec) error {
	switch len(m.LayerKinds) {
	case 0:
		m.LayerKinds = []*kvtierv1.LayerKind{{}}
	case 1, s.layers:
	default:
		return invalid(ReasonSpec, "layer_kinds has %d entries: give one for each of %d layers, one for all, or none", len(m.LayerKinds), s.layers)
	}
	for len(m.LayerKinds) < s.layers {
		m.LayerKinds = append(m.LayerKinds, m.LayerKinds[0])
	}
	for _, k := range m.LayerKinds {
		if k.GetSlidingWindow() > 1<<20 {
			return invalid(ReasonSpec, "a sliding window of %d tokens is too long: at most 1048576", k.SlidingWindow)
		}
		s.window = append(s.window, int(k.GetSlidingWindow()))
	}
	return nil
}

// equal compares with a spec given for an existing sequence.
func (s *spec) equal(o *spec) error {
	if !proto.Equal(s.msg, o.msg) {
		return fail(codes.FailedPrecondition, ReasonSpecDiffers, "the model spec differs from the sequence's: open a new sequence, or use the model that wrote this one")
	}
	return nil
}

// profileOf checks a profile; unspecified is balanced.
func profileOf(p kvtierv1.Profile) (tiers.Profile, error) {
	switch p {
	case kvtierv1.Profile_PROFILE_UNSPECIFIED, kvtierv1.Profile_PROFILE_BALANCED:
		return tiers.ProfileBalanced, nil
	case kvtierv1.Profile_PROFILE_EXACT:
		return tiers.ProfileExact, nil
	case kvtierv1.Profile_PROFILE_NEUTRAL:
		return tiers.ProfileNeutral, nil
	}
	return 0, invalid(ReasonArgument, "profile %d is unknown", p)
}
