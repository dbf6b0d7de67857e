package sparse

import (
	"math"
	"math/rand/v2"
	"slices"
	"testing"

	"kvtier/attention"
	"kvtier/compress"
	"kvtier/tiers"
	"kvtier/tiers/seal"
)

// Where single tokens weigh far more than all means promised, the unit of weights is raised, and
// weights are the same as if it had been high enough from the start.
func TestUnitIsRaised(t *testing.T) {
	rng := rand.New(rand.NewPCG(91, 92))
	f := sealed(rng, newSample(rng, 3000, 1, 64), seal.Options{Profile: tiers.ProfileBalanced}, compress.BF16, 2048, 3000)
	const rows = 3
	for _, softcap := range []float32{0, 300} {
		q := randn(rng, rows*64, 1.5)
		look := func(higher float32) (u *run, raised bool) {
			u = newRun(t.Context(), f.reader, f.segs, []int{0, 1}, Query{Q: q, Softcap: softcap, Partials: attention.NewPartials(rows, 64)}, Budget{Share: 1}, &Trace{})
			if err := u.scorePages(); err != nil {
				t.Fatal(err)
			}
			for r := range u.base {
				u.base[r] += higher
			}
			before := slices.Clone(u.base)
			if err := u.look(attention.Top(make([]float32, u.pages), u.pages)); err != nil {
				t.Fatal(err)
			}
			return u, !slices.Equal(u.base, before)
		}
		u, _ := look(20)
		low, raised := look(-20)
		compared := 0
		for i := range u.leaves {
			a, b := u.weightsOf(&u.leaves[i]), low.weightsOf(&low.leaves[i])
			for j := range a {
				r := j / tiers.LeafTokens
				x, y := u.base[r]+log(a[j]), low.base[r]+log(b[j])
				if a[j] > 1e-16 && b[j] > 1e-16 {
					if compared++; math.Abs(float64(x-y)) > 1e-3 {
						t.Fatalf("softcap %v: a token's log weight is %v, or %v", softcap, x, y)
					}
				}
			}
		}
		for r := range u.total {
			if math.Abs(float64(u.total[r]-low.total[r])) > 1e-3 {
				t.Errorf("softcap %v: the sum's log is %v, or %v", softcap, u.total[r], low.total[r])
			}
		}
		if !raised || compared < 100 {
			t.Errorf("softcap %v: raised %v, %d weights compared", softcap, raised, compared)
		}
		u.release()
		low.release()
	}
}
