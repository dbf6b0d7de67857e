package nvme

import (
	"fmt"
	"os"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// queue is a context of the kernel's asynchronous I/O (io_setup(2)). Whoever
// has it submits many reads by one system call and waits for them by another,
// where plain reads take a thread each. Not safe for concurrent use.
type queue struct {
	id     uintptr // aio_context_t
	calls  []iocb
	given  []*iocb
	events []ioEvent
}

// iocb is struct iocb of linux/aio_abi.h; what is always 0 here has no name.
type iocb struct {
	data      uint64
	_         [2]uint32 // key and flags of the operation
	opcode    uint16
	_         int16 // priority
	file      uint32
	buf, size uint64
	offset    int64
	_         [2]uint64
}

const iocbRead = 0 // IOCB_CMD_PREAD

// submitAtOnce is how many reads one system call submits. The device begins
// when the call ends: with more of them it would wait for the last.
const submitAtOnce = 4

// ioEvent is struct io_event.
type ioEvent struct {
	data, obj uint64
	result, _ int64
}

// newQueue makes a queue of up to n reads under way. It fails where the kernel
// or a container's rules forbid it, or where the system has too many already
// (fs.aio-max-nr).
func newQueue(n int) (*queue, error) {
	q := &queue{}
	if _, _, e := unix.Syscall(unix.SYS_IO_SETUP, uintptr(n), uintptr(unsafe.Pointer(&q.id)), 0); e != 0 {
		return nil, fmt.Errorf("io_setup: %w", e)
	}
	q.events = make([]ioEvent, n)
	return q, nil
}

// close gives the context back. No read may be under way.
func (q *queue) close() error {
	if _, _, e := unix.Syscall(unix.SYS_IO_DESTROY, q.id, 0, 0); e != 0 {
		return fmt.Errorf("io_destroy: %w", e)
	}
	return nil
}

// add puts a read on the list of what submit gives to the kernel. number names
// it in its outcome. The caller keeps b and f until then.
func (q *queue) add(number int, f descriptor, b []byte, off int64) {
	q.calls = append(q.calls, iocb{data: uint64(number), opcode: iocbRead, file: uint32(f.Descriptor()),
		buf: uint64(uintptr(unsafe.Pointer(unsafe.SliceData(b)))), size: uint64(len(b)), offset: off})
}

// submit gives the listed reads to the kernel, and returns how many of them, to
// the last, it did not take. The list is empty then.
func (q *queue) submit() (left int) {
	for i := range q.calls {
		q.given = append(q.given, &q.calls[i])
	}
	n := 0
	for n < len(q.given) {
		took, _, e := unix.Syscall(unix.SYS_IO_SUBMIT, q.id, uintptr(min(submitAtOnce, len(q.given)-n)), uintptr(unsafe.Pointer(&q.given[n])))
		if e == unix.EINTR {
			continue
		}
		if e != 0 || took == 0 {
			break
		}
		n += int(took)
	}
	left = len(q.given) - n
	q.calls, q.given = q.calls[:0], q.given[:0]
	return left
}

// wait waits until at least so many reads are done, and appends the outcomes of
// all that are.
func (q *queue) wait(out []outcome, least int) ([]outcome, error) {
	for {
		got, _, e := unix.Syscall6(unix.SYS_IO_GETEVENTS, q.id, uintptr(least), uintptr(len(q.events)), uintptr(unsafe.Pointer(&q.events[0])), 0, 0)
		if e == unix.EINTR {
			continue
		}
		if e != 0 {
			return out, os.NewSyscallError("io_getevents", e)
		}
		for _, ev := range q.events[:got] {
			o := outcome{read: int(ev.data), n: int(ev.result)}
			if ev.result < 0 {
				o.n, o.err = 0, os.NewSyscallError("read", syscall.Errno(-ev.result))
			}
			out = append(out, o)
		}
		return out, nil
	}
}
