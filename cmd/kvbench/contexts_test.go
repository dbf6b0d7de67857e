package main

import (
	"bytes"
	"encoding/json"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"kvtier/bench/contexts"
)

func TestContexts(t *testing.T) {
	bin := filepath.Join(t.TempDir(), "kvtierd")
	if out, err := exec.Command("go", "build", "-o", bin, "kvtier/cmd/kvtierd").CombinedOutput(); err != nil {
		t.Fatalf("build kvtierd: %v\n%s", err, out)
	}
	text, err := runRoot(t, "contexts", "--kvtierd", bin, "--dir", t.TempDir(), "--contexts", "4", "--tokens", "256..512", "--layers", "2",
		"--rate", "20", "--time", "500ms", "--ram", "8MiB", "--tail", "8MiB", "--disk", "32MiB", "--audit", "1", "--json")
	if err != nil {
		t.Fatal(err)
	}
	var rep contexts.Report
	if err := json.Unmarshal([]byte(text), &rep); err != nil || rep.Contexts != 4 || rep.All.Audit.Answers == 0 {
		t.Errorf("%v: %+v", err, rep)
	}
	var out bytes.Buffer
	if err := printContexts(&out, &rep); err != nil || !strings.Contains(out.String(), "4 contexts of") || !strings.Contains(out.String(), "wrong: 0") {
		t.Errorf("%v\n%s", err, out.String())
	}
}

func TestContextsRefuses(t *testing.T) {
	t.Setenv("PATH", "")
	for _, args := range [][]string{{}, {"--kvtierd", "/none"}, {"--tokens", "x"}, {"--tokens", "5..3"}, {"--tail", "much"}, {"more"},
		{"--kvtierd", "/bin/true", "--contexts", "1"}} {
		if text, err := runRoot(t, append([]string{"contexts"}, args...)...); err == nil {
			t.Errorf("%v was taken: %s", args, text)
		}
	}
}
