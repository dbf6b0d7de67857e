package quality

import (
	"context"
	"errors"
	"math"
	"slices"

	"kvtier/attention"
	"kvtier/attention/kernels"
	"kvtier/compress"
	"kvtier/tiers"
	"kvtier/tiers/seal"
)

// What a GPU does that chooses (docs/decisions/0028-a-gpu-chooses.md), in plain Go: all that it holds is scanned, a share of the pages is read, and
// the others stand by the masses that scanning gave them.

// devicePage is a whole page of a body.
type devicePage struct {
	segment, page int
	value         []float32 // mean, rotated back
	spread        float64   // of values
	log           [][]float64
	mass          []float64 // [rows], log
	rule, noise   []float64 // [rows], see select.cu
}

// gpuScale is server.deviceErrorScale.
const gpuScale = 3

// gpu reads that share of the pages.
func gpu(_ context.Context, h *headContext, x *question, share float64) (*answer, error) {
	d, rows := h.d.Dim, x.rows
	ps, a := attention.ClonePartials(x.zone), newAnswer(x)
	logs := make([][]float64, rows)
	for r := range logs {
		logs[r] = make([]float64, x.pos+1)
		for t := range logs[r] {
			logs[r][t] = math.Inf(-1)
		}
	}
	var pages []*devicePage
	var scan, all int64
	for n, s := range h.segs {
		if s.Header.Profile != tiers.ProfileBalanced || s.Low {
			return nil, errors.New("method gpu: the profile is not balanced")
		}
		for p := range tiers.NumPlanes {
			_, bytes, _ := s.Header.Piece(h.head, p)
			switch p {
			case tiers.PlaneK1, tiers.PlaneSteps:
				scan, all = scan+int64(bytes), all+int64(bytes)
			case tiers.PlanePages:
				scan += int64(bytes)
			case tiers.PlaneK2, tiers.PlaneK3, tiers.PlaneK4, tiers.PlaneV4:
				all += int64(bytes)
			}
		}
		got, err := h.scanPages(n, x)
		if err != nil {
			return nil, err
		}
		pages = append(pages, got...)
	}
	rank := make([]float64, len(pages))
	for r := range rows {
		top, sum := math.Inf(-1), 0.
		for _, p := range pages {
			top = max(top, p.mass[r])
		}
		for _, p := range pages {
			sum += math.Exp(p.mass[r] - top)
		}
		for i, p := range pages {
			rank[i] = max(rank[i], math.Exp(p.mass[r]-top)/sum)
		}
	}
	order := make([]int, len(pages))
	for i := range order {
		order[i] = i
	}
	slices.SortStableFunc(order, func(i, j int) int {
		switch {
		case rank[i] > rank[j]:
			return -1
		case rank[i] < rank[j]:
			return 1
		}
		return 0
	})
	unread := map[[2]int]*devicePage{}
	for _, i := range order[int(math.Ceil(share*float64(len(pages)))):] {
		unread[[2]int{pages[i].segment, pages[i].page}] = pages[i]
	}
	read := 0
	for n, places := range h.places {
		for i, pos := range places {
			if p := unread[[2]int{n, i / tiers.PageTokens}]; p != nil {
				for r := range rows {
					logs[r][pos] = p.log[r][i%tiers.PageTokens]
				}
				continue
			}
			read++
			a.read[pos] = true
			k, v := h.k4[pos*d:(pos+1)*d], h.v4[pos*d:(pos+1)*d]
			for r := range rows {
				score := attention.Dot(x.q[r*d:(r+1)*d], k)
				ps[r].Add(score, v)
				logs[r][pos] = float64(score)
			}
		}
	}
	values, weights := make([]float64, rows), make([]float64, rows)
	for _, p := range unread {
		for r := range rows {
			ps[r].Add(float32(p.mass[r]), p.value)
		}
	}
	a.stated = 0
	for r := range rows {
		lse, norm2 := float64(ps[r].LSE()), 0.
		for _, y := range ps[r].Out {
			norm2 += float64(y) * float64(y) / (ps[r].Sum * ps[r].Sum)
		}
		for _, p := range unread {
			share := math.Exp(p.mass[r] - lse)
			values[r] += share * share * p.rule[r] * p.spread
			weights[r] += share * share * p.noise[r]
		}
		a.stated += min(1, gpuScale*math.Sqrt((values[r]+2*weights[r]*norm2)/norm2)) / float64(rows)
	}
	stored := 0
	for _, places := range h.places {
		stored += len(places)
	}
	a.ram = scan + all*int64(read)/int64(stored)
	a.disk = a.ram
	h.finish(a, x, ps, logs)
	return a, nil
}

