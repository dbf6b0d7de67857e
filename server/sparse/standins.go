package sparse

import (
	"kvtier/attention"
	"kvtier/attention/kernels"
	"kvtier/tiers"
)

// Tokens whose values are not read stand by the mean value of their page. That has to be read, too, and in a small
// budget all of them weigh much: so only those are read that are worth it, like everything else. At first those of the
// heaviest pages, to know about where the output lies; then, when keys were looked at, others. Pages whose mean value is not read
// stand by that of the others (docs/decisions/0030-small-budgets.md).

const (
	// heaviest is the part of the pages whose mean values are read before any key is.
	heaviest = .2
	// unlike is how far mean values lie from what else stands for them, squared, in units of the spread of their pages' values.
	unlike = .25
)

// heaviestMeans reads the mean values of the pages that weigh most for any row, each row's heaviest one among them.
func (u *run) heaviestMeans() error {
	u.typical = u.table()
	if !u.sparing {
		return nil // all are read
	}
	best := u.floats(u.pages)
	for r := range u.rows {
		mass, weights := u.ofRow(u.mass, r)[:u.pages], u.ofRow(u.typical, r)[:u.pages]
		top := kernels.Largest(mass, -inf)
		kernels.Weights(weights, mass, top)
		factor := exp(top - u.total[r])
		for p, w := range weights {
			if best[p] = max(best[p], w*factor); mass[p] == top {
				best[p] = inf
			}
		}
	}
	return u.readMeans(attention.Top(best, max(u.rows, int(heaviest*float32(u.pages)))))
}

// readMeans reads the mean values of pages, which are in order and not known.
func (u *run) readMeans(pages []int) error {
	seg := 0
	for _, p := range pages {
		for p >= u.segs[seg].endPage {
			seg++
		}
		u.known[p] = true
		u.want(seg, u.segs[seg].view.MeanValue(int(u.pageOf[p])))
	}
	return u.each(tiers.PlanePages, func(seg int, got got) error {
		for ; len(pages) > 0 && pages[0] < u.segs[seg].endPage; pages = pages[1:] {
			u.values.Put(pages[0], got.next(u.d))
		}
		return nil
	})
}

// offerMeans adds the mean values that are not known to what can be bought, and returns their worths, [pages], 0 of the others.
func (u *run) offerMeans() []float32 {
	if !u.sparing {
		return nil
	}
	worth := u.floats(u.pages)
	for r := range u.rows {
		shares := u.ofRow(u.typical, r)
		u.estimatedShares(shares, r)
		for i := range u.leaves {
			x := &u.leaves[i]
			shares[x.page] += u.sumsOf(x)[2*r] * u.unit[r]
		}
		for p := range worth {
			worth[p] += shares[p] * shares[p] * u.scatter[p*u.rows+r]
		}
	}
	bytes := float32(lines(u.d))
	for p := range worth {
		if worth[p] *= unlike / bytes; u.known[p] {
			worth[p] = 0
		}
		u.hist.add(worth[p], bytes)
	}
	return worth
}

// atLeast returns the indices of the worths that reach least.
func atLeast(worths []float32, least float32) (list []int) {
	for i, w := range worths {
		if w > 0 && w >= least {
			list = append(list, i)
		}
	}
	return list
}

// addMeans adds to outs the pages' mean values by weights, which it changes: those of pages of unknown ones go to the others,
// by their shares of the softmax.
func (u *run) addMeans(outs []attention.Partial, weights []float32) {
	for r := range outs {
		w, shares := u.ofRow(weights, r), u.ofRow(u.typical, r)
		var known, unknown float32
		for p, is := range u.known {
			if is {
				known += shares[p]
			} else {
				unknown += w[p]
			}
		}
		if unknown == 0 || known == 0 {
			continue
		}
		for p, is := range u.known {
			if is {
				w[p] += shares[p] * (unknown / known)
			}
		}
	}
	u.values.AddTo(attention.AppendSums(nil, outs), weights, u.slots)
}
