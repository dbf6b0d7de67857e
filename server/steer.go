package server

import (
	"context"
	"math"
	"sync"
	"time"

	kvtierv1 "kvtier/proto/kvtier/v1"
)

// A head's raw error falls with the share that is read about as c/share^1.4, on
// both measured models (docs/decisions/0007-stated-errors.md). c is the head's
// difficulty: it says where a target's first answer begins, which heads are
// asked again, and how a budget is divided among layers and heads.

const (
	// memory is how many queries a difficulty remembers.
	memory = 16
	// falls is the power of the share with which errors fall.
	falls = 1.4
	// startDifficulty is that of a head that was not asked yet.
	startDifficulty = .004
	// A first answer aims below the goal by so much that most queries, which
	// differ, need no second one; the second knows its query.
	firstAim, nextAim = .7, .9
	// leastShare is where summaries and outliers, which every query reads, leave
	// something for the choice; mostShare is where reading in part no longer pays.
	leastShare, mostShare = .08, .6
	// widenings bounds how often a head is asked again before it reads everything.
	widenings = 3
)

// steering is what a sequence's queries have shown of its heads. Its lock is
// never held across I/O.
type steering struct {
	mu struct {
		sync.Mutex
		heads    map[[2]int]*difficulty // by layer and KV head
		division *division              // of the step that is asked now; nil: every head gets the same
	}
}

// difficulty holds exponential means: of log(raw error x share^falls), and of the
// share of attention that sealed tokens get.
type difficulty struct {
	log, mass float64
	n, calls  int // behind log, which answers from everything say nothing of, and behind mass
}

// learn takes in how a call went.
func (s *steering) learn(c *call) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.mu.heads == nil {
		s.mu.heads = map[[2]int]*difficulty{}
	}
	for h := range c.heads {
		res := &c.heads[h]
		if res.acc.Read == 0 || res.acc.Late > 0 {
			continue // nothing sealed, or what it tells is of the disk, not of the head
		}
		at := [2]int{c.layer, h}
		d := s.mu.heads[at]
		if d == nil {
			d = &difficulty{}
			s.mu.heads[at] = d
		}
		d.calls++
		d.mass += (res.sealedMass() - d.mass) / float64(min(d.calls, memory))
		if res.acc.Estimated == 0 || c.way == byPage {
			continue // what by page is hard to answer is another thing
		}
		d.n++
		d.log += (math.Log(difficultyOf(res)) - d.log) / float64(min(d.n, memory))
	}
}

// difficultyOf returns what an answer shows of its head.
func difficultyOf(res *headResult) float64 {
	return float64(floored(res.acc.Error)) * math.Pow(float64(res.share), falls)
}

// sealedMass returns the share of a KV head's attention that sealed tokens get; half if nothing is known.
func (s *steering) sealedMass(layer, head int) float64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	if d := s.mu.heads[[2]int{layer, head}]; d != nil {
		return d.mass
	}
	return .5
}

// difficulty returns a KV head's.
func (s *steering) difficulty(layer, head int) float64 {
	if d, ok := s.known(layer, head); ok {
		return d
	}
	return startDifficulty
}

// known returns a KV head's difficulty, if it was asked before.
func (s *steering) known(layer, head int) (float64, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	d := s.mu.heads[[2]int{layer, head}]
	if d == nil || d.n == 0 {
		return 0, false
	}
	return math.Exp(d.log), true
}

// from takes over what a fork's origin has learned.
func (s *steering) from(o *steering) {
	o.mu.Lock()
	defer o.mu.Unlock()
	s.mu.heads = make(map[[2]int]*difficulty, len(o.mu.heads))
	for at, d := range o.mu.heads {
		copied := *d
		s.mu.heads[at] = &copied
	}
}

// firstShares returns what each KV head may read at first.
func (c *call) firstShares() []float32 {
	out := c.divided(c.share())
	if c.budget.mode != kvtierv1.AttendMode_ATTEND_MODE_TARGET || c.start+uint64(c.n) <= uint64(c.seq.srv.opt.ReadAllTokens) {
		return out
	}
	difficulties := make([]float64, len(out))
	for h := range difficulties {
		difficulties[h] = c.seq.steering.difficulty(c.layer, h)
	}
	c.codec = c.storedErrors(func(head int) float64 { return c.seq.steering.sealedMass(c.layer, head) })
	f, _ := c.seq.srv.calibration.factors(c.seq.key(), c.layer, c.kind())
	for h, s := range sharesFor(difficulties, firstAim*c.room()/float64(f.p95)) {
		out[h] = min(out[h], max(leastShare, s))
	}
	return out
}

