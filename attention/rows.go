package attention

import "math"

// Attend takes n tokens with keys k [n][d] and values v [n][d] into the
// partials of the query rows q [len(ps)][d]. Row r sees the first visible[r]
// tokens; a nil visible means all. scores is scratch of at least n.
func Attend(ps []Partial, q, k, v []float32, d int, softcap float32, visible []int, scores []float32) {
	n := len(k) / d
	for r := range ps {
		m := n
		if visible != nil {
			m = min(n, visible[r])
		}
		if m <= 0 {
			continue
		}
		attendRow(&ps[r], q[r*d:(r+1)*d], k, v, d, softcap, scores[:m])
	}
}

// attendRow does one row: scores first, so that the partial is rescaled once.
func attendRow(p *Partial, q, k, v []float32, d int, softcap float32, scores []float32) {
	hi := p.Max
	for t := range scores {
		s := Softcap(Dot(q, k[t*d:(t+1)*d]), softcap)
		scores[t] = s
		hi = max(hi, s)
	}
	if hi > p.Max {
		p.rescale(hi)
	}
	if math.IsInf(float64(p.Max), -1) {
		return // every token is masked
	}
	for t, s := range scores {
		if w := exp32(s - p.Max); w > 0 {
			p.Sum += float64(w)
			Axpy(p.Out, w, v[t*d:(t+1)*d])
		}
	}
}

// RelativeError returns |a - b| / |b|; 0 if both are zero.
func RelativeError(a, b []float32) float32 {
	var diff, norm float64
	for i := range b {
		e := float64(a[i]) - float64(b[i])
		diff += e * e
		norm += float64(b[i]) * float64(b[i])
	}
	switch {
	case diff == 0:
		return 0
	case norm == 0:
		return 1
	}
	return float32(math.Sqrt(diff / norm))
}
