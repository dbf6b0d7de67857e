package server

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"sync"

	kvtierv1 "kvtier/proto/kvtier/v1"
	"kvtier/tiers"
)

// A sparse answer comes with a raw estimate of its error, which summaries give
// and which errs by a factor that depends on the model, the layer and how much
// was read. Audits measure the ratio of true to raw error; calibration keeps the
// newest ratios and states raw times their median, and raw times their 95 %
// conformal quantile (docs/decisions/0007-stated-errors.md). A ratio is of one
// call: raw and true errors are means over its query positions and heads.

const (
	cellKept = 512  // newest ratios of a layer and kind
	poolKept = 1024 // newest ratios of a kind, over layers
	// While a layer has few audits, those of the model's other layers and the
	// prior stand in: as standIn audits at first, as none once it has ownEnough.
	standIn   = 20
	ownEnough = 40
	// rawFloor keeps the ratio of tiny errors finite.
	rawFloor = 2e-4
	// maxModels bounds what clients' fingerprints can make the daemon keep.
	maxModels = 64
)

// kind is what calls are told apart by, beside model and layer: by the share
// that was asked for, or by the target.
type kind int

var (
	shareEdges  = []float32{.075, .15, .3, .5, 1}
	targetEdges = []float32{.02, .05, .1, 1}
)

// The kinds of calls of which a GPU chose what it read come behind the others, by the share, and then those of answers by page.
const (
	deviceKinds = 9
	pageKinds   = deviceKinds + 5
	numKinds    = pageKinds + 5
)

// kindOf returns the kind of a call whose positions may read that share each.
func kindOf(b budget, share float32) kind {
	if b.mode == kvtierv1.AttendMode_ATTEND_MODE_TARGET {
		return kind(len(shareEdges) + edge(targetEdges, b.target))
	}
	return kind(edge(shareEdges, share))
}

// onDevice is the kind of a call of that kind of share, of which a GPU chose what it read: it estimates errors in another way.
func (k kind) onDevice() kind { return k + deviceKinds }

// ofPages is the kind of a call of that kind of share that is answered by page.
func (k kind) ofPages() kind { return k + pageKinds }

// estimate numbers how raw errors of the kind are estimated, from 0 on.
func (k kind) estimate() int {
	if k >= pageKinds {
		return 1 // 0, of pages that err independently, was too small in long contexts
	}
	return 0
}

func edge(edges []float32, x float32) int {
	i, _ := slices.BinarySearch(edges, x)
	return min(i, len(edges)-1)
}

func (k kind) String() string {
	name, edges, i := "share", shareEdges, int(k)
	if i >= pageKinds {
		name, i = "share by page", i-pageKinds
	} else if i >= deviceKinds {
		name, i = "share on a GPU", i-deviceKinds
	} else if i >= len(shareEdges) {
		name, edges, i = "target", targetEdges, i-len(shareEdges)
	}
	lo := float32(0)
	if i > 0 {
		lo = edges[i-1]
	}
	return fmt.Sprintf("%s %v-%v", name, lo, edges[i])
}

// modelKey tells apart what is calibrated apart: what is stored differs by
// profile, and so does what audits compare with.
type modelKey struct {
	fingerprint string
	profile     tiers.Profile
}

// ring keeps the newest values.
type ring[T any] struct {
	values []T
	next   int
	total  uint64 // values ever added
}

func (r *ring[T]) add(x T, keep int) {
	r.total++
	if len(r.values) < keep {
		r.values = append(r.values, x)
		return
	}
	r.values[r.next] = x
	r.next = (r.next + 1) % keep
}

// newest returns the newest n values, or all, from the oldest to the newest.
func (r *ring[T]) newest(n int) []T {
	n = min(n, len(r.values))
	out := make([]T, n)
	for i := range out {
		out[i] = r.values[(r.next+len(r.values)-n+i)%len(r.values)]
	}
	return out
}

// audited is one audit as calibration keeps it.
type audited struct{ ratio, stated, truth float32 } // stated 0: of before the daemon's start

