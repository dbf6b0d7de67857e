package main

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"

	"github.com/spf13/cobra"

	"kvtier/cmd/internal/place"
	kvtierv1 "kvtier/proto/kvtier/v1"
)

// Verdicts of a check.
const (
	verdictOK   = "ok"
	verdictWarn = "warn"
	verdictFail = "fail"
	verdictSkip = "skip"
)

// finding is what one check found. Hint says what to do about it.
type finding struct {
	Check   string `json:"check"`
	Verdict string `json:"verdict"`
	Detail  string `json:"detail"`
	Hint    string `json:"hint,omitempty"`
}

func ok(check, format string, args ...any) finding {
	return finding{Check: check, Verdict: verdictOK, Detail: fmt.Sprintf(format, args...)}
}

func warn(check, hint, format string, args ...any) finding {
	return finding{Check: check, Verdict: verdictWarn, Hint: hint, Detail: fmt.Sprintf(format, args...)}
}

func fail(check, hint, format string, args ...any) finding {
	return finding{Check: check, Verdict: verdictFail, Hint: hint, Detail: fmt.Sprintf(format, args...)}
}

func skip(check, format string, args ...any) finding {
	return finding{Check: check, Verdict: verdictSkip, Detail: fmt.Sprintf(format, args...)}
}

// diagnosis is the report of all checks.
type diagnosis struct {
	Findings []finding `json:"findings"`
	Warnings int       `json:"warnings"`
	Failures int       `json:"failures"`
}

func (d *diagnosis) add(findings ...finding) {
	for _, f := range findings {
		switch f.Verdict {
		case verdictWarn:
			d.Warnings++
		case verdictFail:
			d.Failures++
		}
		d.Findings = append(d.Findings, f)
	}
}

func newDoctor(a *app) *cobra.Command {
	var dataDir string
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "Check the daemon and the machine it runs on",
		Long: `Check that the daemon answers and that this machine suits it: sockets, data folder, disk, limits,
memory, processor, clock. It writes only a file in the data folder that it removes at once.
The exit code is 1 if a check fails; warnings do not count.`,
		Args: cobra.NoArgs,
		RunE: run(func(cmd *cobra.Command, _ []string) error {
			d, err := a.diagnose(cmd, dataDir)
			if err != nil {
				return err
			}
			if err := a.printDiagnosis(d); err != nil {
				return err
			}
			if d.Failures > 0 {
				return &failure{code: exitFinding}
			}
			return nil
		}),
	}
	cmd.Flags().StringVar(&dataDir, "data", "", "data folder to check (default: the daemon's, else "+place.DataDir()+")")
	return cmd
}

func (a *app) diagnose(cmd *cobra.Command, dataDir string) (*diagnosis, error) {
	network, target, err := splitAddr(a.addr)
	if err != nil {
		return nil, err
	}
	d := &diagnosis{}
	var status *kvtierv1.GetStatusResponse
	err = a.call(cmd, func(ctx context.Context, c *client) error {
		status = a.checkDaemon(ctx, c, d)
		return nil
	})
	if err != nil {
		return nil, err
	}
	if !isLocal(network, target) {
		d.add(skip("machine", "%s is another machine: run doctor there", target))
		return d, nil
	}
	if dataDir == "" {
		dataDir = status.GetDataDir()
	}
	if dataDir == "" {
		dataDir = place.DataDir()
	}
	if network == "unix" {
		d.add(checkSocket("socket", target))
	}
	d.add(checkSocket("fast socket", place.FastSocket(dataDir)))
	d.add(checkStorage(dataDir, status)...)
	d.add(checkMachine(status)...)
	return d, nil
}

func isLocal(network, target string) bool {
	if network == "unix" {
		return true
	}
	host, _, _ := net.SplitHostPort(target)
	ip := net.ParseIP(host)
	return host == "localhost" || (ip != nil && ip.IsLoopback())
}

func (a *app) printDiagnosis(d *diagnosis) error {
	if a.format == "json" {
		return a.printValue(d)
	}
	var b bytes.Buffer
	rows := make([][]string, 0, len(d.Findings))
	for _, f := range d.Findings {
		detail := f.Detail
		if f.Hint != "" {
			detail += ": " + f.Hint
		}
		rows = append(rows, []string{f.Verdict, f.Check, printable(detail)})
	}
	columns(&b, rows)
	fmt.Fprintf(&b, "\n%d checks, %d warnings, %d failures\n", len(d.Findings), d.Warnings, d.Failures)
	_, err := a.out.Write(b.Bytes())
	return err
}

// checkSocket looks at who may connect to a Unix socket: whoever may, may read every context.
func checkSocket(check, path string) finding {
	info, err := os.Stat(path)
	switch {
	case os.IsNotExist(err):
		return skip(check, "%s does not exist", path)
	case err != nil:
		return fail(check, "run as the user who runs kvtierd", "%v", err)
	case info.Mode()&os.ModeSocket == 0:
		return fail(check, "move it away and restart kvtierd", "%s is no socket", path)
	case info.Mode().Perm()&0o077 != 0:
		return warn(check, "chmod 600 it, or everybody it admits can read all contexts", "%s has mode %04o", path, info.Mode().Perm())
	}
	return ok(check, "%s, mode %04o", path, info.Mode().Perm())
}
