package sparse

import (
	"kvtier/attention"
	"kvtier/attention/kernels"
	"kvtier/tiers"
)

// readValues reads the values of the best tokens of refined leaves; all other
// tokens are estimated.
func (u *run) readValues() error {
	u.normalise()
	most := len(u.leaves) * tiers.LeafTokens
	rank := make([]float32, 0, most)
	u.tokens = make([]token, 0, most)
	for i := range u.leaves {
		x := &u.leaves[i]
		if len(x.planes) < 2 {
			continue
		}
		for t := range x.n {
			u.tokens = append(u.tokens, token{i, t})
			rank = append(rank, x.valueGain[t])
		}
	}
	if err := u.fetch(u.affordable(rank)); err != nil {
		return err
	}
	u.estimateLeaves()
	return nil
}

// affordable returns the best tokens whose values the rest of the budget pays
// for. How many cache lines they share shows only after the choice, so that it
// is made by trial.
func (u *run) affordable(rank []float32) []int {
	least := attention.Top(rank, 1)
	most := len(rank)
	n := max(1, int(u.left/float64(u.valueBytes())))
	for try := 0; try < 6 && len(least) < most; try++ {
		chosen := attention.Top(rank, min(n, most))
		if cost := u.valueCost(chosen); cost <= u.left {
			least = chosen
			n = max(n+1, int(float64(n)*u.left/max(cost, 1)))
		} else {
			most = n - 1
			n = (len(least) + most + 1) / 2
		}
	}
	return least
}

func (u *run) valueCost(tokens []int) (bytes float64) {
	for seg, t := range u.bySegment(tokens) {
		bytes += float64(tiers.LineBytes(u.valueRanges(seg, t)))
		ranges, _ := u.drainRanges(seg, t)
		bytes += float64(tiers.LineBytes(ranges))
	}
	return bytes
}

// bySegment divides tokens by segment; in order of index they are in order of place.
func (u *run) bySegment(tokens []int) [][]int {
	out := make([][]int, len(u.segs))
	for _, c := range tokens {
		seg := u.leaves[u.tokens[c].leaf].seg
		out[seg] = append(out[seg], c)
	}
	return out
}

// valueRanges returns where the scales of tokens lie, which share cache lines
// with their neighbours', and after them where the codes lie.
func (u *run) valueRanges(seg int, tokens []int) []tiers.Range {
	out := make([]tiers.Range, 2*len(tokens))
	for i, c := range tokens {
		out[i], out[len(tokens)+i] = u.segs[seg].view.ValueRanges(u.place(u.tokens[c]))
	}
	return out
}

// place returns where a token is stored.
func (u *run) place(t token) int { return u.leaves[t.leaf].place + t.t }

// aheadValues is how many tokens before their use values are fetched into the cache.
const aheadValues = 16

// fetch reads the values of the chosen tokens and adds them to the partials.
func (u *run) fetch(chosen []int) error {
	bySeg := u.bySegment(chosen)
	ranges := make([][]tiers.Range, len(u.segs))
	for seg, t := range bySeg {
		ranges[seg] = u.valueRanges(seg, t)
	}
	u.acc.Read += int64(len(chosen))
	low, err := u.drainValues(bySeg)
	if err != nil {
		return err
	}
	values := newSum(u.rot, u.d)
	err = u.each(tiers.PlaneV4, ranges, func(seg int, b [][]byte) error {
		n := len(bySeg[seg])
		for i, c := range bySeg[seg] {
			kernels.Prefetch(b[n+min(i+aheadValues, n-1)])
			t := u.tokens[c]
			x := &u.leaves[t.leaf]
			x.read[t.t] = true
			scores := values.add(b[i], b[n+i], low[c])
			for r := range u.rows {
				scores.set(r, x.log[r][t.t])
				u.segs[seg].received += x.share[r][t.t]
				if u.tr.Token != nil {
					u.tr.Token(r, u.segs[seg].index, u.place(t), x.log[r][t.t], Read)
				}
			}
		}
		return nil
	})
	values.flush()
	return err
}

// drainValues reads the low codes of the chosen tokens that are drains.
func (u *run) drainValues(bySeg [][]int) (low map[int][]byte, err error) {
	ranges, drains := make([][]tiers.Range, len(bySeg)), make([][]int, len(bySeg))
	for seg, tokens := range bySeg {
		ranges[seg], drains[seg] = u.drainRanges(seg, tokens)
	}
	low = make(map[int][]byte)
	err = u.each(tiers.PlaneDrains, ranges, func(seg int, b [][]byte) error {
		for i, c := range drains[seg] {
			low[c] = b[i]
		}
		return nil
	})
	return low, err
}

// drainRanges returns which of the tokens are drains, and where their low codes lie.
func (u *run) drainRanges(seg int, tokens []int) (ranges []tiers.Range, drains []int) {
	v := u.segs[seg].view
	for _, c := range tokens {
		if v.IsDrain(u.leaves[u.tokens[c].leaf].i) {
			ranges, drains = append(ranges, v.DrainValue(u.place(u.tokens[c]))), append(drains, c)
		}
	}
	return ranges, drains
}