// scanPages weighs the whole pages of a segment's body by the first plane of keys.
func (h *headContext) scanPages(n int, x *question) (out []*devicePage, err error) {
	d, rows, s := h.d.Dim, x.rows, h.segs[n]
	v := seal.View{D: d, Info: s.Header.Heads[h.head]}
	steps := h.tier.Piece(s.Header, h.head, tiers.PlaneSteps)
	order, err := compress.ParseKeyOrder(steps, d)
	if err != nil {
		return nil, err
	}
	layout := compress.NewKeyLayout(d, order.Lines, 1)
	ordered, bins, keys := make([]float32, len(x.q)), compress.NewKeySteps(d), make([]float32, tiers.LeafTokens*d)
	order.Permute(ordered, x.q)
	parts := make([]float32, rows*d/16)
	var means seal.PageMeans
	if err := v.PageMeans(&means, h.tier.Piece(s.Header, h.head, tiers.PlanePages)); err != nil {
		return nil, err
	}
	meanKeys, mean := make([]float32, compress.MeanKeyPlaces(v.Pages())*d), make([]float32, d)
	means.Keys.Rows(meanKeys)
	first := h.tier.Piece(s.Header, h.head, tiers.PlaneK1)
	for page := range v.Info.Body / tiers.PageTokens {
		p := &devicePage{segment: n, page: page, value: make([]float32, d), spread: float64(means.Values.Spread(page)),
			log: make([][]float64, rows), mass: make([]float64, rows), rule: make([]float64, rows), noise: make([]float64, rows)}
		means.Values.Row(p.value, page)
		compress.Unrotate(p.value, d)
		order.Permute(mean, meanKeys[page*d:(page+1)*d])
		begin, end := v.LeavesOf(page)
		at := v.Steps(v.StepGroup(begin))
		if err := bins.Parse(steps[at.Off:at.Off+at.Len], v.Info.KeyExp); err != nil {
			return nil, err
		}
		kernels.BinSquares(parts, ordered, bins.Step)
		for l := begin; l < end; l++ {
			k := v.LeafKeys(0, l)
			layout.Unpack(keys, bins, [][]byte{first[k.Off : k.Off+k.Len]})
			for i := range tiers.LeafTokens {
				key := keys[i*d : (i+1)*d]
				copy(key[layout.Known():], mean[layout.Known():])
				for r := range rows {
					p.log[r] = append(p.log[r], float64(attention.Dot(ordered[r*d:(r+1)*d], key)))
				}
			}
		}
		for r := range rows {
			noise := 0.
			for g, part := range parts[r*d/16 : (r+1)*d/16] {
				level := uint8(0)
				if g < len(layout.Levels()) {
					level = layout.Levels()[g]
				}
				noise += float64(part) * float64(compress.KeyNoise[level])
			}
			raise, scatter := min(noise/2, attention.MassClip), min(1, math.Exp(min(noise, 1))-1)
			top, sum, squares := slices.Max(p.log[r]), 0., 0.
			for i, y := range p.log[r] {
				w := math.Exp(y - top)
				sum, squares = sum+w, squares+w*w
				p.log[r][i] += raise
			}
			p.mass[r] = top + math.Log(sum) + raise
			p.rule[r], p.noise[r] = squares/(sum*sum)*(1+scatter), squares/(sum*sum)*scatter
		}
		out = append(out, p)
	}
	return out, nil
}
