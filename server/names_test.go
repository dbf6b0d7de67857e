package server

import (
	"testing"

	"kvtier/tiers"
)

// BenchmarkNames names a million tokens: what a start computes anew.
func BenchmarkNames(b *testing.B) {
	sp, err := newSpec(testSpec())
	if err != nil {
		b.Fatal(err)
	}
	ids := make([]uint64, 1<<20)
	for i := range ids {
		ids[i] = uint64(i) * 7919 % 50000
	}
	n := newNamer(make([]byte, tenantKeyBytes), sp, tiers.ProfileBalanced)
	for b.Loop() {
		if got := len(n.chain(nil, ids, allExact)); got != len(ids)/blockTokens {
			b.Fatalf("%d names", got)
		}
	}
}
