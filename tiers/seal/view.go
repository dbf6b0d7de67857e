package seal

import (
	"encoding/binary"

	"kvtier/attention"
	"kvtier/compress"
	"kvtier/tiers"
)

// View knows where things lie inside the planes of one head. Stored tokens are
// numbered by place: the body's first, leaf by leaf, then the outliers.
type View struct {
	D    int
	Info tiers.HeadInfo
}

// Stored returns how many tokens are stored in planes: all but the sinks.
func (v View) Stored() int { return v.Info.Body + v.Info.Outliers }

// Pages and Leaves return how many of them the body has.
func (v View) Pages() int { return (v.Info.Body + tiers.PageTokens - 1) / tiers.PageTokens }

// Leaves returns how many leaves the body has.
func (v View) Leaves() int { return (v.Info.Body + tiers.LeafTokens - 1) / tiers.LeafTokens }

// PageTokens returns the number of tokens of page p.
func (v View) PageTokens(p int) int { return min(tiers.PageTokens, v.Info.Body-p*tiers.PageTokens) }

// LeafTokens returns the number of tokens of leaf l.
func (v View) LeafTokens(l int) int { return min(tiers.LeafTokens, v.Info.Body-l*tiers.LeafTokens) }

// LeavesOf returns the leaves of page p as [first, end).
func (v View) LeavesOf(p int) (first, end int) {
	const per = tiers.PageTokens / tiers.LeafTokens
	return p * per, min((p+1)*per, v.Leaves())
}

// LeafSummaries returns where the summaries of page p's leaves lie in PlaneLeaves.
func (v View) LeafSummaries(p int) tiers.Range {
	first, end := v.LeavesOf(p)
	return tiers.Range{Off: attention.SummaryBytes(first, v.D), Len: attention.SummaryBytes(end-first, v.D)}
}

// LeafKeys returns where leaf l lies in PlaneK2 and in PlaneK4.
func (v View) LeafKeys(l int) tiers.Range {
	k2, _, _ := compress.KeyPlaneLeafBytes(v.D)
	return tiers.Range{Off: l * k2, Len: k2}
}

// StepsOf returns where the steps of leaf l lie in PlaneSteps.
func (v View) StepsOf(l int) tiers.Range {
	n := compress.KeyStepsBytes(v.D)
	return tiers.Range{Off: l * tiers.LeafTokens / tiers.StepTokens * n, Len: n}
}

// ValueRanges returns where the scale and the high codes of the value at place t lie in PlaneV4.
func (v View) ValueRanges(t int) (scale, codes tiers.Range) {
	row := compress.ValueRowBytes(v.D)
	page := t / tiers.PageTokens
	n := min(tiers.PageTokens, v.Stored()-page*tiers.PageTokens)
	base := page * tiers.PageTokens * (compress.ValueScaleBytes + row)
	i := t % tiers.PageTokens
	return tiers.Range{Off: base + i*compress.ValueScaleBytes, Len: compress.ValueScaleBytes},
		tiers.Range{Off: base + n*compress.ValueScaleBytes + i*row, Len: row}
}

// size is how many bytes plane p has at least and at most in a segment of a profile.
func (v View) size(p tiers.Plane, t compress.ElementType, profile tiers.Profile) (least, most int) {
	k2, k4, k8 := compress.KeyPlaneLeafBytes(v.D)
	row, leaves := compress.ValueRowBytes(v.D), v.Leaves()
	exactly := func(n int) (int, int) { return n, n }
	low := func(n int) (int, int) {
		if profile == tiers.ProfileNeutral {
			return n, n
		}
		return 0, n
	}
	switch p {
	case tiers.PlanePages:
		return exactly(attention.SummaryBytes(v.Pages(), v.D))
	case tiers.PlaneLeaves:
		return exactly(attention.SummaryBytes(leaves, v.D))
	case tiers.PlaneSteps:
		return exactly((v.Info.Body + tiers.StepTokens - 1) / tiers.StepTokens * compress.KeyStepsBytes(v.D))
	case tiers.PlaneOrder:
		return exactly(2 * v.Stored())
	case tiers.PlaneOutliers:
		return exactly(v.OutlierBytes())
	case tiers.PlaneK2:
		return exactly(leaves * k2)
	case tiers.PlaneK4:
		return exactly(leaves * k4)
	case tiers.PlaneK8:
		return low(leaves * k8)
	case tiers.PlaneV4:
		return exactly(v.Stored() * (compress.ValueScaleBytes + row))
	case tiers.PlaneV8:
		return low(v.Stored() * row)
	case tiers.PlaneSinks:
		return exactly(2 * v.Info.Sinks * v.D * t.Size())
	case tiers.PlaneKX, tiers.PlaneVX:
		if profile == tiers.ProfileExact {
			pages := compress.ExactPages(v.Stored())
			return 5 * pages, 5*pages + v.Stored()*v.D*t.Size()
		}
	}
	return 0, 0
}

