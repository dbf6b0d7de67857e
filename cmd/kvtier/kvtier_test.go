package main

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	kvtierv1 "kvtier/proto/kvtier/v1"
)

var update = flag.Bool("update", false, "write the golden files anew")

// result is what one run of the program gave.
type result struct {
	code        int
	out, errOut string
}

// runCLI runs the program as main does, with a clock that stands still.
func runCLI(t *testing.T, addr string, args ...string) result {
	t.Helper()
	var out, errOut bytes.Buffer
	a := newApp(strings.NewReader(""), &out, &errOut)
	a.now = func() time.Time { return time.Unix(1_780_090_061, 0) }
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	code := execute(ctx, a, append([]string{"--addr", addr}, args...))
	return result{code, out.String(), errOut.String()}
}

func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name+".golden")
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("output differs from %s (run 'go test ./cmd/kvtier -update' if that is meant)\ngot:\n%s\nwant:\n%s", path, got, want)
	}
}

func TestVerbsPrint(t *testing.T) {
	f := startFake(t)
	for _, v := range []struct {
		name string
		args []string
	}{
		{"status", []string{"status"}},
		{"ls", []string{"ls"}},
		{"describe", []string{"describe", idBook, "--ids"}},
		{"describe-damaged", []string{"describe", idVideo}},
		{"explain", []string{"explain", "moby-dick", "--layer", "3"}},
		{"audits", []string{"audits"}},
		{"audits-list", []string{"audits", "moby-dick", "--list", "9"}},
		{"audits-none", []string{"audits", idFork}},
		{"explain-head", []string{"explain", "moby-dick", "--layer", "3", "--head", "1", "--top", "2"}},
		{"residency", []string{"residency", "01jd9q2v7"}},
		{"residency-narrow", []string{"residency", "01jd9q2v7", "--width", "4"}},
		{"residency-empty", []string{"residency", idFork}},
		{"verify", []string{"verify", "--quiet"}},
		{"flush", []string{"flush", idFork}},
		{"flush-seal", []string{"flush", idFork, "--seal"}},
		{"delete", []string{"delete", idFork}},
	} {
		for _, format := range []string{"table", "json"} {
			t.Run(v.name+"/"+format, func(t *testing.T) {
				r := runCLI(t, f.addr, append(v.args, "-o", format)...)
				if r.code != exitOK || r.errOut != "" {
					t.Fatalf("exit code %d, standard error %q", r.code, r.errOut)
				}
				if format == "json" && !json.Valid([]byte(r.out)) {
					t.Errorf("no JSON: %s", r.out)
				}
				golden(t, v.name+"."+format, r.out)
			})
		}
	}
}

func TestListIsEmpty(t *testing.T) {
	f := startFake(t)
	f.list = nil
	if r := runCLI(t, f.addr, "ls"); r.code != exitOK || r.out != "no sequences\n" {
		t.Errorf("got %+v", r)
	}
}

func TestSequenceArguments(t *testing.T) {
	f := startFake(t)
	twin := &kvtierv1.SequenceInfo{SequenceId: "ffff0000", Name: "twin"}
	f.list = append(f.list, twin, &kvtierv1.SequenceInfo{SequenceId: "ffff0001", Name: "twin"},
		// A name that also begins other ids means the name.
		&kvtierv1.SequenceInfo{SequenceId: "aaaa", Name: "01jd9"})
	for _, c := range []struct {
		arg     string
		code    int
		message string
	}{
		{idBook, exitOK, ""},
		{"moby-dick", exitOK, ""},
		{"01jdb", exitOK, ""},
		{"01jd9", exitOK, ""},
		{"01jd9q2v", exitUsage, `2 sequences' ids begin with "01jd9q2v"`},
		{"twin", exitUsage, `2 sequences have the name "twin": give an id (ffff0000, ffff0001)`},
		{"nothing", exitNotFound, `no sequence has the id or name "nothing": 'kvtier ls' lists them`},
	} {
		r := runCLI(t, f.addr, "describe", c.arg)
		if r.code != c.code || !strings.Contains(r.errOut, c.message) {
			t.Errorf("describe %s: code %d, %q; want code %d, %q", c.arg, r.code, r.errOut, c.code, c.message)
		}
	}
}

