//go:build !linux

package nvme

import "errors"

// queue is the kernel's asynchronous I/O, which only Linux has: elsewhere reads
// take a thread each.
type queue struct{}

func newQueue(int) (*queue, error) { return nil, errors.ErrUnsupported }

func (*queue) close() error                       { return nil }
func (*queue) add(int, descriptor, []byte, int64) {}
func (*queue) submit() int                        { return 0 }

func (*queue) wait(out []outcome, _ int) ([]outcome, error) { return out, errors.ErrUnsupported }
