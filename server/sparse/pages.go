package sparse

import (
	"math"

	"kvtier/attention"
	"kvtier/attention/kernels"
	"kvtier/compress"
)

// scorePages scores all pages, and estimates the normaliser and the output from them
// and the exact zone.
func (u *run) scorePages() error {
	if err := u.survey(); err != nil {
		return err
	}
	if u.follows {
		if err := u.readMap(); err != nil {
			return err
		}
	}
	u.mass, u.ruled, u.noise, u.rank = u.table(), u.table(), u.table(), u.table()
	u.acc.Pages, u.acc.PagesTotal = int64(u.all), int64(u.all)
	u.scoreMeans()
	for r := range u.rows {
		for i := u.pages; i < u.slots; i++ {
			u.mass[r*u.slots+i] = -inf // no drains yet
		}
		u.total[r] = logAdd(logAdd(u.q.Partials[r].LSE(), u.rest.mass[r]), u.logSum(u.ofRow(u.mass, r)))
		u.base[r] = u.total[r] + headroom
	}
	if err := u.heaviestMeans(); err != nil {
		return err
	}
	u.judge()
	return nil
}

// scoreMeans estimates what pages weigh, and how well that is known.
func (u *run) scoreMeans() {
	for r := range u.rows {
		at := r * u.slots
		for i := range u.segs {
			s := &u.segs[i]
			for p, page := range u.pageOf[s.firstPage:s.endPage] {
				u.mass[at+s.firstPage+p] = u.scores[r*u.all+s.firstOfAll+int(page)]
			}
		}
		mass, rank, ruled, noise := u.mass[at:][:u.pages], u.rank[at:][:u.pages], u.ruled[at:][:u.pages], u.noise[at:][:u.pages]
		for i, spread := range u.spreads {
			n, score := int(u.tokens[i]), mass[i]
			spread *= u.norm2[r]
			mass[i] = attention.Mass(n, score, spread)
			rank[i] = attention.Presence(n, score, spread)
			noise[i] = min(spread, mostRaise) - mostRaise
		}
		kernels.Weights(noise, noise, 0)
		for i, e := range noise {
			raised, n := e*raiseUnit, float32(u.tokens[i])
			ruled[i], noise[i] = min(1, raised/n), massNoise(raised, n)
		}
	}
}

// leastNoise is the relative variance of a page's mass that the scatter of its keys does not account for.
const leastNoise = .1

// massNoise is the relative variance of the mass of n tokens of which the mean of the square of a weight is so many times the
// square of the mean.
func massNoise(raised, n float32) float32 { return leastNoise + min(1, (raised-1)/n) }

// mostRaise bounds how far the spread of keys is believed to rule which of a page's tokens weigh.
const mostRaise = 4

var raiseUnit = exp(mostRaise)

// judge estimates the output from the exact zone and page means, and by it how
// much each page's values matter.
func (u *run) judge() {
	outs := attention.NewPartials(u.rows, u.d)
	value := u.floats(u.d)
	for r := range u.rows {
		u.q.Partials[r].Output(value)
		compress.Rotate(value, u.d)
		if lse := u.q.Partials[r].LSE(); lse > -inf {
			outs[r].Add(lse, value)
		}
	}
	weights := u.table()
	copy(weights, u.mass)
	attention.Weigh(outs, weights, u.slots, u.slots)
	u.addMeans(outs, weights)
	u.rest.addTo(outs)
	out := u.floats(u.rows * u.d)
	for r := range u.rows {
		outs[r].Output(out[r*u.d : (r+1)*u.d])
	}
	distance2 := u.distances(out)
	for r := range u.rows {
		inverse := 1 / max(attention.Norm2(out[r*u.d:(r+1)*u.d]), 1e-30)
		for p := range u.pages {
			at := p*u.rows + r
			u.scatter[at] = u.values.Spread(p) * inverse
			u.far[at] = u.scatter[at] + distance2[r*u.slots+p]*inverse
		}
	}
}

// distances returns the squares of the distances of pages' mean values from outputs out [rows][d].
func (u *run) distances(out []float32) []float32 {
	table := u.table()
	u.values.Norms2(u.norms)
	u.values.Scores(table, u.slots, out)
	for r := range u.rows {
		norm2, row := attention.Norm2(out[r*u.d:(r+1)*u.d]), u.ofRow(table, r)[:u.pages]
		for i, product := range row {
			row[i] = max(0, u.norms[i]-2*product+norm2)
			if !u.known[i] {
				row[i] = unlike * u.values.Spread(i)
			}
		}
	}
	return table
}

// rankPages ranks each page by the best place that it has in the order of
// presence of any head, or of all of them, so that no head takes the places of
// another: presence is overestimated most for heads with large queries. Outliers
// come first, unless there are too many: drains are among them.
func (u *run) rankPages() []float32 {
	n := u.pages
	rank, all, weights := u.floats(n), u.floats(n), u.floats(n)
	place := func(presence []float32) {
		keys := u.sortKeys(n)
		for i, x := range presence {
			keys[i] = descending(x)<<32 | uint64(i)
		}
		for at, key := range u.sortByUpper(keys) {
			i := uint32(key)
			rank[i] = max(rank[i], float32(n-at))
		}
	}
	for r := range u.rows {
		presence := u.ofRow(u.rank, r)[:n]
		place(presence)
		top := kernels.Largest(presence, -inf)
		kernels.Weights(weights, presence, top)
		attention.Axpy(all, exp(min(top-u.total[r], mostPresence)), weights)
	}
	place(all)
	if u.pages < u.all {
		return rank // outliers of so many segments would take all places
	}
	for i := range u.segs {
		s := &u.segs[i]
		for at := s.firstPage; at < s.endPage; at++ {
			if s.view.Outliers(int(u.pageOf[at])) {
				rank[at] = inf
			}
		}
	}
	return rank
}

// mostPresence keeps what is overestimated by far finite.
const mostPresence = 80

// logSum returns the log of the sum of exp(x).
func (u *run) logSum(x []float32) float32 {
	top := kernels.Largest(x, -inf)
	return top + log(kernels.Weights(u.weights[:len(x)], x, top))
}

// descending returns 32 bits that are the smaller, the larger a number is.
func descending(x float32) uint64 {
	b := math.Float32bits(x)
	if b>>31 == 0 {
		return uint64(^b &^ (1 << 31))
	}
	return uint64(b)
}
