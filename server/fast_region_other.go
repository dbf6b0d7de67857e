//go:build !linux

package server

import "net"

const oobBytes = 0

// admit lets everybody in whom the socket's mode lets in.
func admit(*net.UnixConn) (pid int32, err error) { return 0, nil }

func hungUp(*net.UnixConn) bool { return false }

func descriptors([]byte) []int { return nil }

func closeDescriptor(int) {}

func mapRegion(int, int64) ([]byte, error) {
	return nil, invalid(ReasonRegion, "regions need Linux: send data inline")
}

func unmapRegion([]byte) error { return nil }
