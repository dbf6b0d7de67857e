package disk

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"strings"
)

// fio is the program of that name, the usual measure of disks.
type fio struct{ path string }

func (f fio) there() bool { return f.path != "" }

// version is empty if there is no fio.
func (f fio) version(ctx context.Context) (string, error) {
	if !f.there() {
		return "", nil
	}
	out, err := exec.CommandContext(ctx, f.path, "--version").Output()
	if err != nil {
		return "", fmt.Errorf("%s --version: %w", f.path, err)
	}
	return strings.TrimSpace(string(out)), nil
}

// fioSide is what fio reports of reading or writing.
type fioSide struct {
	IOPS float64 `json:"iops"`
	IOs  int64   `json:"total_ios"`
	Ms   float64 `json:"runtime"`
}

// run carries out a job in a folder. It returns operations a second, and the
// microseconds of processor time of one.
func (f fio) run(ctx context.Context, dir string, args ...string) (rate, cpu float64, err error) {
	cmd := exec.CommandContext(ctx, f.path, append([]string{"--name=kvbench", "--direct=1", "--output-format=json"}, args...)...)
	cmd.Dir = dir
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return 0, 0, fmt.Errorf("fio: %w: %s", err, firstLine(stderr.String()))
	}
	var rep struct {
		Jobs []struct {
			Error       int     `json:"error"`
			Read, Write fioSide // whichever the job did
			User        float64 `json:"usr_cpu"`
			System      float64 `json:"sys_cpu"`
		}
	}
	if i := bytes.IndexByte(out, '{'); i > 0 {
		out = out[i:] // warnings come before
	}
	if err := json.Unmarshal(out, &rep); err != nil {
		return 0, 0, fmt.Errorf("fio: %w", err)
	}
	if len(rep.Jobs) != 1 || rep.Jobs[0].Error != 0 {
		return 0, 0, fmt.Errorf("fio failed: %s", firstLine(stderr.String()))
	}
	j := &rep.Jobs[0]
	side := j.Read
	if side.IOs == 0 {
		side = j.Write
	}
	if side.IOs == 0 {
		return 0, 0, errors.New("fio did nothing")
	}
	return side.IOPS, (j.User + j.System) / 100 * side.Ms * 1e3 / float64(side.IOs), nil
}

func firstLine(s string) string {
	line, _, _ := strings.Cut(strings.TrimSpace(s), "\n")
	return line
}
