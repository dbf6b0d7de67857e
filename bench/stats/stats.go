// Package stats holds the statistics that measurements share: errors and their intervals.
package stats

import "math"

// RelativeError returns |got - want| / |want|; 0 if want is zero.
func RelativeError[T float32 | float64](got []float32, want []T) float64 {
	var diff, norm float64
	for i, x := range want {
		w := float64(x)
		e := float64(got[i]) - w
		diff, norm = diff+e*e, norm+w*w
	}
	if norm == 0 {
		return 0
	}
	return math.Sqrt(diff / norm)
}

// Wilson returns the 95 % interval of a share p of n (E. B. Wilson, 1927); 0 to 1 of none.
func Wilson(p float64, n int) (low, high float64) {
	if n == 0 {
		return 0, 1
	}
	const z = 1.959964
	k := z * z / float64(n)
	mid, half := p+k/2, z*math.Sqrt(p*(1-p)/float64(n)+k/4/float64(n))
	return min(p, max(0, (mid-half)/(1+k))), max(p, min(1, (mid+half)/(1+k)))
}
