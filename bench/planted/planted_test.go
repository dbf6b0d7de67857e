package planted

import (
	"bytes"
	"context"
	"errors"
	"math"
	"slices"
	"strings"
	"sync"
	"testing"

	"kvtier/attention"
	"kvtier/bench/stats"
	"kvtier/compress"
	"kvtier/tiers"
	"kvtier/tiers/seal"
)

func options() Options {
	return Options{Shape: Shape{64, 3}, Tokens: 6144, Samples: 4, WeightLow: .3, WeightHigh: .6, Seed: 7}
}

func quiet(string, ...any) {}

// asked is one context, sealed and with its questions, which all tests share.
var asked = sync.OnceValues(func() (*sealed, []*question) {
	h, err := New(options())
	if err != nil {
		panic(err)
	}
	s, err := h.seal(context.Background(), quiet)
	if err != nil {
		panic(err)
	}
	questions, err := h.ask(context.Background(), quiet)
	if err != nil {
		panic(err)
	}
	return s, questions
})

func TestSeedDecidesAll(t *testing.T) {
	s, questions := asked()
	again, err := New(options())
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(again.kb, s.h.kb) || !bytes.Equal(again.vb, s.h.vb) {
		t.Error("equal options gave other keys or values")
	}
	repeated, err := again.ask(context.Background(), quiet)
	if err != nil {
		t.Fatal(err)
	}
	for i := range questions {
		if !slices.Equal(questions[i].q, repeated[i].q) {
			t.Errorf("question %d, %s: equal options gave other queries", i, questions[i].task)
		}
	}
	o := options()
	o.Seed++
	other, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Equal(other.kb, s.h.kb) {
		t.Error("another seed gave the same keys")
	}
}

func TestEveryQueryReachesItsWeight(t *testing.T) {
	_, questions := asked()
	seen := 0
	check := func(task Task, tr *truth, want float64) {
		seen++
		var sum float64
		for _, p := range tr.peaks {
			sum += p
		}
		if math.Abs(sum-want) > .02 {
			t.Errorf("%s: a weight of %.3f on what was looked for, wanted %.3f", task, sum, want)
		}
		if low, high := slices.Min(tr.peaks), slices.Max(tr.peaks); task == MultiValue && high > 1.1*low {
			t.Errorf("peaks of %.3f to %.3f: they should be equal", low, high)
		}
	}
	for _, qu := range questions {
		if qu.task == Ordinary {
			continue
		}
		for entry, r := range qu.looks {
			check(qu.task, qu.truth[r], qu.weight[entry])
		}
		if qu.task == Chain { // the first hop; later ones depend on what was found
			check(qu.task, qu.chain[0].truth, qu.weight[0])
		}
	}
	if seen < 20 {
		t.Errorf("only %d queries that look", seen)
	}
}

// The bounds are around what SmolLM2-135M showed on Go source, layers 3 to 27:
// rank of keys 13 to 26 of 64; weight on the top 1 % and 10 % of tokens .5 to
// .9 and .9 to 1 (.2 and .6 in layer 0); within leaves .4 of the variance of
// scores; a 4-bit code's noise .07 to .09 of their spread.
func TestContextIsLikeReal(t *testing.T) {
	s, questions := asked()
	c := s.h.report(questions).Context
	between := func(what string, x, low, high float64) {
		if !(x >= low && x <= high) {
			t.Errorf("%s: %.3f, not %.3f to %.3f", what, x, low, high)
		}
	}
	between("rank of keys", c.KeyRank, 13, 32)
	between("weight on the top 1 %", c.Top1, .2, .95)
	between("weight on the top 10 %", c.Top10, .6, 1)
	between("norm of queries that look", c.QueryNorm, .7, 2)
	var leaf, all, noise float64
	for _, qu := range questions {
		for r := 0; qu.task == Ordinary && r < len(qu.truth); r++ {
			l, a, n := s.spreads(t, qu.q[r*s.h.w.d:(r+1)*s.h.w.d], 1)
			leaf, all, noise = leaf+l, all+a, noise+n
		}
	}
	between("share of scores' variance within leaves", leaf/all, .2, .55)
	between("noise of stored keys over the spread of scores", math.Sqrt(noise/all), .015, .07)
}

