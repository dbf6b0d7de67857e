package main

import (
	"encoding/json"
	"fmt"
	"runtime"

	"github.com/spf13/cobra"

	"kvtier/attention/kernels"
	"kvtier/cmd/internal/buildinfo"
)

func newVersion(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Show this program's version, and the kernels that it would compute with",
		Args:  cobra.NoArgs,
		RunE: run(func(*cobra.Command, []string) error {
			version, platform := buildinfo.Version(), runtime.GOOS+"/"+runtime.GOARCH
			loops, err := kernels.Active()
			if err != nil {
				return failf(exitUsage, "%v", err)
			}
			if a.format == "json" {
				return a.printValue(map[string]string{"version": version, "go": runtime.Version(), "platform": platform, "kernels": loops.String()})
			}
			_, err = fmt.Fprintf(a.out, "kvtier %s (%s, %s, kernels %v)\n", version, runtime.Version(), platform, loops)
			return err
		}),
	}
}

// printValue writes what is no protocol message as JSON.
func (a *app) printValue(v any) error {
	enc := json.NewEncoder(a.out)
	enc.SetIndent("", "  ")
	return enc.Encode(v)
}
