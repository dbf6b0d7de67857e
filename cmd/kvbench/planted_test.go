package main

import (
	"encoding/json"
	"strings"
	"testing"

	"kvtier/bench/planted"
)

func TestPlanted(t *testing.T) {
	small := []string{"planted", "--tokens", "4096", "--shapes", "64x2", "--samples", "1", "--budgets", ".3", "--comparators=false"}
	text, err := runRoot(t, append(small, "--json")...)
	if err != nil {
		t.Fatal(err)
	}
	var reports []planted.Report
	if err := json.Unmarshal([]byte(text), &reports); err != nil {
		t.Fatal(err)
	}
	if len(reports) != 1 || len(reports[0].Rows) != 2*len(planted.Tasks) {
		t.Errorf("%d reports; want one with a row for each task and method", len(reports))
	}
	text, err = runRoot(t, small...)
	if err != nil || !strings.Contains(text, "synthetic") || !strings.Contains(text, "multivalue") {
		t.Errorf("%v\n%s", err, text)
	}
}

func TestPlantedRefuses(t *testing.T) {
	for _, args := range [][]string{{"--shapes", "64"}, {"--weight", ".3"}, {"--tokens", "10"}, {"--budgets", "0"}, {"more"}} {
		if text, err := runRoot(t, append([]string{"planted"}, args...)...); err == nil {
			t.Errorf("%v was taken: %s", args, text)
		}
	}
}