// factors turn a raw error into stated ones.
type factors struct{ median, p95 float32 }

// cell is what is known of one layer under one kind of budget.
type cell struct {
	ring[audited]
	now    factors
	seen   uint64 // own audits when now was computed
	pooled uint64 // the pool's then
}

// modelErrors are the errors of one model's calls.
type modelErrors struct {
	cells map[[2]int]*cell // by layer and kind
	pools [numKinds]ring[float32]
	heads map[[2]int]*headBias // by layer and KV head
	used  uint64
}

// headBias is the mean log of true over raw error of one KV head, newest first in weight.
type headBias struct {
	log float64
	n   int
}

// calibration knows all models. Its lock is never held across I/O.
type calibration struct {
	mu struct {
		sync.Mutex
		models map[modelKey]*modelErrors
		clock  uint64
	}
}

func newCalibration() *calibration {
	c := &calibration{}
	c.mu.models = map[modelKey]*modelErrors{}
	return c
}

// modelLocked finds a model, and makes room for a new one by forgetting the
// one that has gone unused for longest.
func (c *calibration) modelLocked(key modelKey) *modelErrors {
	m := c.mu.models[key]
	if m == nil {
		if len(c.mu.models) >= maxModels {
			oldest, at := key, uint64(math.MaxUint64)
			for k, m := range c.mu.models {
				if m.used < at {
					oldest, at = k, m.used
				}
			}
			delete(c.mu.models, oldest)
		}
		m = &modelErrors{cells: map[[2]int]*cell{}, heads: map[[2]int]*headBias{}}
		c.mu.models[key] = m
	}
	c.mu.clock++
	m.used = c.mu.clock
	return m
}

// statement is what a call says of its error.
type statement struct {
	estimate, p95 float32
	audits        int // of the layer and kind
}

// state turns a call's raw error into what is stated.
func (c *calibration) state(key modelKey, layer int, k kind, raw float32) statement {
	f, n := c.factors(key, layer, k)
	raw = floored(raw)
	return statement{min(1, raw*f.median), min(1, raw*f.p95), n}
}

// factors returns the factors in force and how many audits of the layer's own are behind them.
func (c *calibration) factors(key modelKey, layer int, k kind) (factors, int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	m := c.modelLocked(key)
	at := [2]int{layer, int(k)}
	return m.factorsOf(at), len(m.cell(at).values)
}

// cell returns what is known of a layer under a kind of budget.
func (m *modelErrors) cell(at [2]int) *cell {
	x := m.cells[at]
	if x == nil {
		x = &cell{}
		m.cells[at] = x
	}
	return x
}

// factorsOf computes the factors of a cell anew if audits came in.
func (m *modelErrors) factorsOf(at [2]int) factors {
	x, pool := m.cell(at), &m.pools[at[1]]
	// A layer with few audits follows the pool, though not each audit of it.
	stale := len(x.values) < ownEnough && pool.total > x.pooled+x.pooled/16
	if x.now == (factors{}) || x.seen != x.total || stale {
		x.now, x.seen, x.pooled = fit(x.values, pool.values, kind(at[1])), x.total, pool.total
	}
	return x.now
}

func floored(raw float32) float32 { return max(raw, rawFloor) }

// add takes an audit in.
func (c *calibration) add(key modelKey, layer int, k kind, raw, stated, truth float32) {
	c.mu.Lock()
	defer c.mu.Unlock()
	m := c.modelLocked(key)
	r := truth / floored(raw)
	m.cell([2]int{layer, int(k)}).add(audited{r, stated, truth}, cellKept)
	m.pools[k].add(r, poolKept)
}

// addHead takes in what an audit found of one KV head.
func (c *calibration) addHead(key modelKey, layer, head int, raw, truth float32) {
	if truth <= 0 {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	m := c.modelLocked(key)
	at := [2]int{layer, head}
	b := m.heads[at]
	if b == nil {
		b = &headBias{}
		m.heads[at] = b
	}
	b.n++
	b.log += (math.Log(float64(truth/floored(raw))) - b.log) / float64(min(b.n, 64))
}

// headBias returns the log by which a KV head's raw error is too low, shrunk
// towards 0 while there are few audits.
func (c *calibration) headBias(key modelKey, layer, head int) float64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	b := c.modelLocked(key).heads[[2]int{layer, head}]
	if b == nil {
		return 0
	}
	return b.log * float64(b.n) / float64(b.n+10)
}

