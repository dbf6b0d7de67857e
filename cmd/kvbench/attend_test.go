package main

import (
	"bytes"
	"encoding/json"
	"io"
	"strings"
	"testing"

	"kvtier/bench/speed"
)

func runRoot(t *testing.T, args ...string) (string, error) {
	t.Helper()
	var out bytes.Buffer
	root := newRoot()
	root.SetOut(&out)
	root.SetErr(io.Discard)
	root.SetArgs(args)
	err := root.Execute()
	return out.String(), err
}

func TestAttend(t *testing.T) {
	small := []string{"attend", "--tokens", "2048,4096", "--head-dim", "64", "--kv-heads", "1", "--repeats", "1", "--budgets", ".3"}
	text, err := runRoot(t, append(small, "--json")...)
	if err != nil {
		t.Fatal(err)
	}
	var rep speed.AttendReport
	if err := json.Unmarshal([]byte(text), &rep); err != nil {
		t.Fatal(err)
	}
	if len(rep.Rows) != 8 || rep.Ggml != nil {
		t.Errorf("%+v", rep)
	}
	text, err = runRoot(t, small...)
	if err != nil || !strings.Contains(text, "share 0.3, by page") || !strings.Contains(text, "growth") {
		t.Errorf("%v\n%s", err, text)
	}
}

func TestPeersNeedPython(t *testing.T) {
	t.Chdir(t.TempDir())
	t.Setenv("KVTIER_PYTHON", "")
	for _, args := range [][]string{{"kernels", "--peers"}, {"attend", "--ggml"}} {
		if _, err := runRoot(t, args...); err == nil || !strings.Contains(err.Error(), "make venv") {
			t.Errorf("%v: %v", args, err)
		}
	}
}

func TestPrintPeers(t *testing.T) {
	s := speed.Spread{Median: 2, Least: 1, Most: 3}
	var out bytes.Buffer
	err := printPeers(&out, &speed.PeerReport{Shape: speed.Shape{Tokens: 64}, Ggml: speed.PeerAbout{Version: "1.2"}, Rows: []speed.PeerRow{
		{What: "ours", Threads: 1, Ms: s}, {What: "q8_0", Layout: "token", Threads: 1, Ms: s, Equal: s, Planes: s, Error: .01}}})
	if text := out.String(); err != nil || !strings.Contains(text, "ggml 1.2") || !strings.Contains(text, "[token][head]") {
		t.Errorf("%v\n%s", err, text)
	}
}
