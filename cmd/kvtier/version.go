package main

import (
	"encoding/json"
	"fmt"
	"runtime"

	"github.com/spf13/cobra"

	"kvtier/cmd/internal/buildinfo"
)

func newVersion(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Show this program's version",
		Args:  cobra.NoArgs,
		RunE: run(func(*cobra.Command, []string) error {
			version, platform := buildinfo.Version(), runtime.GOOS+"/"+runtime.GOARCH
			if a.format == "json" {
				return a.printValue(map[string]string{"version": version, "go": runtime.Version(), "platform": platform})
			}
			_, err := fmt.Fprintf(a.out, "kvtier %s (%s, %s)\n", version, runtime.Version(), platform)
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
