package planted

import (
	"fmt"
	"math"
	"slices"
	"strings"

	"kvtier/attention"
	"kvtier/bench/stats"
)

// Report is what one context showed.
type Report struct {
	Tokens  int    `json:"tokens"`
	Sealed  int    `json:"sealed_tokens"`
	Shape   Shape  `json:"shape"`
	Samples int    `json:"samples"`
	Seed    uint64 `json:"seed"`
	// Context describes the synthetic context as it came out.
	Context Context `json:"context"`
	Rows    []Row   `json:"rows"`
}

// Context is what the generator made, measured.
type Context struct {
	// Weight is what share of the softmax fell on what was looked for, per query:
	// least, mean and largest; Wanted is the mean of what was asked for.
	WeightLeast float64 `json:"weight_least"`
	WeightMean  float64 `json:"weight_mean"`
	WeightMost  float64 `json:"weight_most"`
	Wanted      float64 `json:"weight_wanted"`
	// QueryNorm is the mean norm of queries that look, over that of ordinary ones.
	QueryNorm float64 `json:"query_norm_ratio"`
	// Top1 and Top10 are the shares of the sealed tokens' weight, of ordinary
	// queries, that fall on the strongest 1 % and 10 % of tokens.
	Top1  float64 `json:"top_1_percent"`
	Top10 float64 `json:"top_10_percent"`
	// KeyRank is the participation ratio of the keys' covariance: in how many
	// directions keys vary, of head_dim.
	KeyRank float64 `json:"key_rank"`
}

// Row is what a method showed on a task.
type Row struct {
	Task   Task    `json:"task"`
	Method string  `json:"method"`
	Budget float64 `json:"budget"` // share of the 4-bit bytes; 1: everything
	Bytes  float64 `json:"bytes"`  // transferred of the sealed tokens, share of their 4-bit bytes
	// Asked is how many things were asked for, Right how many of them dense
	// attention decodes right. Retention is the mean share of these that the
	// method decodes right, with Wilson's 95 % interval.
	Asked         int        `json:"asked"`
	Right         int        `json:"dense_right"`
	Retention     float64    `json:"retention"`
	RetentionCI   [2]float64 `json:"retention_95"`
	Hops          []float64  `json:"hops,omitempty"`
	PlantedRead   float64    `json:"planted_weight_read"` // share of the weight of what was looked for whose values were read
	Strong        []Strong   `json:"strong"`
	ErrorMean     float64    `json:"error_mean"` // |o' - o| / |o| by row that looks
	ErrorP95      float64    `json:"error_p95"`
	LSEError      float64    `json:"lse_error_mean"` // nats
	LSEErrorP95   float64    `json:"lse_error_p95"`
	Stated        float64    `json:"stated_error_mean,omitempty"`
	True          float64    `json:"true_error_mean,omitempty"` // of the same calls, mean over their rows
	StatedPerTrue float64    `json:"stated_over_true_median,omitempty"`
	Covered       float64    `json:"stated_covers,omitempty"` // share of calls whose stated error is not below the true one
}

// Strong counts sealed tokens with a large weight in a row that looks, and those
// of them whose value was not read.
type Strong struct {
	Above  float64 `json:"above"`
	Tokens int     `json:"tokens"`
	Unread int     `json:"unread"`
}

// add sums up what a method made of all questions, by task, and says it in short.
func (rep *Report) add(m method, questions []*question, outcomes []*outcome) string {
	var short []string
	for _, t := range Tasks {
		var of []*outcome
		for i, qu := range questions {
			if qu.task == t {
				of = append(of, outcomes[i])
			}
		}
		if len(of) > 0 {
			r := summarise(m, t, of)
			rep.Rows = append(rep.Rows, r)
			if r.Right > 0 {
				short = append(short, fmt.Sprintf("%s %.0f%% of %d", t, 100*r.Retention, r.Right))
			}
		}
	}
	return strings.Join(short, ", ")
}

func summarise(m method, t Task, of []*outcome) Row {
	r := Row{Task: t, Method: m.name, Budget: m.budget}
	for _, least := range strongWeights {
		r.Strong = append(r.Strong, Strong{Above: least})
	}
	var errors, lse, stated, actual, ratio []float64
	var right, peaksRead, peaks float64
	if t == Chain { // a chain that dense attention loses says nothing of the hops after
		of = slices.DeleteFunc(of, func(o *outcome) bool { r.Asked++; return !o.trials[0].dense })
		r.Asked -= len(of)
	}
	for _, o := range of {
		r.Bytes += o.bytes / float64(len(of))
		errors, lse = append(errors, o.errors...), append(lse, o.lse...)
		peaksRead, peaks = peaksRead+o.peaks[0], peaks+o.peaks[1]
		for i := range r.Strong {
			r.Strong[i].Tokens += o.strong[i]
			r.Strong[i].Unread += o.unread[i]
		}
		for _, x := range o.trials {
			r.Asked++
			if x.dense {
				r.Right++
				if x.got {
					right++
				}
			}
		}
		if o.stated >= 0 && o.actual > 0 {
			stated, actual = append(stated, o.stated), append(actual, o.actual)
			ratio = append(ratio, o.stated/o.actual)
			if o.stated >= o.actual {
				r.Covered++
			}
		}
	}
	if r.Right > 0 {
		r.Retention = right / float64(r.Right)
		r.RetentionCI[0], r.RetentionCI[1] = stats.Wilson(r.Retention, r.Right)
	}
	if peaks > 0 {
		r.PlantedRead = peaksRead / peaks
	}
	r.Hops = meanHops(of)
	r.ErrorMean, r.ErrorP95 = mean(errors), quantile(errors, .95)
	r.LSEError, r.LSEErrorP95 = mean(lse), quantile(lse, .95)
	if len(stated) > 0 {
		r.Stated, r.True, r.StatedPerTrue = mean(stated), mean(actual), quantile(ratio, .5)
		r.Covered /= float64(len(stated))
	}
	return r
}