func TestUsageErrors(t *testing.T) {
	f := startFake(t)
	for _, args := range [][]string{
		{"frobnicate"},
		{"describe"},
		{"describe", "a", "b"},
		{"status", "--no-such-flag"},
		{"status", "-o", "xml"},
		{"status", "--timeout", "-1s"},
		{"explain", idBook},
		{"explain", idBook, "--layer", "99"},
		{"explain", idBook, "--layer", "0", "--head", "7"},
		{"residency", idBook, "--width", "0"},
		{"status", "--addr", "nonsense"},
		{"status", "--addr", "http://localhost:1"},
	} {
		if r := runCLI(t, f.addr, args...); r.code != exitUsage || !strings.HasPrefix(r.errOut, "kvtier: ") || r.out != "" {
			t.Errorf("%v: %+v; want code %d and a message", args, r, exitUsage)
		}
	}
}

func TestNoDaemon(t *testing.T) {
	missing := "unix://" + filepath.Join(shortTempDir(t), "none.sock")
	for _, args := range [][]string{{"status"}, {"verify"}, {"delete", "x"}} {
		r := runCLI(t, missing, args...)
		want := "kvtier: no daemon at " + missing + ": start one with 'kvtierd', or name another with --addr or KVTIER_ADDR\n"
		if r.code != exitUnreachable || r.errOut != want {
			t.Errorf("%v: %+v", args, r)
		}
	}
}

func TestStaleSocketAndClosedPort(t *testing.T) {
	stale := filepath.Join(shortTempDir(t), "stale.sock")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: stale, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	tcp.Close()
	for _, addr := range []string{stale, tcp.Addr().String()} {
		if r := runCLI(t, addr, "status"); r.code != exitUnreachable || !strings.Contains(r.errOut, "no daemon at "+addr) {
			t.Errorf("%s: %+v", addr, r)
		}
	}
}

