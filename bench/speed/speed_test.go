package speed

import (
	"testing"

	"kvtier/attention/kernels"
)

func TestMeasure(t *testing.T) {
	o := Options{Bytes: 16 << 20, Repeats: 1, Rows: 3, HeadDim: 80}
	results, err := Measure(o)
	if err != nil {
		t.Fatal(err)
	}
	if want := 2 * (1 + len(kernelsOf(o.HeadDim))*len(kernels.Variants())); len(results) != want {
		t.Errorf("%d results, not %d", len(results), want)
	}
	for _, r := range results {
		if !(r.GBs.Median > 0 && r.Share.Median > 0) || r.Kernel != "raw read" && !(r.TokenNs > 0) {
			t.Errorf("%+v", r)
		}
	}
	if _, err := Measure(Options{HeadDim: 100}); err == nil {
		t.Error("a head dimension of 100")
	}
}

func TestMemoryIsNumbers(t *testing.T) {
	buf, err := memory(1 << 16)
	if err != nil {
		t.Fatal(err)
	}
	wide := make([]float32, len(buf)/2)
	kernels.WidenBF16(wide, buf)
	for _, x := range append(wide, floats(buf)...) {
		if !(x >= -1 && x <= 1) {
			t.Fatalf("it holds %v", x)
		}
	}
}
