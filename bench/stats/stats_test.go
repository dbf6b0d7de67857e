package stats

import (
	"math"
	"testing"
)

func TestWilson(t *testing.T) {
	if low, high := Wilson(1, 10); math.Abs(low-.7225) > 1e-3 || high != 1 {
		t.Errorf("10 of 10: %v to %v", low, high)
	}
	if low, high := Wilson(.5, 100); math.Abs(low-.4038) > 1e-3 || math.Abs(high-.5962) > 1e-3 {
		t.Errorf("50 of 100: %v to %v", low, high)
	}
	if low, high := Wilson(0, 0); low != 0 || high != 1 {
		t.Errorf("none of none: %v to %v", low, high)
	}
}

func TestRelativeError(t *testing.T) {
	for _, c := range []struct {
		got  []float32
		want []float64
		err  float64
	}{
		{[]float32{3, 4}, []float64{3, 4}, 0},
		{[]float32{0, 0}, []float64{3, 4}, 1},
		{[]float32{3, 5}, []float64{3, 4}, .2},
		{[]float32{1}, []float64{0}, 0},
	} {
		if e := RelativeError(c.got, c.want); math.Abs(e-c.err) > 1e-12 {
			t.Errorf("%v for %v: %v, want %v", c.got, c.want, e, c.err)
		}
	}
}
