package server

import (
	"cmp"
	"slices"

	kvtierv1 "kvtier/proto/kvtier/v1"
	"kvtier/server/sparse"
)

// How a token's attention was obtained, as an index.
const (
	massExact = iota
	massRead
	massScanned
	massEstimated
	massKinds
)

// massOf maps what became of a sealed token to its kind of mass.
var massOf = [...]int{sparse.Estimated: massEstimated, sparse.Scanned: massScanned, sparse.Read: massRead}

// spanMass sums the attention of labelled spans, one query head after the
// other. Spans may overlap and lie anywhere, so each head's weights are laid
// out by position and a span is the difference of two running sums.
type spanMass struct {
	spans  []*kvtierv1.ExplainSpan
	heads  int
	weight [massKinds][]float64 // of the head at work, by position; [kind][positions]
	inside []bool               // positions that lie in a span
	// outside is the mass of the other positions, summed over heads.
	outside float64
}

// newSpanMass prepares for a query that sees positions before end.
func newSpanMass(st *state, end uint64, heads int) *spanMass {
	m := &spanMass{heads: heads, inside: make([]bool, end)}
	for i := range m.weight {
		m.weight[i] = make([]float64, end)
	}
	// A span that was sent twice, as a worker may after an error, counts once.
	type key struct {
		start, end uint64
		label      string
	}
	known := map[key]bool{}
	for _, l := range st.labels {
		k := key{l.Start, l.End, l.Label}
		if l.Start >= end || known[k] {
			continue
		}
		known[k] = true
		m.spans = append(m.spans, &kvtierv1.ExplainSpan{Span: l})
		for i := l.Start; i < min(l.End, end); i++ {
			m.inside[i] = true
		}
	}
	return m
}

// add counts the weight of one token for the head at work.
func (m *spanMass) add(kind int, position uint64, weight float32) {
	m.weight[kind][position] += float64(weight)
}

// endHead sums up the head at work and clears it for the next.
func (m *spanMass) endHead() {
	for i, in := range m.inside {
		if !in {
			for kind := range m.weight {
				m.outside += m.weight[kind][i]
			}
		}
	}
	total := make([]float64, len(m.spans))
	for kind, w := range m.weight {
		sum := 0.0
		for i := range w {
			sum += w[i]
			w[i] = sum
		}
		for i, s := range m.spans {
			part := until(w, s.Span.End) - until(w, s.Span.Start)
			total[i] += part
			*[...]*float32{&s.MassExact, &s.MassRead, &s.MassScanned, &s.MassEstimated}[kind] += float32(part / float64(m.heads))
		}
		clear(w)
	}
	for i, s := range m.spans {
		s.HeadMass = append(s.HeadMass, float32(total[i]))
		s.Mass += float32(total[i] / float64(m.heads))
	}
}

// until returns the running sum of the positions before end.
func until(sums []float64, end uint64) float64 {
	if end == 0 {
		return 0
	}
	return sums[min(end, uint64(len(sums)))-1]
}

// result returns the heaviest spans, and the mass outside all spans.
func (m *spanMass) result(top int) ([]*kvtierv1.ExplainSpan, float32) {
	slices.SortStableFunc(m.spans, func(a, b *kvtierv1.ExplainSpan) int { return cmp.Compare(b.Mass, a.Mass) })
	return m.spans[:min(top, len(m.spans))], float32(m.outside / float64(m.heads))
}
