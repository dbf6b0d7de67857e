// Package buildinfo says which build of kvtier this is.
package buildinfo

import "runtime/debug"

// version is set by the linker: -X kvtier/cmd/internal/buildinfo.version=...
var version string

// Version is the build's version: what the Makefile gave, else the commit that the go command
// recorded, else "devel".
func Version() string {
	if version != "" {
		return version
	}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "devel"
	}
	commit, dirty := "", ""
	for _, s := range info.Settings {
		switch {
		case s.Key == "vcs.revision" && len(s.Value) >= 12:
			commit = s.Value[:12]
		case s.Key == "vcs.modified" && s.Value == "true":
			dirty = "-dirty"
		}
	}
	if commit == "" {
		return "devel"
	}
	return commit + dirty
}