// weighted is a ratio that counts so much.
type weighted struct{ ratio, weight float64 }

// fit computes the factors of a layer from its own ratios, those of all layers, and the prior.
func fit(own []audited, pool []float32, k kind) factors {
	all := make([]weighted, 0, len(own)+len(pool)+len(prior[k]))
	for _, a := range own {
		all = append(all, weighted{float64(a.ratio), 1})
	}
	if foreign := standIn * (1 - float64(len(own))/ownEnough); foreign > 0 {
		// The pool displaces the prior as it fills.
		pooled := foreign * min(1, float64(len(pool))/ownEnough)
		for _, r := range pool {
			all = append(all, weighted{float64(r), pooled / float64(len(pool))})
		}
		for _, r := range prior[k] {
			all = append(all, weighted{r, (foreign - pooled) / float64(len(prior[k]))})
		}
	}
	slices.SortFunc(all, func(a, b weighted) int { return cmp.Compare(a.ratio, b.ratio) })
	return factors{float32(quantile(all, .5)), float32(quantile(all, .95))}
}

// quantile is the conformal one: the call that comes next is one more of the
// sample, of unknown rank, so that of n equal weights the (n+1)p-th value covers
// a share of p (V. Vovk et al., Algorithmic Learning in a Random World, 2005).
// Between two ranks it is interpolated: the next rank would cover too much, by up
// to 1/(n+1). Where the sample is too small, its largest value stands in.
func quantile(sorted []weighted, p float64) float64 {
	total := 1.
	for _, x := range sorted {
		total += x.weight
	}
	sum := 0.
	for i, x := range sorted {
		if sum += x.weight; sum < p*total-1e-9 {
			continue
		}
		if i == 0 {
			return x.ratio
		}
		below := sorted[i-1].ratio
		return x.ratio - (x.ratio-below)*min(1, (sum-p*total)/x.weight)
	}
	return sorted[len(sorted)-1].ratio
}

// layers returns how well stated errors held, by layer and kind.
func (c *calibration) layers() []*kvtierv1.LayerCalibration {
	var out []*kvtierv1.LayerCalibration
	c.mu.Lock()
	for key, m := range c.mu.models {
		for at, x := range m.cells {
			if len(x.values) == 0 {
				continue
			}
			f := m.factorsOf(at)
			l := &kvtierv1.LayerCalibration{Fingerprint: []byte(key.fingerprint), Profile: kvtierv1.Profile(key.profile), Layer: uint32(at[0]),
				Budget: kind(at[1]).String(), Audits: uint32(len(x.values)), FactorMedian: f.median, FactorP95: f.p95}
			l.Coverage, l.StatedOverTrue = held(x.values)
			out = append(out, l)
		}
	}
	c.mu.Unlock()
	slices.SortFunc(out, func(a, b *kvtierv1.LayerCalibration) int {
		return cmp.Or(slices.Compare(a.Fingerprint, b.Fingerprint), cmp.Compare(a.Profile, b.Profile),
			cmp.Compare(a.Budget, b.Budget), cmp.Compare(a.Layer, b.Layer))
	})
	return out
}

// held returns the share of audits whose true error was at most the stated
// 95th percentile, and the median of stated over true.
func held(audits []audited) (coverage, statedOverTrue float32) {
	var over []float32
	n := 0
	for _, a := range audits {
		if a.stated == 0 {
			continue // of before the daemon's start
		}
		if a.truth <= a.stated {
			n++
		}
		over = append(over, a.stated/max(a.truth, 1e-9))
	}
	if len(over) == 0 {
		return 0, 0
	}
	slices.Sort(over)
	return float32(n) / float32(len(over)), over[len(over)/2]
}
