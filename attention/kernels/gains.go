package kernels

// GainRow is what Gains knows of a row.
type GainRow struct {
	Top float32 // by which scores become shares
	// A share w counts w times the least of OfShare and w times OfSquare, and that times Factor.
	OfSquare, OfShare, Factor float32
}

// Gains writes the shares exp(x - Top) of a leaf's 16 tokens to shares, of which as of x a row begins every stride elements; their sum
// and the sum of their squares to sums [rows][2]; and to gain [16] what they count, all rows together. A share is 0
// if it is less than least, or its score no number; none is more than 1.
func Gains(gain, shares, sums, x []float32, stride int, rows []GainRow, least float32) {
	must(len(gain) >= LineTokens && len(sums) >= 2*len(rows), "gain or sums is too short")
	mustHold(len(x), len(rows), stride, LineTokens, "x is too short")
	mustHold(len(shares), len(rows), stride, LineTokens, "shares is too short")
	if len(rows) > 0 {
		gains(gain, shares, sums, x, stride, rows, least)
	}
}

func plainGains(gain, shares, sums, x []float32, stride int, rows []GainRow, least float32) {
	gain = gain[:LineTokens]
	clear(gain)
	for r, row := range rows {
		w := shares[r*stride:][:LineTokens]
		plainWeights(w, x[r*stride:][:LineTokens], row.Top)
		var sum, squares float32
		for t, s := range w {
			if s < least {
				s = 0
			}
			w[t] = s
			sum += s
			squares += s * s
			each := s * row.OfSquare
			if !(each < row.OfShare) { // nor a number: 0 times infinity
				each = row.OfShare
			}
			gain[t] += row.Factor * (s * each)
		}
		sums[2*r], sums[2*r+1] = sum, squares
	}
}