// meanHops is the share of chains whose hop i was decoded right, by i.
func meanHops(of []*outcome) []float64 {
	var out []float64
	for _, o := range of {
		for i, x := range o.hops {
			if i == len(out) {
				out = append(out, 0)
			}
			if x {
				out[i] += 1 / float64(len(of))
			}
		}
	}
	return out
}

func mean(x []float64) (s float64) {
	for _, v := range x {
		s += v / float64(len(x))
	}
	return s
}

// quantile returns the smallest value that a share p of x does not exceed; 0 of nothing.
func quantile(x []float64, p float64) float64 {
	if len(x) == 0 {
		return 0
	}
	x = slices.Sorted(slices.Values(x))
	return x[min(len(x)-1, max(0, int(math.Ceil(p*float64(len(x))))-1))]
}

// report begins a report with what the context is like.
func (h *Haystack) report(questions []*question) *Report {
	rep := &Report{Tokens: h.opt.Tokens, Sealed: h.end, Shape: h.opt.Shape, Samples: h.opt.Samples, Seed: h.opt.Seed}
	c := &rep.Context
	d := h.w.d
	var weights, wanted, looking, ordinary []float64
	note := func(t *truth, want float64, q []float32) {
		var sum float64
		for _, p := range t.peaks {
			sum += p
		}
		weights, wanted = append(weights, sum), append(wanted, want)
		looking = append(looking, norm(q))
	}
	for _, qu := range questions {
		for entry, r := range qu.looks {
			if q := qu.q[r*d : (r+1)*d]; qu.task == Ordinary {
				ordinary = append(ordinary, norm(q))
				h.concentration(c, q)
			} else {
				note(qu.truth[r], qu.weight[entry], q)
			}
		}
		direction := qu.starts
		for i := range qu.chain {
			note(qu.chain[i].truth, qu.weight[i], qu.chain[i].query(h, direction))
			direction = h.plan.toContent(h.w, narrow(qu.chain[i].truth.out))
		}
	}
	c.WeightLeast, c.WeightMean, c.WeightMost, c.Wanted = slices.Min(weights), mean(weights), slices.Max(weights), mean(wanted)
	c.QueryNorm = mean(looking) / mean(ordinary)
	c.Top1, c.Top10 = c.Top1/float64(len(ordinary)), c.Top10/float64(len(ordinary))
	c.KeyRank = h.keyRank()
	return rep
}

// concentration adds what share of the weight the strongest tokens have.
func (h *Haystack) concentration(c *Context, q []float32) {
	scores := h.scores(q)[1:h.end]
	total := logSum(scores)
	slices.SortFunc(scores, func(a, b float32) int {
		switch {
		case a > b:
			return -1
		case a < b:
			return 1
		}
		return 0
	})
	c.Top1 += math.Exp(logSum(scores[:len(scores)/100]) - total)
	c.Top10 += math.Exp(logSum(scores[:len(scores)/10]) - total)
}

// keyRank is (sum of eigenvalues)^2 / sum of their squares, of some keys' covariance.
func (h *Haystack) keyRank() float64 {
	const n = 1024
	d, step := h.w.d, h.opt.Tokens/n
	m := make([]float32, d)
	for i := range n {
		for j, x := range h.key(1 + i*step) {
			m[j] += x / n
		}
	}
	// Of the Gram matrix the trace and the squared Frobenius norm are the same.
	x := make([]float32, 0, n*d)
	for i := range n {
		for j, v := range h.key(1 + i*step) {
			x = append(x, v-m[j])
		}
	}
	var trace, squares float64
	for i := range n {
		for j := range i + 1 {
			g := float64(attention.Dot(x[i*d:(i+1)*d], x[j*d:(j+1)*d]))
			if i == j {
				trace += g
				squares += g * g
			} else {
				squares += 2 * g * g
			}
		}
	}
	return trace * trace / squares
}

func norm(x []float32) float64 { return math.Sqrt(float64(attention.Dot(x, x))) }
