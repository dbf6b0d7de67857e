package quality

import (
	"context"
	"math"
	"testing"

	"kvtier/tiers"
)

// TestGPU: what a GPU chooses errs less the more it is, and reads as many bytes; all of it is everything. Other profiles are refused.
func TestGPU(t *testing.T) {
	file := madeUp(t)
	o := Options{Profile: tiers.ProfileBalanced, Shares: []float64{.1, .3, 1}, Step: 8, Methods: []string{"gpu", "k4v4"}}
	results, err := Measure(context.Background(), []string{file}, o)
	if err != nil {
		t.Fatal(err)
	}
	some, more, all, everything := results[0], results[1], results[2], results[3]
	if all.Method != "gpu" || everything.Method != "k4v4" {
		t.Fatalf("%+v", results)
	}
	if !(some.Error.Mean > more.Error.Mean && more.Error.Mean > all.Error.Mean && some.RAM < more.RAM && more.RAM < all.RAM) || some.Strong3.Unread < more.Strong3.Unread {
		t.Errorf("%+v\n%+v\n%+v", some, more, all)
	}
	if math.Abs(all.Error.Mean-everything.Error.Mean) > .02*everything.Error.Mean || all.Strong3.Unread > 0 || *all.Stated != 0 {
		t.Errorf("all pages: %+v, everything: %+v", all, everything)
	}
	if !(*some.Stated > *more.Stated && *more.Stated > 0 && some.KL.Mean < 5) {
		t.Errorf("stated %v and %v", *some.Stated, *more.Stated)
	}
	o.Profile = tiers.ProfileNeutral
	if _, err := Measure(context.Background(), []string{file}, o); err == nil {
		t.Error("profile neutral")
	}
}
