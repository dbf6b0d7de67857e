package kernels

import "math"

// Largest returns the largest of x and least; it ignores what is no number.
func Largest(x []float32, least float32) float32 {
	whole := len(x) &^ 15
	if whole > 0 {
		least = largest(x[:whole], least)
	}
	if whole < len(x) {
		tail := padded(x[whole:])
		least = largest(tail[:], least)
	}
	return least
}

// leastExponent is where exponentials are 0 from: below, they leave float32's normal range.
const leastExponent = -87

// Weights writes the weights exp(x - top) of scores x to dst, which may be x, and returns the
// weights' sum. No weight is more than 1: top is the largest score. It is 0 if
// x - top is below -87 or no number.
func Weights(dst, x []float32, top float32) (sum float32) {
	must(len(dst) >= len(x), "dst is too short")
	whole := len(x) &^ 15
	if whole > 0 {
		sum = weights(dst[:whole], x[:whole], top)
	}
	if whole < len(x) {
		tail := padded(x[whole:])
		sum += weights(tail[:], tail[:], top)
		copy(dst[whole:len(x)], tail[:])
	}
	return sum
}

// padded returns fewer than 16 scores with others that count for nothing.
func padded(x []float32) (out [16]float32) {
	for i := copy(out[:], x); i < len(out); i++ {
		out[i] = float32(math.Inf(-1))
	}
	return out
}

// LeafWeights replaces scores x, those of 16 tokens a leaf, by their weights exp(x + offset), of offsets [leaves], and writes to sums [leaves][2] each
// leaf's sum and the sum of its squares. No weight is more than 1; it is 0 if it is less than least, or its exponent less than -87 or no number.
func LeafWeights(x, sums, offsets []float32, least float32) {
	leaves := len(x) / LineTokens
	must(len(sums) >= 2*leaves, "sums is too short")
	must(len(offsets) >= leaves, "offsets is too short")
	if leaves > 0 {
		leafWeights(x[:leaves*LineTokens], sums, offsets, least)
	}
}

// RunTokens is how many tokens a run has.
const RunTokens = 64

// RunSum is what the scores of a run of tokens say of it.
type RunSum struct {
	Mean, Top float32 // of scores; the largest is that of those that are numbers, -Inf if there are none
	// Sums of the tokens' weights exp(score - Top), and of their squares. A token counts for nothing if its score is no number, or more than 87 below.
	Sum, Squares float32
}

// SumRuns sums up runs of scores x [len(dst)][RunTokens].
func SumRuns(dst []RunSum, x []float32) {
	must(len(x)/RunTokens >= len(dst), "x is too short")
	if len(dst) > 0 {
		sumRuns(dst, x)
	}
}

func plainSumRuns(dst []RunSum, x []float32) {
	for i := range dst {
		run := x[i*RunTokens:][:RunTokens]
		out := RunSum{Top: plainLargest(run, float32(math.Inf(-1)))}
		for _, s := range run {
			out.Mean += s / RunTokens
			if s -= out.Top; s >= leastExponent {
				w := float32(math.Exp(float64(s)))
				out.Sum, out.Squares = out.Sum+w, out.Squares+w*w
			}
		}
		dst[i] = out
	}
}

func plainLargest(x []float32, most float32) float32 {
	for _, s := range x {
		if s > most {
			most = s
		}
	}
	return most
}

func plainWeights(dst, x []float32, top float32) float32 {
	var sum float64
	for i, s := range x {
		dst[i] = 0
		if s -= top; s >= leastExponent {
			dst[i] = float32(math.Exp(float64(min(s, 0))))
			sum += float64(dst[i])
		}
	}
	return float32(sum)
}

func plainLeafWeights(x, sums, offsets []float32, least float32) {
	for leaf := range len(x) / LineTokens {
		x := x[leaf*LineTokens:][:LineTokens]
		plainWeights(x, x, -offsets[leaf])
		var sum, squares float32
		for t, w := range x {
			if w < least {
				w, x[t] = 0, 0
			}
			sum += w
			squares += w * w
		}
		sums[2*leaf], sums[2*leaf+1] = sum, squares
	}
}
