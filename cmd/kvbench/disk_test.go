package main

import (
	"encoding/json"
	"strings"
	"testing"

	"kvtier/bench/disk"
)

func TestDisk(t *testing.T) {
	t.Setenv("PATH", "") // no fio: it is measured beside raw reads alone
	small := []string{"disk", "--dir", t.TempDir(), "--bytes", "64MiB", "--written", "32MiB", "--blocks", "4", "--depths", "2", "--time", "20ms", "--repeats", "1"}
	text, err := runRoot(t, append(small, "--json")...)
	if err != nil {
		t.Fatal(err)
	}
	var rep disk.Report
	if err := json.Unmarshal([]byte(text), &rep); err != nil || rep.Fio != "" || len(rep.Rows) != 6 {
		t.Errorf("%v: %+v", err, rep)
	}
	text, err = runRoot(t, small...)
	if err != nil || !strings.Contains(text, "no fio") || !strings.Contains(text, "tier, long batches") {
		t.Errorf("%v\n%s", err, text)
	}
	for _, args := range [][]string{{"--fio", "fio"}, {"--blocks", "3"}, {"--blocks", "-1"}, {"--bytes", "7"}, {"--dir", "/none"}, {"more"}} {
		if text, err := runRoot(t, append([]string{"disk"}, args...)...); err == nil {
			t.Errorf("%v was taken: %s", args, text)
		}
	}
}
