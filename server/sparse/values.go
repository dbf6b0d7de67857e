package sparse

import (
	"slices"

	"kvtier/attention"
	"kvtier/compress"
	"kvtier/tiers"
)

// readValues reads the values of the best tokens of refined leaves; all other
// tokens are estimated.
func (u *run) readValues() error {
	var rank []float32
	for i := range u.leaves {
		x := &u.leaves[i]
		if len(x.planes) < 2 {
			continue
		}
		all := make([]float32, x.n*u.rows)
		for t := range x.n {
			log := all[t*u.rows : (t+1)*u.rows : (t+1)*u.rows]
			for r := range log {
				log[r] = x.log[r][t]
			}
			u.tokens = append(u.tokens, token{seg: x.seg, place: x.place + t, log: log})
			rank = append(rank, u.valueGain(x, t))
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
		bytes += float64(lineBytes(u.valueRanges(seg, t)))
	}
	return bytes
}

// bySegment divides tokens by segment, in order of place.
func (u *run) bySegment(tokens []int) [][]int {
	out := make([][]int, len(u.segs))
	for _, c := range tokens {
		out[u.tokens[c].seg] = append(out[u.tokens[c].seg], c)
	}
	for _, t := range out {
		slices.SortFunc(t, func(a, b int) int { return u.tokens[a].place - u.tokens[b].place })
	}
	return out
}

// valueRanges returns where the scales of tokens lie, which share cache lines
// with their neighbours', and after them where the codes lie.
func (u *run) valueRanges(seg int, tokens []int) []tiers.Range {
	out := make([]tiers.Range, 2*len(tokens))
	for i, c := range tokens {
		out[i], out[len(tokens)+i] = u.segs[seg].view.ValueRanges(u.tokens[c].place)
	}
	return out
}

// fetch reads the values of the chosen tokens and adds them to the partials.
func (u *run) fetch(chosen []int) error {
	bySeg := u.bySegment(chosen)
	ranges := make([][]tiers.Range, len(u.segs))
	for seg, t := range bySeg {
		ranges[seg] = u.valueRanges(seg, t)
	}
	u.acc.Read += int64(len(chosen))
	v := make([]float32, u.d)
	return u.each(tiers.PlaneV4, ranges, func(seg int, b [][]byte) error {
		for i, c := range bySeg[seg] {
			t := &u.tokens[c]
			t.read = true
			compress.UnpackValue(v, b[i], b[len(bySeg[seg])+i], nil, u.d)
			for r := range u.rows {
				u.rot[r].Add(t.log[r], v)
				if u.tr.Token != nil {
					u.tr.Token(r, u.segs[seg].index, t.place, t.log[r], Read)
				}
			}
			u.segs[seg].received += u.share(func(r int) float32 { return t.log[r] })
		}
		return nil
	})
}
