package sparse

import (
	"math"
	"math/rand/v2"
	"testing"

	"kvtier/attention"
	"kvtier/compress"
	"kvtier/tiers"
	"kvtier/tiers/seal"
)

// What the square of a share is said to be is no less than its mean, and not much more
// but where a share may be near 1.
func TestExpectedSquares(t *testing.T) {
	rng := rand.New(rand.NewPCG(51, 52))
	f := sealed(rng, newSample(rng, 2048, 1, 64), seal.Options{Profile: tiers.ProfileBalanced}, compress.BF16, 2048)
	far := 0
	for _, scale := range []float32{.1, 1, 3, 10} {
		q := Query{Q: randn(rng, 3*64, .15*scale), Partials: attention.NewPartials(3, 64)}
		u := newRun(t.Context(), f.reader, f.segs, []int{0}, q, Budget{Share: 1}, &Trace{})
		if err := u.scorePages(); err != nil {
			t.Fatal(err)
		}
		if err := u.look([]int{0, 9, u.pages - 1}); err != nil {
			t.Fatal(err)
		}
		for i := range u.leaves {
			for planes := 1; planes <= int(u.leaves[i].planes); planes++ {
				for _, g := range u.grades(&u.leaves[i], planes) {
					for share := 1e-6; share <= 1; share *= 3 {
						noise := float64(g.noise)
						want := meanSquare(math.Log(share)-float64(g.raise), noise)
						got := min(share*float64(g.ofShare), share*share*float64(g.ofSquare))
						if want > 1.001*got {
							t.Fatalf("share %g, noise %g: square %g is expected, not %g", share, noise, got, want)
						}
						if got > 3*want && share*math.Exp(2*noise) < .01 {
							far++
						}
					}
				}
			}
		}
		u.release()
	}
	if far > 0 {
		t.Errorf("%d squares are expected to be thrice what they are", far)
	}
}

// meanSquare is the mean of the square of a token's share of the softmax, whose
// log is normal with mean mu and variance noise, but no share is more than 1.
func meanSquare(mu, noise float64) float64 {
	if noise == 0 {
		return math.Exp(min(0, 2*mu))
	}
	sd := math.Sqrt(2 * noise)
	return math.Exp(2*mu+2*noise)*math.Erfc((mu+2*noise)/sd)/2 + math.Erfc(-mu/sd)/2
}

// What values are worth one by one adds up to no more than what their leaf was weighed by.
func TestWeighTokens(t *testing.T) {
	rng := rand.New(rand.NewPCG(55, 56))
	f := sealed(rng, newSample(rng, 3000, 1, 64), seal.Options{Profile: tiers.ProfileBalanced}, compress.BF16, 2048, 3000)
	q := Query{Q: randn(rng, 3*64, .3), Partials: attention.NewPartials(3, 64)}
	u := newRun(t.Context(), f.reader, f.segs, []int{0, 1}, q, Budget{Share: 1}, &Trace{})
	defer u.release()
	if err := u.scorePages(); err != nil {
		t.Fatal(err)
	}
	if err := u.look(attention.Top(make([]float32, u.pages), u.pages)); err != nil {
		t.Fatal(err)
	}
	deep := 0
	for i := range u.leaves {
		x := &u.leaves[i]
		u.weigh(x)
		if x.deep < 0 {
			continue
		}
		deep++
		var together float32
		for _, gain := range u.gainsOf(x) {
			together += gain
		}
		if together > 1.0001*x.valueGain || !(together > 0) {
			t.Errorf("leaf %d: values are worth %v together, one by one %v", i, x.valueGain, together)
		}
		if x.tokens < .999 || x.tokens > tiers.LeafTokens+.001 {
			t.Errorf("leaf %d: %v tokens", i, x.tokens)
		}
	}
	if deep == 0 {
		t.Error("there are no deep leaves")
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
