package ram_test

import (
	"testing"

	"kvtier/tiers"
	"kvtier/tiers/ram"
	"kvtier/tiers/tiertest"
)

func open(t testing.TB, limit int64) *ram.Tier {
	t.Helper()
	tier, err := ram.New(ram.Options{Bytes: limit})
	if err != nil {
		t.Fatal(err)
	}
	return tier
}

func TestTier(t *testing.T) {
	tiertest.Run(t, func(t *testing.T, limit int64) tiers.Tier { return open(t, limit) })
}
