package gpu

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// waits are the places where the host waits for the device, and marks what to wait for.
var waits = []struct {
	what    *regexp.Regexp
	instead string
}{
	{regexp.MustCompile(`[\w.]+\.Wait\([\w.()]+, [\w.]+\)`), "error(nil)"}, // for an event
	{regexp.MustCompile(`[\w.]+\.Synchronize\(\)`), "error(nil)"},
	{regexp.MustCompile(`[\w.]+\.Record\([\w.]+\)`), "error(nil)"},
	{regexp.MustCompile(`\w+\.abandoned\.Wait\(\)`), ""},
}

// TestMutants leaves out, one at a time, what makes the host wait for the
// device. Tests on the emulated device, whose streams are lazy and whose memory
// goes at once when it is freed, have to fail. It takes minutes: `make mutants-cuda`.
func TestMutants(t *testing.T) {
	if os.Getenv("CUDA_MUTANTS") == "" {
		t.Skip("`make mutants-cuda` runs it")
	}
	for _, file := range []string{"cudabank.go", "close.go", "kernels/attend.go", "kernels/seal.go", "cuda/timed.go"} {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if out, ok := passes(t, file, string(text)); !ok {
			t.Fatalf("%s as it is: %s", file, out)
		}
		found := 0
		for _, w := range waits {
			for _, at := range w.what.FindAllIndex(text, -1) {
				call := string(text[at[0]:at[1]])
				found++
				line := 1 + bytes.Count(text[:at[0]], []byte("\n"))
				t.Run(fmt.Sprintf("%s:%d", file, line), func(t *testing.T) {
					mutant := string(text[:at[0]]) + w.instead + string(text[at[1]:])
					if out, ok := passes(t, file, mutant); ok {
						t.Errorf("nobody misses %s\n%s", call, out)
					} else if strings.Contains(out, "[build failed]") || strings.Contains(out, "[setup failed]") {
						t.Errorf("not built without %s\n%s", call, out)
					}
				})
			}
		}
		if found == 0 {
			t.Errorf("%s waits for nothing", file)
		}
	}
}

// passes says whether the tests of a file's package pass with another text of it.
func passes(t *testing.T, file, text string) (string, bool) {
	t.Helper()
	path, err := filepath.Abs(file)
	if err != nil {
		t.Fatal(err)
	}
	folder := t.TempDir()
	other, overlay := filepath.Join(folder, "mutant.go"), filepath.Join(folder, "overlay.json")
	replace, err := json.Marshal(map[string]map[string]string{"Replace": {path: other}})
	if err != nil {
		t.Fatal(err)
	}
	for name, b := range map[string][]byte{other: []byte(text), overlay: replace} {
		if err := os.WriteFile(name, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.Command("go", "test", "-tags", "cuda", "-vet", "off", "-failfast", "-timeout", "90s", "-overlay", overlay,
		"-skip", "Mutants|Dense|Extremes|Integers|Peaks|Choose|SealSame|SealFull", "./"+filepath.Dir(file))
	cmd.Env = append(os.Environ(), "CUDA_MUTANTS=", "MOCKCUDA_STRICT_FREE=1")
	out, err := cmd.CombinedOutput()
	return string(out), err == nil
}
