package planted

import (
	"bytes"
	"context"
	"slices"
	"testing"

	"kvtier/tiers"
)

// A shorter context has the rows of the front of a longer one.
func TestPlainIsCutAnywhere(t *testing.T) {
	plain := func(tokens int) *Plain {
		p, err := NewPlain(context.Background(), Shape{64, 2}, tokens, 3, nil)
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	short, long := plain(2600), plain(5000)
	a, covered := short.Segments(2600)
	b, same := long.Segments(2600)
	if len(a) != 1 || len(b) != 1 || covered != tiers.SegmentTokens || same != covered {
		t.Fatalf("%d and %d segments of %d and %d tokens", len(a), len(b), covered, same)
	}
	ak, av := short.Rows(0, covered)
	bk, bv := long.Rows(0, covered)
	if !bytes.Equal(ak, bk) || !bytes.Equal(av, bv) {
		t.Error("other rows")
	}
	if short.Full(2600) != long.Full(2600) || short.Full(2600) == 0 {
		t.Errorf("%d and %d bytes at 4 bits", short.Full(2600), long.Full(2600))
	}
	if q := long.Query(4999, 1); len(q) != 2*64 || !slices.Equal(q, long.Query(4999, 1)) || slices.Equal(q, long.Query(4999, 2)) {
		t.Error("queries do not follow from their number")
	}
	if _, err := NewPlain(context.Background(), Shape{64, 2}, 100, 3, nil); err == nil {
		t.Error("100 tokens were not refused")
	}
}