// A daemon that accepts and stays silent, as one that recovers does.
func TestTimeout(t *testing.T) {
	path := filepath.Join(shortTempDir(t), "s.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	r := runCLI(t, "unix:"+path, "status", "--timeout", "100ms")
	if r.code != exitServer || !strings.Contains(r.errOut, "within 100ms: raise --timeout") {
		t.Errorf("got %+v", r)
	}
}

func TestServerErrors(t *testing.T) {
	f := startFake(t)
	for _, c := range []struct {
		err     error
		code    int
		message string
	}{
		{detailed(codes.ResourceExhausted, "tails are full"), exitServer, "ResourceExhausted: tails are full (TAILS_FULL); try again in 250ms"},
		{status.Error(codes.NotFound, "no sequence "+idFork), exitNotFound, "'kvtier ls' lists the sequences"},
		{status.Error(codes.DataLoss, "span 0: checksum"), exitFinding, "'kvtier verify' finds all damage"},
		{status.Error(codes.Unavailable, "shutting down"), exitUnreachable, "does not answer: shutting down"},
		{status.Error(codes.Unimplemented, "unknown method Flush"), exitServer, "compare 'kvtier version'"},
		{status.Error(codes.Internal, "boom"), exitServer, "the daemon failed: Internal: boom"},
	} {
		f.err = c.err
		if r := runCLI(t, f.addr, "flush", idFork); r.code != c.code || !strings.Contains(r.errOut, c.message) {
			t.Errorf("%v: %+v; want code %d, %q", c.err, r, c.code, c.message)
		}
	}
}

func TestVerifyFindsDamage(t *testing.T) {
	f := startFake(t)
	f.verify[1].Damage = []string{"span 2048-4096, layer 3, head 0: checksum of plane k2"}
	r := runCLI(t, f.addr, "verify", "moby-dick")
	if r.code != exitFinding {
		t.Errorf("exit code %d", r.code)
	}
	golden(t, "verify-damage.table", r.out)
	golden(t, "verify-damage.stderr", r.errOut)
	if f.mu.checked[0] != idBook {
		t.Errorf("checked %q, want %q", f.mu.checked, idBook)
	}
}

func TestVerifyThatStopsEarlyIsNoProof(t *testing.T) {
	f := startFake(t)
	f.verify = f.verify[:1]
	if r := runCLI(t, f.addr, "verify"); r.code != exitServer || !strings.Contains(r.errOut, "before everything was checked") {
		t.Errorf("got %+v", r)
	}
	f.verify = nil
	if r := runCLI(t, f.addr, "verify"); r.code != exitServer {
		t.Errorf("got %+v", r)
	}
	f.err = status.Error(codes.Internal, "disk gone")
	if r := runCLI(t, f.addr, "verify"); r.code != exitServer || !strings.Contains(r.errOut, "disk gone") {
		t.Errorf("got %+v", r)
	}
}

func TestDeleteAndFlushNameTheWholeID(t *testing.T) {
	f := startFake(t)
	if r := runCLI(t, f.addr, "delete", "01jd9q2v9"); r.code != exitOK {
		t.Fatalf("delete: %+v", r)
	}
	if r := runCLI(t, f.addr, "flush", "01jd9q2v9", "--seal"); r.code != exitOK {
		t.Fatalf("flush: %+v", r)
	}
	if len(f.mu.deleted) != 1 || f.mu.deleted[0] != idFork {
		t.Errorf("deleted %q", f.mu.deleted)
	}
	if got := f.mu.flushed[0]; got.GetSequenceId() != idFork || !got.GetSeal() {
		t.Errorf("flushed %v", got)
	}
}

func TestVersion(t *testing.T) {
	if r := runCLI(t, "unix:/none", "version"); r.code != exitOK || !strings.HasPrefix(r.out, "kvtier ") {
		t.Errorf("got %+v", r)
	}
	r := runCLI(t, "unix:/none", "version", "-o", "json")
	var v struct{ Version, Go, Platform string }
	if err := json.Unmarshal([]byte(r.out), &v); err != nil || v.Version == "" || v.Go == "" || v.Platform == "" {
		t.Errorf("%q: %v", r.out, err)
	}
}

func TestCompletion(t *testing.T) {
	f := startFake(t)
	if r := runCLI(t, f.addr, "completion", "bash"); r.code != exitOK || !strings.Contains(r.out, "__start_kvtier") {
		t.Errorf("completion: code %d, %d bytes", r.code, len(r.out))
	}
	// The shell's request comes without this program's flags before it.
	t.Setenv("KVTIER_ADDR", f.addr)
	var out, errOut bytes.Buffer
	if code := execute(t.Context(), newApp(strings.NewReader(""), &out, &errOut), []string{"__complete", "describe", ""}); code != exitOK {
		t.Fatalf("code %d: %s", code, errOut.String())
	}
	if !strings.Contains(out.String(), idBook+"\tmoby-dick\n") {
		t.Errorf("got %q", out.String())
	}
}

func TestHelpHasExitCodes(t *testing.T) {
	r := runCLI(t, "unix:/none", "--help")
	if r.code != exitOK || !strings.Contains(r.out, "Exit codes:") {
		t.Errorf("got %+v", r)
	}
}

func diagnose(t *testing.T, addr string, args ...string) (map[string]finding, int) {
	t.Helper()
	r := runCLI(t, addr, append([]string{"doctor", "-o", "json"}, args...)...)
	var d diagnosis
	if err := json.Unmarshal([]byte(r.out), &d); err != nil {
		t.Fatalf("%q: %v", r.out, err)
	}
	byName := map[string]finding{}
	for _, f := range d.Findings {
		byName[f.Check] = f
	}
	return byName, r.code
}

func TestDoctorHealthy(t *testing.T) {
	f := startFake(t)
	dir := shortTempDir(t)
	found, code := diagnose(t, f.addr, "--data", dir)
	for _, name := range []string{"daemon", "round trip", "health", "stored bytes", "socket", "data folder", "sync", "processor", "sealed memory"} {
		if found[name].Verdict != verdictOK {
			t.Errorf("%s: %+v", name, found[name])
		}
	}
	for _, name := range []string{"version", "fast socket", "file system", "direct I/O", "free disk", "memory", "open files", "locked memory", "huge pages", "clock"} {
		if found[name].Verdict == "" || found[name].Verdict == verdictFail {
			t.Errorf("%s: %+v", name, found[name])
		}
	}
	if found["version"].Verdict != verdictWarn {
		t.Errorf("different versions gave %+v", found["version"])
	}
	if code != exitOK {
		t.Errorf("exit code %d", code)
	}
	if left, _ := os.ReadDir(dir); len(left) != 0 {
		t.Errorf("doctor left %v", left)
	}
}

func TestDoctorFindings(t *testing.T) {
	f := startFake(t)
	f.status.Tiers[1].Corruptions = 2
	f.health.SetServingStatus(services[1], grpc_health_v1.HealthCheckResponse_NOT_SERVING)
	_, socket, _ := splitAddr(f.addr)
	dir := shortTempDir(t)
	for path, mode := range map[string]os.FileMode{socket: 0o666, dir: 0o755} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
	}
	found, code := diagnose(t, f.addr, "--data", dir)
	for name, verdict := range map[string]string{
		"health": verdictFail, "stored bytes": verdictFail, "socket": verdictWarn, "data folder": verdictWarn,
	} {
		if got := found[name]; got.Verdict != verdict || got.Hint == "" {
			t.Errorf("%s: %+v; want %s with a hint", name, got, verdict)
		}
	}
	if code != exitFinding {
		t.Errorf("exit code %d", code)
	}
}

