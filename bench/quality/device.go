package quality

import (
	"cmp"
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

// What a GPU does that chooses (docs/decisions/0028-a-gpu-chooses.md, 0032-values-of-single-tokens.md), in plain Go: all that it holds is scanned, the keys of a share of
// the pages are read, and the values of those of their tokens that weigh enough; the others stand by their mass and their page's mean value.

// devicePage is a whole page of a body: masses are of what of it is not read.
type devicePage struct {
	segment, page int
	value         []float32 // mean, rotated back
	spread        float64   // of values
	log           [][]float64
	mass          []float64 // [rows], log
	rule, noise   []float64 // [rows], see select.cu
	chosen        bool
	left          int // tokens that are not read
}

// keep makes the page's masses those of tokens whose values are not read: sums of weights, and of their squares, in units of each row's cut.
func (p *devicePage) keep(cut, weights, squares []float64) {
	for r, w := range weights {
		p.mass[r], p.rule[r], p.noise[r] = cut[r]+math.Log(w), 0, 0
		if w > 0 {
			p.rule[r] = squares[r] / (w * w)
		}
	}
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
	cut := choosePages(pages, rows, share)
	at := map[[2]int]*devicePage{}
	for _, p := range pages {
		at[[2]int{p.segment, p.page}] = p
	}
	read, gathered := 0, 0 // keys, values
	weights, squares := make([]float64, rows), make([]float64, rows)
	for n, places := range h.places {
		for i, pos := range places {
			p := at[[2]int{n, i / tiers.PageTokens}]
			if p != nil && !p.chosen {
				for r := range rows {
					logs[r][pos] = p.log[r][i%tiers.PageTokens]
				}
				continue
			}
			read++
			k, v := h.k4[pos*d:(pos+1)*d], h.v4[pos*d:(pos+1)*d]
			takes := p == nil
			for r := range rows {
				logs[r][pos] = float64(attention.Dot(x.q[r*d:(r+1)*d], k))
				takes = takes || logs[r][pos] >= cut[r]
			}
			if takes {
				gathered++
				a.read[pos] = true
			}
			for r := range rows {
				if takes {
					ps[r].Add(float32(logs[r][pos]), v)
				} else {
					w := math.Exp(logs[r][pos] - cut[r])
					weights[r], squares[r] = weights[r]+w, squares[r]+w*w
				}
			}
			if p == nil {
				continue
			}
			if !takes {
				p.left++
			}
			if i%tiers.PageTokens == tiers.PageTokens-1 {
				p.keep(cut, weights, squares)
				clear(weights)
				clear(squares)
			}
		}
	}
	for _, p := range pages {
		for r := range rows {
			if p.left > 0 {
				ps[r].Add(float32(p.mass[r]), p.value)
			}
		}
	}
	a.stated = 0
	for r := range rows {
		lse, norm2 := float64(ps[r].LSE()), 0.
		for _, y := range ps[r].Out {
			norm2 += float64(y) * float64(y) / (ps[r].Sum * ps[r].Sum)
		}
		values, weights := 0., 0.
		for _, p := range pages {
			if p.left > 0 {
				share := math.Exp(p.mass[r] - lse)
				values += share * share * p.rule[r] * p.spread
				weights += share * share * p.noise[r]
			}
		}
		a.stated += min(1, gpuScale*math.Sqrt((values+2*weights*norm2)/norm2)) / float64(rows)
	}
	stored := 0
	for _, places := range h.places {
		stored += len(places)
	}
	a.ram = scan + all*int64(read)/int64(stored) - int64(read-gathered)*int64(d/2)
	a.disk = a.ram
	h.finish(a, x, ps, logs)
	return a, nil
}

// belowLeast is how far below the least page that is chosen a token's value is still read: where it weighs what such a page's tokens do on average.
var belowLeast = math.Log(tiers.PageTokens)

// choosePages chooses a share of the pages by what they weigh in any row, and returns by row how much a token has to weigh for its value to be read, as a logarithm.
func choosePages(pages []*devicePage, rows int, share float64) (cut []float64) {
	rank, cut := make([]float64, len(pages)), make([]float64, rows)
	for r := range rows {
		top, sum := math.Inf(-1), 0.
		for _, p := range pages {
			top = max(top, p.mass[r])
		}
		for _, p := range pages {
			sum += math.Exp(p.mass[r] - top)
		}
		cut[r] = top + math.Log(sum)
		for i, p := range pages {
			rank[i] = max(rank[i], math.Exp(p.mass[r]-cut[r]))
		}
	}
	order := make([]int, len(pages))
	for i := range order {
		order[i] = i
	}
	slices.SortStableFunc(order, func(i, j int) int { return cmp.Compare(rank[j], rank[i]) })
	n := int(math.Ceil(share * float64(len(pages))))
	for i, p := range order {
		if pages[p].chosen = i < n; !pages[p].chosen {
			pages[p].left = tiers.PageTokens
		}
	}
	for r := range cut {
		if n < len(pages) {
			cut[r] += math.Log(rank[order[n-1]]) - belowLeast
		} else {
			cut[r] = math.Inf(-1)
		}
	}
	return cut
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
	if err := means.Keys.Rows(meanKeys); err != nil {
		return nil, err
	}
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
