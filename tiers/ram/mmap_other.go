//go:build unix && !linux

package ram

func adviseHuge([]byte) {}
