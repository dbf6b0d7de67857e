package daemon

import (
	"bytes"
	"errors"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spf13/pflag"
)

func mustLoad(t *testing.T, environ []string, args ...string) *Config {
	t.Helper()
	c, _, err := load(args, environ, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func writeFile(t *testing.T, name, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestDefaults(t *testing.T) {
	t.Setenv("XDG_DATA_HOME", "/xdg")
	c := mustLoad(t, nil)
	want := Config{
		Data: "/xdg/kvtier", Socket: "/xdg/kvtier/kvtier.sock", FastSocket: "/xdg/kvtier/fast.sock",
		Listen: "127.0.0.1:7420", Metrics: "127.0.0.1:7421", GPU: GPUAuto, GPUAudit: 0.01, RAM: 1 << 30, Disk: 20 << 30, Tail: 2 << 30, Promote: 256 << 20,
		ReadAll: 8192, ReadAllInRAM: 0.1, ByPage: true, Share: 0.2, Audit: 0.01, SyncInterval: 20 * time.Millisecond, ShutdownTimeout: 10 * time.Second,
		LogLevel: slog.LevelInfo, LogFormat: "text",
	}
	c.flags, c.sources = nil, nil
	if got := *c; !equalConfig(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
}

func TestGPU(t *testing.T) {
	for text, want := range map[string]GPU{"auto": GPUAuto, "off": GPUOff, "2GiB": 2 << 30} {
		if c := mustLoad(t, []string{"KVTIER_GPU=" + text}); c.GPU != want {
			t.Errorf("%s: %d, want %d", text, c.GPU, want)
		}
	}
	for _, text := range []string{"", "some", "-1", "1.5.2g"} {
		if err := new(GPU).Set(text); err == nil {
			t.Errorf("%q is taken", text)
		}
	}
}

func equalConfig(a, b Config) bool {
	a.Warnings, b.Warnings = nil, nil
	return a.Data == b.Data && a.Socket == b.Socket && a.FastSocket == b.FastSocket && a.Listen == b.Listen &&
		a.AllowRemote == b.AllowRemote && a.Metrics == b.Metrics && a.PProf == b.PProf && a.GPU == b.GPU && a.GPUDevice == b.GPUDevice && a.GPUAudit == b.GPUAudit && a.RAM == b.RAM && a.Disk == b.Disk &&
		a.Tail == b.Tail && a.Promote == b.Promote && a.ReadAll == b.ReadAll && a.ReadAllInRAM == b.ReadAllInRAM && a.ByPage == b.ByPage && a.Share == b.Share && a.Audit == b.Audit && a.SyncInterval == b.SyncInterval &&
		a.ShutdownTimeout == b.ShutdownTimeout && a.LogLevel == b.LogLevel && a.LogFormat == b.LogFormat
}

func TestPrecedence(t *testing.T) {
	for name, text := range map[string]string{
		"kvtier.yaml": "ram: 1MiB\ndisk: 2MiB\ntail: 3145728\nshare: 0.5\npprof: true\n",
		"kvtier.toml": "ram = '1MiB'\ndisk = '2MiB'\ntail = 3145728\nshare = 0.5\npprof = true\n",
	} {
		path := writeFile(t, name, text)
		environ := []string{"KVTIER_RAM=10m", "KVTIER_DISK=20m", "KVTIER_READ_ALL=77", "OTHER_RAM=1"}
		c := mustLoad(t, environ, "--config", path, "--ram", "100m")
		if c.RAM != 100<<20 || c.Disk != 20<<20 || c.Tail != 3<<20 || c.ReadAll != 77 || c.Share != 0.5 || !c.PProf || c.Audit != 0.01 {
			t.Errorf("%s: %+v", name, c)
		}
		for key, want := range map[string]string{"ram": "flag", "disk": "KVTIER_DISK", "tail": path, "audit": ""} {
			if got := c.sources[key]; got != want {
				t.Errorf("%s: %s comes from %q, want %q", name, key, got, want)
			}
		}
	}
}

func TestFileFromEnvironment(t *testing.T) {
	path := writeFile(t, "c.yml", "log-level: debug\nlog-format: json\nsync-interval: 5ms\n")
	c := mustLoad(t, []string{"KVTIER_CONFIG=" + path})
	if c.LogLevel != slog.LevelDebug || c.LogFormat != "json" || c.SyncInterval != 5*time.Millisecond || c.File != path {
		t.Errorf("%+v", c)
	}
}

func TestPaths(t *testing.T) {
	t.Setenv("HOME", "/home/ada")
	path := writeFile(t, "c.yaml", "data: ~/kv\nfast-socket: ''\n")
	c := mustLoad(t, nil, "--config", path)
	if c.Data != "/home/ada/kv" || c.Socket != "/home/ada/kv/kvtier.sock" || c.FastSocket != "" {
		t.Errorf("%+v", c)
	}
	if c := mustLoad(t, nil, "--data", "rel", "--socket", ""); !filepath.IsAbs(c.Data) || c.Socket != "" || c.FastSocket != c.Data+"/fast.sock" {
		t.Errorf("%+v", c)
	}
}

func TestRefusals(t *testing.T) {
	nested := writeFile(t, "nested.yaml", "server:\n  ram: 1g\n")
	list := writeFile(t, "list.yaml", "data: [a, b]\n")
	null := writeFile(t, "null.yaml", "fast-socket:\n")
	bad := writeFile(t, "bad.toml", "ram = \n")
	value := writeFile(t, "value.yaml", "ram: lots\n")
	for _, c := range []struct {
		environ, args []string
		want          string
	}{
		{nil, []string{"--ram", "lots"}, `"lots" is no size`},
		{[]string{"KVTIER_RAM=lots"}, nil, "KVTIER_RAM: invalid argument"},
		{nil, []string{"--config", value}, value + ": invalid argument"},
		{nil, []string{"--config", nested}, `unknown key "server.ram"`},
		{nil, []string{"--config", list}, "data must be one value"},
		{nil, []string{"--config", null}, "fast-socket must be one value"},
		{nil, []string{"--config", bad}, "configuration file " + bad},
		{nil, []string{"--config", "/none.yaml"}, "no such file"},
		{nil, []string{"--config", "/none.json"}, "must end in .yaml"},
		{nil, []string{"serve"}, `unexpected argument "serve"`},
		{nil, []string{"--listen", ":7420"}, "can be reached from other machines"},
		{nil, []string{"--listen", "0.0.0.0:7420"}, "--allow-remote"},
		{nil, []string{"--listen", "example.org:7420"}, "--allow-remote"},
		{nil, []string{"--metrics", "192.0.2.1:80"}, "--metrics 192.0.2.1:80 can be reached"},
		{nil, []string{"--listen", "7420"}, "is no address"},
		{nil, []string{"--listen", "", "--socket", ""}, "nobody could reach"},
		{nil, []string{"--socket", "/a", "--fast-socket", "/a"}, "different paths"},
		{nil, []string{"--data", ""}, "--data is empty"},
		{nil, []string{"--share", "0"}, "--share 0"},
		{nil, []string{"--share", "NaN"}, "--share NaN"},
		{nil, []string{"--audit", "1.5"}, "--audit 1.5"},
		{nil, []string{"--gpu-audit", "-1"}, "--gpu-audit -1"},
		{nil, []string{"--ram", "0", "--disk", "0"}, "--disk 0"},
		{nil, []string{"--sync-interval", "0"}, "--sync-interval 0s"},
		{nil, []string{"--read-all", "-1"}, "--read-all -1"},
		{nil, []string{"--read-all-in-ram", "2"}, "--read-all-in-ram 2"},
		{nil, []string{"--log-format", "xml"}, "use text or json"},
		{nil, []string{"--log-level", "loud"}, "loud"},
	} {
		if _, _, err := load(c.args, c.environ, io.Discard); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%v %v: %v; want %q", c.environ, c.args, err, c.want)
		}
	}
}

func TestWarnings(t *testing.T) {
	c := mustLoad(t, []string{"KVTIER_ADDR=unix:///x", "KVTIER_RAMM=1g", "KVTIER_PRINT_CONFIG=true"}, "--listen", "0.0.0.0:7420", "--allow-remote")
	text := strings.Join(c.Warnings, "\n")
	for _, want := range []string{"KVTIER_RAMM in the environment is no setting", "KVTIER_PRINT_CONFIG", "there is no authentication"} {
		if !strings.Contains(text, want) {
			t.Errorf("no %q in %q", want, text)
		}
	}
	if strings.Contains(text, "KVTIER_ADDR") {
		t.Errorf("KVTIER_ADDR is the client's: %q", text)
	}
}

// What --print-config prints is a file that gives the same configuration again.
func TestPrintConfigRoundTrip(t *testing.T) {
	c := mustLoad(t, []string{"KVTIER_TAIL=1.5g"}, "--data", "/tmp/a b", "--fast-socket", "", "--audit", "0.125", "--gpu-audit", "0.5", "--log-level", "debug", "--listen", "[::1]:0")
	var b bytes.Buffer
	c.print(&b)
	if !strings.Contains(b.String(), `tail: "1536MiB" # KVTIER_TAIL`) {
		t.Errorf("got\n%s", b.String())
	}
	again := mustLoad(t, nil, "--config", writeFile(t, "c.yaml", b.String()))
	if !equalConfig(*c, *again) {
		t.Errorf("\ngot  %+v\nwant %+v\nfrom\n%s", again, c, b.String())
	}
}

func TestHelp(t *testing.T) {
	var b bytes.Buffer
	_, _, err := load([]string{"--help"}, nil, &b)
	if !errors.Is(err, pflag.ErrHelp) || !strings.Contains(b.String(), "--fast-socket") || !strings.Contains(b.String(), "Exit codes") {
		t.Errorf("%v, %q", err, b.String())
	}
}
