package sparse

import (
	"math"
	"math/rand/v2"
	"testing"

	"kvtier/attention"
	"kvtier/attention/kernels"
	"kvtier/compress"
	"kvtier/tiers"
	"kvtier/tiers/seal"
)

// The table is the function, and the function is the mean of what it says.
func TestMeanSquare(t *testing.T) {
	rng := rand.New(rand.NewPCG(51, 52))
	for range 300 {
		mu, noise := -20+26*rng.Float64(), 8*rng.Float64()*rng.Float64()
		want := meanSquare(mu, noise)
		if got := curveAt(squaresFor(float32(noise)), float32(mu)); math.Abs(got-want) > .2*want+1e-12 {
			t.Errorf("mu %.2f, noise %.2f: %g by the table, %g", mu, noise, got, want)
		}
		if mu < -4 || noise > 3 { // few samples would show what rules the mean
			continue
		}
		const n = 20000
		var sum, sum2 float64
		for range n {
			x := min(1, math.Exp(2*(mu+math.Sqrt(noise)*rng.NormFloat64())))
			sum, sum2 = sum+x/n, sum2+x*x/n
		}
		if sd := math.Sqrt((sum2 - sum*sum) / n); math.Abs(sum-want) > 6*sd+1e-4 {
			t.Errorf("mu %.2f, noise %.2f: %g, sampled %g +- %g", mu, noise, want, sum, sd)
		}
	}
}

func curveAt(c kernels.Curve, x float32) float64 {
	var dst, at [tiers.LeafTokens]float32
	var sums [2]float32
	at[0] = x
	kernels.Curves(dst[:], sums[:], at[:], tiers.LeafTokens, []kernels.Curve{c})
	return float64(dst[0])
}

// No leaf offers more than its bound says, whatever was read of it.
func TestBound(t *testing.T) {
	rng := rand.New(rand.NewPCG(55, 56))
	f := sealed(rng, newSample(rng, 3000, 1, 64), seal.Options{Profile: tiers.ProfileBalanced}, compress.BF16, 2048, 3000)
	near := 0
	for _, scale := range []float32{.1, 1, 3, 10, 40} {
		q := Query{Q: randn(rng, 3*64, .15*scale), Partials: attention.NewPartials(3, 64)}
		u := newRun(t.Context(), f.reader, f.segs, []int{0, 1}, q, 1, &Trace{})
		if err := u.scorePages(); err != nil {
			t.Fatal(err)
		}
		for plane := range compress.NumKeyPlanes - 1 {
			var all []int
			var err error
			if plane == 0 {
				err = u.look(attention.Top(make([]float32, u.pages), u.pages))
			} else {
				for i := range u.leaves {
					if len(u.leaves[i].planes) == plane {
						all = append(all, i)
					}
				}
				err = u.readKeys(plane, all)
				u.normalise()
			}
			if err != nil {
				t.Fatal(err)
			}
			for i := range u.leaves {
				x := &u.leaves[i]
				u.weigh(x)
				bound := u.bound(x)
				clear(u.hist[:])
				u.offer(x)
				best := u.hist.bin(0) - 1 // of the most worth
				if best > binOf(bound) {
					t.Fatalf("queries times %v, %d planes: a leaf offers %v a byte, its bound is %v",
						scale, len(x.planes), math.Float32frombits(uint32(best)<<worthShift), bound)
				}
				if bound > 0 && best+8*4 > binOf(bound) { // within a factor of 16
					near++
				}
			}
		}
		u.release()
	}
	if near < 1000 {
		t.Errorf("only %d bounds are of any use", near)
	}
}

// What is chosen by the threshold fits, and the next worth would not.
func TestThreshold(t *testing.T) {
	rng := rand.New(rand.NewPCG(53, 54))
	for range 100 {
		type item struct{ gain, cost float32 }
		items := make([]item, 1+rng.IntN(500))
		var offers histogram
		total := 0.
		for i := range items {
			items[i] = item{float32(math.Exp(20*rng.NormFloat64()) * float64(rng.IntN(5))), float32(1 + rng.IntN(400))}
			offers.add(items[i].gain/items[i].cost, items[i].cost)
			if items[i].gain > 0 {
				total += float64(items[i].cost)
			}
		}
		bytes := rng.Float64() * total * 1.2
		least := offers.threshold(bytes)
		chosen, next := 0., 0.
		for _, x := range items {
			if w := x.gain / x.cost; x.gain > 0 && w >= least {
				chosen += float64(x.cost)
			} else if x.gain > 0 && w >= least*.85 {
				next += float64(x.cost)
			}
		}
		if chosen > bytes {
			t.Fatalf("%.0f bytes of items for %.0f", chosen, bytes)
		}
		if bytes >= total && chosen < total {
			t.Fatalf("%.0f bytes of items, though all %.0f fit", chosen, total)
		}
		if bytes < total && least < inf && chosen+next < bytes && next > 0 {
			t.Fatalf("%.0f and %.0f more of %.0f bytes", chosen, next, bytes)
		}
	}
}