// spreads returns the variance of a query's scores within leaves of segment i, over all of it, and of the 4-bit codes' error.
func (s *sealed) spreads(t *testing.T, q []float32, i int) (leaf, all, noise float64) {
	v, h, d := s.view(i), s.segments[i].Header, s.h.w.d
	piece := func(p tiers.Plane) []byte { return s.tier.Piece(h, 0, p) }
	k := make([]float32, v.Stored()*d)
	if err := v.Keys(k, seal.WithoutLow(piece)); err != nil {
		t.Fatal(err)
	}
	var scores, errs []float64
	for place, position := range s.position[i] {
		score := float64(attention.Dot(q, s.h.key(position)))
		scores = append(scores, score)
		errs = append(errs, float64(attention.Dot(q, k[place*d:(place+1)*d]))-score)
	}
	for l := range v.Leaves() {
		lo := l * tiers.LeafTokens
		leaf += variance(scores[lo:lo+v.LeafTokens(l)]) / float64(v.Leaves())
	}
	return leaf, variance(scores), variance(errs)
}

func variance(x []float64) (s float64) {
	m := mean(x)
	for _, v := range x {
		s += (v - m) * (v - m) / float64(len(x))
	}
	return s
}

func TestRowsAreWhatIsSealed(t *testing.T) {
	h := func() *Haystack { s, _ := asked(); return s.h }()
	back := make([]float32, len(h.k))
	compress.ToFloat32(back, h.kb, compress.BF16)
	if !slices.Equal(back, h.k) {
		t.Error("truth is not over the keys that are sealed")
	}
	compress.ToFloat32(back, h.vb, compress.BF16)
	if !slices.Equal(back, h.v) {
		t.Error("truth is not over the values that are sealed")
	}
	if n, most := norm(h.value(0)), norm(h.value(1)); n > .1*most {
		t.Errorf("the sink's value has norm %.2f beside %.2f", n, most)
	}
}

func TestExactOutputsDecode(t *testing.T) {
	s, questions := asked()
	h := s.h
	for _, qu := range questions {
		for entry, r := range qu.looks {
			switch qu.task {
			case Single, MultiKey, MultiQuery:
				if !h.decode(qu.sample, entry, narrow(qu.truth[r].out))[0] {
					t.Errorf("%s: the dense output does not decode", qu.task)
				}
			case MultiValue, CWE, FWE:
				if right := h.decode(qu.sample, entry, h.meanOf(qu.peaks[entry])); slices.Contains(right, false) {
					t.Errorf("%s: the planted values alone decode to %v", qu.task, right)
				}
			}
			if qu.task != Ordinary && slices.Contains(h.decode(qu.sample, entry, make([]float32, h.w.d)), true) &&
				slices.Contains(h.decode(qu.sample, entry, negated(h.meanOf(qu.peaks[entry]))), true) {
				t.Errorf("%s: the opposite of the answer decodes as right", qu.task)
			}
		}
	}
}

// meanOf is the mean value of some tokens.
func (h *Haystack) meanOf(tokens []int) []float32 {
	out := make([]float32, h.w.d)
	for _, t := range tokens {
		for j, v := range h.value(t) {
			out[j] += v / float32(len(tokens))
		}
	}
	return out
}

func negated(x []float32) []float32 {
	out := make([]float32, len(x))
	for i, v := range x {
		out[i] = -v
	}
	return out
}

func TestChainPointsOn(t *testing.T) {
	s, questions := asked()
	for _, qu := range questions {
		for i := 0; qu.task == Chain && i+1 < hops; i++ {
			want := s.h.match(qu.peaks[i+1][0])
			unit(want)
			got := s.h.plan.toContent(s.h.w, s.h.value(qu.peaks[i][0]))
			if cos := attention.Dot(got, want); cos < .85 {
				t.Errorf("hop %d's value points to the next key with a cosine of %.2f", i, cos)
			}
		}
	}
}

