// Package cmd_test checks what holds for the module as a whole.
package cmd_test

import (
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const module = "kvtier"

// kernels is the innermost package: it has a place of its own in the order, below
// that of the folder in which it lies.
const kernels = "attention/kernels"

// allowed says what each top folder, and kernels, may import of the others. Imports go one
// way: cmd, bench -> server -> tiers -> attention, compress -> kernels -> standard library.
var allowed = map[string][]string{
	"cmd":       {"bench", "server", "tiers", "attention", "compress", kernels, "proto"},
	"bench":     {"server", "tiers", "attention", "compress", kernels, "proto"},
	"server":    {"tiers", "attention", "compress", kernels, "proto"},
	"tiers":     {"attention", "compress", kernels},
	"attention": {kernels},
	"compress":  {kernels},
	kernels:     {},
	"proto":     {},
}

// allowedOutside says which modules beyond the standard library the innermost folders may import;
// the others may import what go.mod has.
var allowedOutside = map[string][]string{
	"attention": {"gonum.org/v1/gonum"},
	"compress":  {"github.com/pierrec/lz4/v4"},
	kernels:     {"golang.org/x/sys"}, // which processor it is, and Linux's leave to use tiles
}

// testOnly are modules that any test may import.
var testOnly = []string{"pgregory.net/rapid", "go.uber.org/goleak", "gonum.org/v1/gonum", "github.com/cockroachdb/datadriven"}

// pkg is what `go list -json` says of a package.
type pkg struct {
	ImportPath                         string
	Imports, TestImports, XTestImports []string
}

func listPackages(t *testing.T) []pkg {
	t.Helper()
	seeAll(t)
	cmd := exec.Command("go", "list", "-e", "-json=ImportPath,Imports,TestImports,XTestImports", module+"/...")
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	var list []pkg
	dec := json.NewDecoder(strings.NewReader(string(out)))
	for {
		var p pkg
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			return list
		} else if err != nil {
			t.Fatal(err)
		}
		list = append(list, p)
	}
}

// seeAll has go test see that what `go list` reads for this test has changed: else it would take the result of an earlier run for this one's.
func seeAll(t *testing.T) {
	t.Helper()
	err := filepath.WalkDir("..", func(_ string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() && strings.HasPrefix(d.Name(), ".") && d.Name() != ".." {
			return fs.SkipDir
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestImportsGoOneWay(t *testing.T) {
	list := listPackages(t)
	if len(list) < 5 {
		t.Fatalf("go list gave only %d packages", len(list))
	}
	for _, p := range list {
		top := topFolder(p.ImportPath)
		if _, known := allowed[top]; !known {
			t.Errorf("%s: folder %q has no place in the order of imports: add it to this test and to the design", p.ImportPath, top)
			continue
		}
		for _, imported := range p.Imports {
			if complaint := judge(top, imported, nil); complaint != "" {
				t.Errorf("%s imports %s: %s", p.ImportPath, imported, complaint)
			}
		}
		for _, imported := range slices.Concat(p.TestImports, p.XTestImports) {
			if complaint := judge(top, imported, testOnly); complaint != "" {
				t.Errorf("a test of %s imports %s: %s", p.ImportPath, imported, complaint)
			}
		}
	}
}

// judge says why a package in folder top may not import the package, or "".
func judge(top, imported string, alsoOutside []string) string {
	if imported == module || strings.HasPrefix(imported, module+"/") {
		to := topFolder(imported)
		if to == top || slices.Contains(allowed[top], to) {
			return ""
		}
		return top + " may import only " + strings.Join(append([]string{top}, allowed[top]...), ", ")
	}
	outside, limited := allowedOutside[top]
	if !limited || isStandard(imported) {
		return ""
	}
	for _, m := range slices.Concat(outside, alsoOutside) {
		if imported == m || strings.HasPrefix(imported, m+"/") {
			return ""
		}
	}
	return top + " may import only the standard library and " + strings.Join(outside, ", ")
}

func topFolder(path string) string {
	path = strings.TrimPrefix(path, module+"/")
	if path == kernels {
		return kernels
	}
	top, _, _ := strings.Cut(path, "/")
	return top
}

// isStandard: paths of the standard library have no dot in their first element.
func isStandard(path string) bool {
	first, _, _ := strings.Cut(path, "/")
	return !strings.Contains(first, ".")
}

func TestJudge(t *testing.T) {
	for _, c := range []struct {
		top, imported string
		fine          bool
	}{
		{"cmd", "kvtier/server", true},
		{"server", "kvtier/cmd/internal/size", false},
		{"server", "kvtier/bench", false},
		{"tiers", "kvtier/server", false},
		{"tiers", "kvtier/proto/kvtier/v1", false},
		{"tiers", "kvtier/attention", true},
		{"tiers", "github.com/cockroachdb/pebble/v2", true},
		{"attention", "kvtier/compress", false},
		{"compress", "kvtier/attention", false},
		{"attention", "kvtier/attention/kernels", true},
		{"compress", "kvtier/attention/kernels", true},
		{kernels, "kvtier/attention", false},
		{kernels, "kvtier/compress", false},
		{kernels, "golang.org/x/sys/cpu", true},
		{"attention", "math/bits", true},
		{"attention", "gonum.org/v1/gonum/mat", true},
		{"attention", "gonum.org/v1/gonumX", false},
		{"compress", "github.com/pierrec/lz4/v4", true},
		{"compress", "golang.org/x/sys/unix", false},
	} {
		if got := judge(c.top, c.imported, nil); (got == "") != c.fine {
			t.Errorf("%s -> %s: %q", c.top, c.imported, got)
		}
	}
}
