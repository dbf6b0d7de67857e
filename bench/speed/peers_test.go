package speed

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// script makes a Python that answers whatever it is asked for with lines.
func script(t *testing.T, lines string) string {
	t.Helper()
	if _, err := exec.LookPath("sh"); err != nil {
		t.Skip("there is no shell to play a Python")
	}
	path := filepath.Join(t.TempDir(), "python")
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+lines), 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

const playedPeer = `echo '{"version": "1.2", "commit": "abc", "features": ["avx2", "fma"]}'
while read -r line; do echo '{"seconds": 0.5, "error": 0.01}'; done
`

func TestMeasurePeers(t *testing.T) {
	rep, err := MeasurePeers(context.Background(), PeerOptions{Shape: Shape{Tokens: 1000, HeadDim: 64, KVHeads: 2, QueryHeads: 6},
		Repeats: 2, Python: script(t, playedPeer)})
	if err != nil {
		t.Fatal(err)
	}
	if got, want := rep.Ggml.String(), "ggml 1.2 (abc), built for avx2 fma"; got != want {
		t.Errorf("%q, not %q", got, want)
	}
	if want := 2 * (4 + 6); len(rep.Rows) != want {
		t.Fatalf("%d rows, not %d", len(rep.Rows), want)
	}
	for _, r := range rep.Rows {
		theirs := r.Layout != ""
		if !(r.Ms.Median > 0) || theirs != (r.Equal.Median > 0) || theirs != (r.Planes.Least > 0) || theirs && r.Ms.Most != 500 {
			t.Errorf("%+v", r)
		}
	}
}

func TestPeerFails(t *testing.T) {
	for _, c := range []struct{ name, lines, want string }{
		{"at once", "echo 'kvbench: it is not installed' >&2; exit 1", "it is not installed"},
		{"silently", "exit 1", "EOF"},
		{"when asked", `echo '{"version": "1"}'; read -r line; echo 'kvbench: its output is off' >&2`, "its output is off"},
	} {
		_, err := MeasurePeers(context.Background(), PeerOptions{Shape: Shape{Tokens: 64}, Python: script(t, c.lines)})
		if err == nil || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "kvbench:") {
			t.Errorf("%s: %v", c.name, err)
		}
	}
}
