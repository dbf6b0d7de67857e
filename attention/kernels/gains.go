package kernels

// GainRow is what Gains knows of a row: a weight w counts Factor times w times the least of OfWeight and w times OfSquare.
type GainRow struct{ OfSquare, OfWeight, Factor float32 }

// Gains writes to gain [16] what the weights w [rows][16] of a leaf's tokens count, all rows together.
func Gains(gain, w []float32, rows []GainRow) {
	must(len(gain) >= LineTokens, "gain is too short")
	must(len(w)/LineTokens >= len(rows), "w is too short")
	if len(rows) > 0 {
		gains(gain, w, rows)
	}
}

func plainGains(gain, w []float32, rows []GainRow) {
	gain = gain[:LineTokens]
	clear(gain)
	for r, row := range rows {
		for t, w := range w[r*LineTokens:][:LineTokens] {
			each := w * row.OfSquare
			if !(each < row.OfWeight) { // nor a number: 0 times infinity
				each = row.OfWeight
			}
			gain[t] += row.Factor * (w * each)
		}
	}
}
