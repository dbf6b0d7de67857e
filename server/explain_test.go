package server

import (
	"math"
	"testing"

	kvtierv1 "kvtier/proto/kvtier/v1"
)

// weights is the attention of one query head in float64 over the model's own
// rows: a weight for each position up to pos; what learned sinks take is missing.
func (m *model) weights(layer, pos, h int) []float64 {
	d, kv, qh := int(m.spec.HeadDim), int(m.spec.KvHeads), int(m.spec.QueryHeads)
	lo := 0
	if len(m.spec.LayerKinds) > 0 {
		if w := int(m.spec.LayerKinds[layer].SlidingWindow); w > 0 {
			lo = max(0, pos+1-w)
		}
	}
	out := make([]float64, pos+1)
	sum := 0.0
	if len(m.spec.SinkLogits) > 0 {
		sum = math.Exp(float64(m.spec.SinkLogits[layer*qh+h]))
	}
	for t := lo; t <= pos; t++ {
		s := 0.0
		for i := range d {
			s += float64(m.q[layer][(pos*qh+h)*d+i]) * float64(m.k[layer][(t*kv+h/(qh/kv))*d+i])
		}
		out[t] = math.Exp(s / math.Sqrt(float64(d)))
		sum += out[t]
	}
	for t := range out {
		out[t] /= sum
	}
	return out
}

// Labelled spans get the attention that their tokens have, whatever the
// profile stores, and each share of it is counted under how it was obtained.
func TestExplainSpans(t *testing.T) {
	sinks := testSpec()
	for range sinks.Layers * sinks.QueryHeads {
		sinks.SinkLogits = append(sinks.SinkLogits, 9)
	}
	labels := []*kvtierv1.Span{
		{Start: 0, End: 40, Label: "first"}, // holds the tokens that stay unquantised
		{Start: 40, End: 1500, Label: "a"},
		{Start: 1500, End: 3000, Label: "b"}, // in two segments
		{Start: 1700, End: 1800, Label: "inside b"},
		{Start: 1700, End: 1800, Label: "inside b"}, // sent again
		{Start: 4000, End: 4900, Label: "sealed and tail"},
	}
	for _, c := range []struct {
		name      string
		spec      *kvtierv1.ModelSpec
		profile   kvtierv1.Profile
		layer     int
		position  int
		tolerance float64
	}{
		{"exact", testSpec(), kvtierv1.Profile_PROFILE_EXACT, 1, 4899, 1e-5},
		{"exact, inside the sealed part", testSpec(), kvtierv1.Profile_PROFILE_EXACT, 1, 3300, 1e-5},
		{"neutral", testSpec(), kvtierv1.Profile_PROFILE_NEUTRAL, 0, 4899, .01},
		{"balanced, learned sinks", sinks, kvtierv1.Profile_PROFILE_BALANCED, 1, 4899, .03},
		{"window", slidingSpec(), kvtierv1.Profile_PROFILE_BALANCED, 2, 4899, 1e-5},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			m := newModel(7, c.spec, 4900)
			srv := openServer(t, t.TempDir(), Options{ReadAllTokens: -1})
			s := openSequence(t, srv, &kvtierv1.OpenSequenceRequest{Spec: c.spec, Profile: c.profile})
			m.feed(t, s, 0, m.n)
			if err := s.append(t.Context(), &appendRequest{start: 4899, ids: m.ids[4899:], labels: labels}); err != nil {
				t.Fatal(err)
			}
			waitSealed(t, s, 4096)
			m.ask(t, s, c.layer, c.position, shareBudget(.2))
			e, err := s.explain(t.Context(), c.layer, 4, 100)
			if err != nil {
				t.Fatal(err)
			}
			m.checkSpans(t, e, c.layer, c.position, c.tolerance)
			few, err := s.explain(t.Context(), c.layer, 4, 2)
			if err != nil || len(few.Spans) != 2 || few.Spans[0].Span != e.Spans[0].Span {
				t.Errorf("the two heaviest: %v, %v", few.GetSpans(), err)
			}
		})
	}
}

func (m *model) checkSpans(t *testing.T, e *kvtierv1.ExplainResponse, layer, pos int, tolerance float64) {
	t.Helper()
	if got, want := len(e.Spans), map[bool]int{true: 5, false: 4}[pos >= 4000]; got != want {
		t.Fatalf("%d spans, want %d", got, want)
	}
	var scanned, read, estimated float32
	last := float32(math.Inf(1))
	for _, s := range e.Spans {
		mean := 0.0
		for h, got := range s.HeadMass {
			want := 0.0
			for p, w := range m.weights(layer, pos, h) {
				if uint64(p) >= s.Span.Start && uint64(p) < s.Span.End {
					want += w
				}
			}
			if math.Abs(float64(got)-want) > tolerance {
				t.Errorf("%s, head %d: mass %v, want %v", s.Span.Label, h, got, want)
			}
			mean += float64(got) / float64(len(s.HeadMass))
		}
		parts := s.MassExact + s.MassRead + s.MassScanned + s.MassEstimated
		if math.Abs(float64(s.Mass)-mean) > 1e-5 || math.Abs(float64(s.Mass-parts)) > 1e-5 || s.Mass > last {
			t.Errorf("%s: mass %v, mean of heads %v, sum of parts %v, span before it %v", s.Span.Label, s.Mass, mean, parts, last)
		}
		last = s.Mass
		scanned, read, estimated = scanned+s.MassScanned, read+s.MassRead, estimated+s.MassEstimated
	}
	if window := len(m.spec.LayerKinds) > 0; !window && (read <= 0 || estimated <= 0) || window && read+scanned+estimated > 0 {
		t.Errorf("read %v, scanned %v, estimated %v", read, scanned, estimated)
	}
	outside := 0.0
	for h := range e.Heads {
		for p, w := range m.weights(layer, pos, h) {
			if p >= 3000 && p < 4000 {
				outside += w / float64(len(e.Heads))
			}
		}
	}
	if math.Abs(float64(e.MassUnlabelled)-outside) > tolerance {
		t.Errorf("outside all spans: %v, want %v", e.MassUnlabelled, outside)
	}
}
