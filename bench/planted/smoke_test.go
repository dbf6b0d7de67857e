package planted

import (
	"context"
	"fmt"
	"os"
	"testing"
)

func TestSmoke(t *testing.T) {
	if os.Getenv("SMOKE") == "" { t.Skip() }
	n, d, g := 32768, 128, 4
	fmt.Sscan(os.Getenv("SMOKE"), &n, &d, &g)
	rep, err := Run(context.Background(), Options{Shape: Shape{d, g}, Tokens: n, Samples: 8, WeightLow: .3, WeightHigh: .6, Seed: 1}, []float64{.1, .2}, true, func(f string, a ...any) { fmt.Printf(f+"\n", a...) })
	if err != nil { t.Fatal(err) }
	fmt.Printf("%+v\n", rep.Context)
	for _, r := range rep.Rows {
		fmt.Printf("%-10s %-10s %.2f bytes %.3f  ret %.3f of %d/%d hops %.2f planted %.3f strong %v err %.4f/%.3f lse %.3f stated %.4f true %.4f ratio %.2f cov %.2f\n", r.Task, r.Method, r.Budget, r.Bytes, r.Retention, r.Right, r.Asked, r.Hops, r.PlantedRead, r.Strong, r.ErrorMean, r.ErrorP95, r.LSEError, r.Stated, r.True, r.StatedPerTrue, r.Covered)
	}
}