// BytesAt4Bits is what reading every stored token of the head once at 4 bits
// transfers: the base of budgets. Summaries are not in it.
func (v View) BytesAt4Bits() int {
	return v.Stored() * (compress.ValueRowBytes(v.D)*2 + compress.ValueScaleBytes)
}

// Positions returns the offset from the segment's start of each stored token.
func (v View) Positions(order []byte) []int {
	out := make([]int, v.Stored())
	for i := range out {
		out[i] = int(binary.LittleEndian.Uint16(order[2*i:]))
	}
	return out
}

// Keys reconstructs all stored keys to dst [Stored][D]; k8 may be nil.
func (v View) Keys(dst []float32, steps, k2, k4, k8, outliers []byte) error {
	d := v.D
	b2, b4, b8 := compress.KeyPlaneLeafBytes(d)
	leaf := make([]float32, tiers.LeafTokens*d)
	var s compress.KeySteps
	for l := range v.Leaves() {
		if l*tiers.LeafTokens%tiers.StepTokens == 0 {
			r := v.StepsOf(l)
			var err error
			if s, err = compress.ParseKeySteps(steps[r.Off:r.Off+r.Len], d, v.Info.KeyExp); err != nil {
				return err
			}
		}
		var low []byte
		if k8 != nil {
			low = k8[l*b8 : (l+1)*b8]
		}
		compress.UnpackKeys(leaf, k2[l*b2:(l+1)*b2], k4[l*b4:(l+1)*b4], low, d, s)
		copy(dst[l*tiers.LeafTokens*d:v.Info.Body*d], leaf)
	}
	return v.OutlierKeys(dst[v.Info.Body*d:v.Stored()*d], outliers)
}

// outlierCodes is where the codes begin in PlaneOutliers.
func (v View) outlierCodes() int {
	return compress.KeyStepsBytes(v.D) + attention.SummaryBytes(1, v.D)
}

// OutlierBytes is the size of PlaneOutliers; 0 if there are no outliers.
func (v View) OutlierBytes() int {
	if v.Info.Outliers == 0 {
		return 0
	}
	return v.outlierCodes() + v.Info.Outliers*v.D
}

// OutlierKeys reconstructs the outliers' keys to dst [Outliers][D].
func (v View) OutlierKeys(dst []float32, outliers []byte) error {
	if v.Info.Outliers == 0 {
		return nil
	}
	s, err := compress.ParseKeySteps(outliers[:compress.KeyStepsBytes(v.D)], v.D, v.Info.KeyExp)
	if err != nil {
		return err
	}
	compress.UnpackKeyCodes(dst, outliers[v.outlierCodes():], v.D, s)
	return nil
}

// OutlierSummary returns the one summary that the outliers have.
func (v View) OutlierSummary(outliers []byte) attention.Summaries {
	s, _ := attention.ParseSummaries(outliers[compress.KeyStepsBytes(v.D):v.outlierCodes()], v.D, 1)
	return s
}

// Values reconstructs all stored values, rotated, to dst [Stored][D]; v8 may be nil.
func (v View) Values(dst []float32, v4, v8 []byte) {
	row := compress.ValueRowBytes(v.D)
	for t := range v.Stored() {
		s, c := v.ValueRanges(t)
		var low []byte
		if v8 != nil {
			low = v8[t*row : (t+1)*row]
		}
		compress.UnpackValue(dst[t*v.D:(t+1)*v.D], v4[s.Off:s.Off+s.Len], v4[c.Off:c.Off+c.Len], low, v.D)
	}
}
