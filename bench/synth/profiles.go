package synth

import "math/rand/v2"

// Profile is what a query head of a real model was measured to do.
type Profile struct {
	Peak   float64 // nats of the highest score of a token that is neither first nor newest above the mean of these
	Sink   float64 // share of the attention that the first 16 tokens get
	Recent float64 // and the newest 256
}

// drawProfile draws a head of the first layer, or of another one.
func drawProfile(rng *rand.Rand, first bool) Profile {
	from := profiles
	if first {
		from = firstLayer
	}
	return from[rng.IntN(len(from))]
}

// What 'kvbench shape' printed for SmolLM2-135M (8,192 tokens, layers 0, 9, 18 and 27) and Gemma-3-270M
// (12,288 tokens, its three global layers) over the text tuning-code.
var (
	firstLayer = []Profile{
		{3.3, 0, 0.17}, {4.2, 0, 0.21}, {3.7, 0, 0.18}, {8.5, 0, 0.75}, {5.8, 0, 0.38}, {5.6, 0, 0.45}, {3.6, 0, 0.16}, {6.5, 0, 0.63},
		{5, 0, 0.23},
	}
	profiles = []Profile{
		{8.7, 0.07, 0.24}, {16.8, 0.22, 0.2}, {12.9, 0.23, 0.34}, {12.6, 0.3, 0.49}, {13.1, 0.33, 0.28}, {10.3, 0.36, 0.17}, {8.5, 0.09, 0.19}, {7.3, 0.16, 0.21},
		{11.4, 0.14, 0.26}, {10.2, 0.33, 0.32}, {10.1, 0.22, 0.16}, {10.8, 0.2, 0.15}, {12.4, 0, 0.48}, {12.7, 0, 0.68}, {15.7, 0, 0.68}, {14.6, 0, 0.63},
		{18, 0, 0.7}, {15.4, 0, 0.7}, {14.9, 0, 0.39}, {15.6, 0, 0.56}, {12.9, 0, 0.63}, {12.9, 0.31, 0.66}, {14.5, 0.3, 0.67}, {10.2, 0.55, 0.37},
		{12.1, 0.6, 0.38}, {12.7, 0.51, 0.46}, {15.2, 0.23, 0.76}, {20.9, 0.57, 0.35}, {24.3, 0.72, 0.07}, {24.7, 0.82, 0}, {12, 0.49, 0.45}, {15.8, 0.16, 0.81},
		{11.1, 0.51, 0.43}, {13.9, 0.21, 0.73}, {14.7, 0.43, 0.56}, {12.9, 0.6, 0.37}, {18.6, 0.49, 0.43}, {19.2, 0.65, 0.34}, {19.7, 0.47, 0.48},
	}
)