func TestDoctorWithoutDaemon(t *testing.T) {
	dir := shortTempDir(t)
	found, code := diagnose(t, "unix:"+filepath.Join(dir, "none"), "--data", filepath.Join(dir, "later"))
	if code != exitFinding || found["daemon"].Verdict != verdictFail || found["data folder"].Verdict != verdictSkip {
		t.Errorf("code %d, %+v, %+v", code, found["daemon"], found["data folder"])
	}
	if r := runCLI(t, "unix:"+filepath.Join(dir, "none"), "doctor"); !strings.Contains(r.out, "fail  daemon") || !strings.Contains(r.out, "1 failures") {
		t.Errorf("table:\n%s", r.out)
	}
}

func TestDoctorChecks(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	memInfo := []byte("MemTotal:       16384 kB\nMemAvailable:    8192 kB\n")
	for name, c := range map[string]struct {
		got  finding
		want string
	}{
		"socket is a file":    {checkSocket("socket", file), verdictFail},
		"folder is a file":    {checkStorage(file, nil)[0], verdictFail},
		"limits above memory": {checkMemory(memInfo, nil, fixedStatus()), verdictWarn},
		"limits in memory":    {checkMemory(memInfo, []byte("max\n"), nil), verdictOK},
		"small container":     {checkMemory(memInfo, []byte("1048576\n"), &kvtierv1.GetStatusResponse{TailBytesLimit: 1 << 20}), verdictWarn},
		"no meminfo":          {checkMemory(nil, nil, nil), verdictSkip},
		"huge pages madvise":  {checkHugePages("always [madvise] never\n"), verdictOK},
		"huge pages never":    {checkHugePages("always madvise [never]\n"), verdictWarn},
		"huge pages missing":  {checkHugePages(""), verdictWarn},
		"clock of 1970":       {checkClock("tsc", time.Unix(0, 0)), verdictWarn},
		"slow clock":          {checkClock("hpet", time.Unix(1_780_000_000, 0)), verdictWarn},
		"slow daemon":         {checkRoundTrip(2 * time.Second), verdictWarn},
	} {
		if c.got.Verdict != c.want {
			t.Errorf("%s: %+v; want %s", name, c.got, c.want)
		}
	}
}