func TestMethods(t *testing.T) {
	ctx := context.Background()
	s, questions := asked()
	qu := questions[slices.IndexFunc(questions, func(q *question) bool { return q.task == Single })]
	everything := s.h.end - tiers.SinkTokens
	for name, choose := range map[string]func([]float32, int) []int{"oracle": s.oracle, "quest": s.quest, "window": s.window} {
		a, err := s.selected(choose, everything, 0)(ctx, qu.q)
		if err != nil {
			t.Fatal(err)
		}
		for r, tr := range qu.truth {
			if e := stats.RelativeError(a.out[r], tr.out); e > 1e-3 {
				t.Errorf("%s of all tokens: an error of %g", name, e)
			}
			if e := math.Abs(float64(a.lse[r]) - tr.lse); e > 1e-3 {
				t.Errorf("%s of all tokens: LSE is off by %g", name, e)
			}
		}
	}
	const share = .3
	for _, m := range s.methods([]float64{share}, true) {
		a, err := m.answer(ctx, qu.q)
		if err != nil {
			t.Fatal(err)
		}
		if used := float64(a.bytes) / float64(s.full); !m.whole && (used > share*1.01 || used < share*.7) {
			t.Errorf("%s took %.3f of the bytes, its budget being %.2f", m.name, used, share)
		}
	}
	lo, hi := s.bounds()
	if want := s.h.key(tiers.SinkTokens + questBlock + 3); !within(want, lo[s.h.w.d:], hi[s.h.w.d:]) {
		t.Error("a key lies outside its block's box")
	}
}

func within(x, lo, hi []float32) bool {
	for j, v := range x {
		if v < lo[j] || v > hi[j] {
			return false
		}
	}
	return true
}

func TestRun(t *testing.T) {
	o := options()
	o.Tokens, o.Samples = 4096, 1
	rep, err := Run(context.Background(), o, []float64{.3}, true, nil)
	if err != nil {
		t.Fatal(err)
	}
	seen := make(map[string]bool)
	for _, r := range rep.Rows {
		seen[string(r.Task)+" "+r.Method] = true
		switch {
		case r.Right > r.Asked, r.Retention < 0, r.Retention > 1, r.RetentionCI[0] > r.Retention, r.RetentionCI[1] < r.Retention:
			t.Errorf("%s, %s: retention %v %v of %d of %d", r.Task, r.Method, r.Retention, r.RetentionCI, r.Right, r.Asked)
		case r.Method == "k4v4" && (r.PlantedRead != 1 && r.Task != Ordinary || r.Strong[0].Unread != 0):
			t.Errorf("%s: everything was read, yet %.3f of the planted weight was, and %d strong tokens were not", r.Task, r.PlantedRead, r.Strong[0].Unread)
		case r.Method == "kvtier" && r.Task == Single && (r.True == 0 || r.Stated == 0):
			t.Errorf("%s: stated %g, true %g", r.Task, r.Stated, r.True)
		}
	}
	for _, task := range Tasks {
		for _, m := range []string{"k4v4", "kvtier", "oracle", "quest", "quest-free", "window"} {
			if !seen[string(task)+" "+m] {
				t.Errorf("no row of %s, %s", task, m)
			}
		}
	}
	cancelled, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := Run(cancelled, o, []float64{.3}, true, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("after a cancellation: %v", err)
	}
}

func TestBadOptions(t *testing.T) {
	for want, change := range map[string]func(*Options){
		"head dimension": func(o *Options) { o.Shape.HeadDim = 40 },
		"query heads":    func(o *Options) { o.Shape.Group = 0 },
		"tokens":         func(o *Options) { o.Tokens = 1000 },
		"samples":        func(o *Options) { o.Samples = 1000 },
		"weights":        func(o *Options) { o.WeightLow = .9; o.WeightHigh = .1 },
	} {
		o := options()
		change(&o)
		if _, err := New(o); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", want, err)
		}
	}
	if _, err := Run(context.Background(), options(), []float64{2}, true, nil); err == nil {
		t.Error("a budget of 2 was taken")
	}
}
