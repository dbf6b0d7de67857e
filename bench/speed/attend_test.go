package speed

import (
	"context"
	"testing"
)

func TestMeasureAttend(t *testing.T) {
	o := AttendOptions{Tokens: []int{4096, 2048}, HeadDim: 64, KVHeads: 2, Group: 3, Budgets: []float64{.2}, Repeats: 2}
	rep, err := MeasureAttend(context.Background(), o)
	if err != nil {
		t.Fatal(err)
	}
	if len(rep.Rows) != 8 {
		t.Fatalf("%d rows: %+v", len(rep.Rows), rep.Rows)
	}
	for i, r := range rep.Rows {
		if want := []int{2048, 4096}[i/4]; r.Tokens != want || r.Sealed != want-2048 {
			t.Errorf("row %d: %d tokens, %d sealed", i, r.Tokens, r.Sealed)
		}
		if !(r.Ms.Median > 0 && r.Dense.Median > 0) {
			t.Errorf("row %d: %+v", i, r)
		}
	}
	// Nothing is sealed of 2,048 tokens: all ways are the same.
	for _, r := range rep.Rows[1:4] {
		if r.Error != 0 || r.Read != 0 || !(r.Stages.Zone > 0) || r.Stages.Score != 0 {
			t.Errorf("%s of the exact zone: %+v, %+v", r.What, r, r.Stages)
		}
	}
	everything := rep.Rows[5]
	if s := everything.Stages; !(everything.Read > 1 && everything.Error < .05 && s.Scan > 0 && s.Fetch > 0) {
		t.Errorf("everything: %+v, %+v", everything, s)
	}
	for _, sparse := range rep.Rows[6:] {
		if s := sparse.Stages; !(sparse.Read > 0 && sparse.Read < .21 && sparse.Error > everything.Error && sparse.Error < .5 && s.Score > 0) {
			t.Errorf("%s: %+v, %+v", sparse.What, sparse, s)
		}
	}
}

func TestMeasureAttendRefuses(t *testing.T) {
	for name, o := range map[string]AttendOptions{
		"a budget above 1":     {Budgets: []float64{2}},
		"a head dimension":     {HeadDim: 100},
		"too few tokens":       {Tokens: []int{100}},
		"a negative of heads":  {KVHeads: -1},
		"a negative of groups": {Group: -1},
	} {
		if _, err := MeasureAttend(context.Background(), o); err == nil {
			t.Errorf("%s was not refused", name)
		}
	}
}
