//go:build !linux

package kernels

func mayUseTiles() bool { return false }