// sharesFor returns the shares, least in sum, at which heads of these
// difficulties have that raw error in the mean: in proportion to the
// difficulty's power of 1/(1+falls).
func sharesFor(difficulties []float64, goal float64) []float32 {
	out := make([]float32, len(difficulties))
	mean := 0.
	for _, d := range difficulties {
		mean += math.Pow(d, 1/(1+falls)) / float64(len(out))
	}
	factor := math.Pow(mean/max(goal, 1e-9), 1/falls)
	for h, d := range difficulties {
		s := factor * math.Pow(d, 1/(1+falls))
		if s > mostShare {
			s = 1
		}
		out[h] = float32(s)
	}
	return out
}

// room is what the target leaves beside the codec's error.
func (c *call) room() float64 {
	return math.Sqrt(max(0, float64(c.budget.target*c.budget.target-c.codec*c.codec)))
}

// storedErrors is the error of the answer that comes from stored rows: what
// storedError says of the layer's heads, as far as attention goes to sealed
// tokens, root mean square.
func (c *call) storedErrors(mass func(head int) float64) float32 {
	segs := c.sealedSegments()
	sum2 := 0.
	for h := range c.seq.spec.kvHeads {
		e := float64(storedError(segs, h)) * mass(h)
		sum2 += e * e
	}
	return float32(math.Sqrt(sum2 / float64(c.seq.spec.kvHeads)))
}

// sealedMass is the share of attention that goes to sealed tokens, mean over rows.
func (res *headResult) sealedMass() (mean float64) {
	for i := range res.zone {
		if all := float64(res.ps[i].LSE()); !math.IsInf(all, -1) {
			mean += 1 - math.Exp(float64(res.zone[i].LSE())-all)
		}
	}
	return mean / float64(max(1, len(res.zone)))
}

// widen asks heads again, each with a greater share, until 95 % of such calls
// err less than the target, as far as the limits allow; none if again is not
// set: then it only says whether the target is met.
func (c *call) widen(ctx context.Context, again bool) error {
	for round := 1; ; round++ {
		c.sum()
		if math.Hypot(float64(c.stated.p95), float64(c.codec)) <= float64(c.budget.target) {
			return nil
		}
		var more map[int]float32
		if again {
			more = c.wider(round)
		}
		if len(more) == 0 || !c.timeFor(ctx, more) {
			c.missed = true
			return nil
		}
		for h, s := range more {
			c.heads[h].share = s
		}
		if err := c.ask(ctx, func(h int) bool { return more[h] > 0 }); err != nil {
			return err
		}
	}
}

// wider returns the heads that are to be asked again, with their new shares.
func (c *call) wider(round int) map[int]float32 {
	limit := c.share()
	difficulties := make([]float64, len(c.heads))
	for h := range c.heads {
		if c.heads[h].acc.Estimated > 0 {
			difficulties[h] = difficultyOf(&c.heads[h])
		}
	}
	room := c.room()
	goal := room * float64(c.acc.Error) / max(float64(c.stated.p95), 1e-9)
	want := sharesFor(difficulties, nextAim*goal)
	again := map[int]float32{}
	for h := range c.heads {
		if c.heads[h].acc.Estimated == 0 {
			continue
		}
		s := want[h]
		if round >= widenings || room == 0 {
			s = 1
		}
		if s = min(limit, s); s > 1.05*c.heads[h].share {
			again[h] = s
		}
	}
	if len(again) > 0 {
		return again
	}
	// The model says that this should do, but it does not.
	for h := range c.heads {
		if s := min(limit, 1.5*c.heads[h].share); c.heads[h].acc.Estimated > 0 && s > 1.05*c.heads[h].share {
			again[h] = s
		}
	}
	return again
}

// timeFor says whether the call's deadline leaves time to ask heads again,
// judged by how long they took before.
func (c *call) timeFor(ctx context.Context, again map[int]float32) bool {
	deadline, ok := ctx.Deadline()
	if !ok {
		return true
	}
	var ns float64
	for h, s := range again {
		a := &c.heads[h].acc
		ns += float64(a.NsScore+a.NsScan+a.NsFetch) * float64(s/c.heads[h].share)
	}
	return time.Until(deadline) > 2*time.Duration(ns)
}
