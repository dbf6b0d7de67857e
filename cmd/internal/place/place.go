// Package place says where a daemon's files are when nobody says otherwise, so that kvtier and
// kvtierd agree on it.
package place

import (
	"os"
	"path/filepath"
)

// Names of the sockets in a data folder.
const (
	SocketName     = "kvtier.sock"
	FastSocketName = "fast.sock"
)

// DataDir is the default data folder: $XDG_DATA_HOME/kvtier, or ~/.local/share/kvtier. Without a
// home folder (a bare container) it is .kvtier in the current one.
func DataDir() string {
	if dir := os.Getenv("XDG_DATA_HOME"); filepath.IsAbs(dir) {
		return filepath.Join(dir, "kvtier")
	}
	home, err := os.UserHomeDir()
	if err != nil {
		return ".kvtier"
	}
	return filepath.Join(home, ".local", "share", "kvtier")
}

// Socket is the gRPC socket of a data folder.
func Socket(dataDir string) string { return filepath.Join(dataDir, SocketName) }

// FastSocket is the fast path's socket of a data folder.
func FastSocket(dataDir string) string { return filepath.Join(dataDir, FastSocketName) }
