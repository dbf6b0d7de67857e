package planted

import (
	"context"
	"fmt"
	"math"
	"os"
	"testing"

	"kvtier/attention"
	"kvtier/tiers"
)

func TestSmoke(t *testing.T) {
	if os.Getenv("SMOKE") == "" {
		t.Skip()
	}
	n, d, g := 32768, 128, 4
	fmt.Sscan(os.Getenv("SMOKE"), &n, &d, &g)
	rep, err := Run(context.Background(), Options{Shape: Shape{d, g}, Tokens: n, Samples: 8, WeightLow: .3, WeightHigh: .6, Seed: 1}, []float64{.1, .2}, true, func(f string, a ...any) { fmt.Printf(f+"\n", a...) })
	if err != nil {
		t.Fatal(err)
	}
	fmt.Printf("%+v\n", rep.Context)
	for _, r := range rep.Rows {
		fmt.Printf("%-10s %-10s %.2f bytes %.3f  ret %.3f of %d/%d hops %.2f planted %.3f strong %v err %.4f/%.3f lse %.3f stated %.4f true %.4f ratio %.2f cov %.2f\n", r.Task, r.Method, r.Budget, r.Bytes, r.Retention, r.Right, r.Asked, r.Hops, r.PlantedRead, r.Strong, r.ErrorMean, r.ErrorP95, r.LSEError, r.Stated, r.True, r.StatedPerTrue, r.Covered)
	}
}

func TestStats(t *testing.T) {
	if os.Getenv("STATS") == "" {
		t.Skip()
	}
	n, d, g := 32768, 128, 4
	fmt.Sscan(os.Getenv("STATS"), &n, &d, &g)
	ctx := context.Background()
	h, err := New(Options{Shape: Shape{d, g}, Tokens: n, Samples: 8, WeightLow: .3, WeightHigh: .6, Seed: 1})
	if err != nil {
		t.Fatal(err)
	}
	s, err := h.seal(ctx, func(string, ...any) {})
	if err != nil {
		t.Fatal(err)
	}
	qs, err := h.ask(ctx, func(string, ...any) {})
	if err != nil {
		t.Fatal(err)
	}
	fmt.Printf("%+v\n", h.report(qs).Context)
	for _, task := range []Task{Ordinary, Single, MultiValue, FWE} {
		var sum [8]float64
		c := 0.
		for _, qu := range qs {
			if qu.task != task {
				continue
			}
			for _, r := range qu.looks {
				q := qu.q[r*d : (r+1)*d]
				for i := 1; i < len(s.segments); i += 3 {
					c++
					x := s.stat(q, i)
					for j := range x {
						sum[j] += x[j]
					}
					sum[6] += norm(q)
				}
			}
		}
		fmt.Printf("%s: sd %.2f leaf %.3f w256 %.3f maxz %.2f kurt %.1f noise %.3f |q| %.2f\n", task, math.Sqrt(sum[0]/c), sum[1]/sum[0], sum[2]/sum[0], sum[3]/c, sum[4]/c, math.Sqrt(sum[5]/sum[0]), sum[6]/c)
	}
}

func (s *sealed) stat(q []float32, i int) (out [8]float64) {
	v, h, d := s.view(i), s.segments[i].Header, s.h.w.d
	k := make([]float32, v.Stored()*d)
	p := func(x tiers.Plane) []byte { return s.tier.Piece(h, 0, x) }
	if err := v.Keys(k, p(tiers.PlaneSteps), p(tiers.PlaneK2), p(tiers.PlaneK4), nil, p(tiers.PlaneOutliers)); err != nil {
		panic(err)
	}
	var sc []float64
	for t, pos := range s.position[i] {
		a := float64(attention.Dot(q, s.h.key(pos)))
		e := float64(attention.Dot(q, k[t*d:(t+1)*d])) - a
		out[5] += e * e / float64(v.Stored())
		sc = append(sc, a)
	}
	vr := func(x []float64) (float64, float64) {
		m := mean(x)
		s := 0.
		for _, a := range x {
			s += (a - m) * (a - m) / float64(len(x))
		}
		return m, s
	}
	m, all := vr(sc)
	out[0] = all
	for _, a := range sc {
		z := (a - m) / math.Sqrt(all)
		out[3] = max(out[3], z)
		out[4] += z * z * z * z / float64(len(sc))
	}
	body := sc[:v.Info.Body]
	n := 0.
	for l := 0; l+16 <= len(body); l += 16 {
		_, x := vr(body[l : l+16])
		out[1] += x
		n++
	}
	out[1] /= n
	n = 0
	for l := 0; l+256 <= len(body); l += 256 {
		_, x := vr(body[l : l+256])
		out[2] += x
		n++
	}
	out[2] /= n
	return out
}
