package server

import (
	"math"

	kvtierv1 "kvtier/proto/kvtier/v1"
)

// A budget by share is divided among a model's full-attention layers and KV
// heads, so that the mean stays what was asked for and the sum of squared
// errors is least: with errors of c/share^1.4 a head gets a share in
// proportion to c^.53 (docs/decisions/0008-divided-budgets.md). The division is made when a
// step asks the first such layer, and holds for the step.

const (
	divideExponent = 2 / (1 + 2*falls)
	// mostMoved bounds a head's share, as a multiple or a part of what was asked for.
	mostMoved = 3
)

// division is how a share is divided.
type division struct {
	asked  float32
	shares map[[2]int]float32 // by layer and KV head
}

// divided returns what each KV head of the call may read.
func (c *call) divided(share float32) []float32 {
	sp := c.seq.spec
	out := make([]float32, sp.kvHeads)
	for h := range out {
		out[h] = share
	}
	if !c.seq.srv.opt.Steer || c.budget.mode != kvtierv1.AttendMode_ATTEND_MODE_BUDGET || share >= wholeShare || sp.window[c.layer] > 0 {
		return out
	}
	s := &c.seq.steering
	if c.layer == sp.firstFull() {
		d := c.divide(share)
		s.mu.Lock()
		s.mu.division = d
		s.mu.Unlock()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	// A layer that is asked for another share than the first one stands alone.
	if d := s.mu.division; d != nil && d.asked == share {
		for h := range out {
			out[h] = d.shares[[2]int{c.layer, h}]
		}
	}
	return out
}

// divide divides a share; nil if nothing is known of the heads yet.
func (c *call) divide(share float32) *division {
	sp := c.seq.spec
	var heads [][2]int
	var difficulties []float64
	for l, w := range sp.window {
		for h := range sp.kvHeads {
			if w > 0 {
				continue
			}
			d, known := c.seq.steering.known(l, h)
			if !known {
				return nil
			}
			heads = append(heads, [2]int{l, h})
			difficulties = append(difficulties, d*math.Exp(c.seq.srv.calibration.headBias(c.seq.key(), l, h)))
		}
	}
	out := &division{share, make(map[[2]int]float32, len(heads))}
	for i, s := range divide(difficulties, float64(share)) {
		out.shares[heads[i]] = float32(s)
	}
	return out
}

// divide returns shares in proportion to difficulty^divideExponent, within
// bounds, whose mean is at most share.
func divide(difficulties []float64, share float64) []float64 {
	lo := max(share/mostMoved, min(share, leastShare))
	hi := min(1, share*mostMoved)
	out := make([]float64, len(difficulties))
	at := func(factor float64) (mean float64) {
		for i, d := range difficulties {
			out[i] = min(hi, max(lo, factor*math.Pow(d, divideExponent)))
			mean += out[i] / float64(len(difficulties))
		}
		return mean
	}
	// The mean grows with the factor: bisect its logarithm.
	low, high := -40., 40.
	for range 60 {
		if mid := (low + high) / 2; at(math.Exp(mid)) <= share {
			low = mid
		} else {
			high = mid
		}
	}
	at(math.Exp(low))
	return out
}
