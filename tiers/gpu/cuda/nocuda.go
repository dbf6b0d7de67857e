//go:build !(cuda && cgo)

package cuda

import (
	"fmt"
	"time"
)

// A build without CUDA has the same names, so that callers need no tags. Open
// never returns a Device, so nothing below is ever reached.

var errBuild = fmt.Errorf("%w: this build has no GPU support (see `make cuda`)", ErrNoDriver)

func devices() (int, error)            { return 0, errBuild }
func open(int) (*Context, Info, error) { return nil, Info{}, errBuild }
func (*Context) close() error          { return errBuild }
func (*Context) current() error        { return errBuild }

type (
	// Context is what functions of Device.Do work with.
	Context struct{}
	// Module is code that was loaded.
	Module struct{}
	// Function is a kernel.
	Function struct{}
	// Stream is a queue of work for the device.
	Stream struct{}
	// Event is a point in a stream.
	Event struct{}
	// Handle names an allocation to other processes on this machine.
	Handle [64]byte
)

func (*Context) Load([]byte) (Module, error)                                        { return Module{}, errBuild }
func (Module) Unload() error                                                        { return errBuild }
func (Module) Function(string) (Function, error)                                    { return Function{}, errBuild }
func (Function) SetMaxShared(int) error                                             { return errBuild }
func (Function) Registers() (int, error)                                            { return 0, errBuild }
func (Function) SharedBytes() (int, error)                                          { return 0, errBuild }
func (Function) LocalBytes() (int, error)                                           { return 0, errBuild }
func (Function) BlocksPerSM(_, _ int) (int, error)                                  { return 0, errBuild }
func (*Context) Launch(_ Function, _, _ [3]int, _ int, _ Stream, _ ...uint64) error { return errBuild }

func (*Context) NewStream() (Stream, error) { return Stream{}, errBuild }
func (Stream) Destroy() error               { return errBuild }
func (Stream) Synchronize() error           { return errBuild }
func (Stream) Query() (bool, error)         { return false, errBuild }
func (Stream) Wait(Event) error             { return errBuild }

func (*Context) NewEvent(bool) (Event, error) { return Event{}, errBuild }
func (Event) Destroy() error                  { return errBuild }
func (Event) Record(Stream) error             { return errBuild }
func (Event) Query() (bool, error)            { return false, errBuild }
func (Event) Synchronize() error              { return errBuild }

// Elapsed returns the time between two events.
func Elapsed(_, _ Event) (time.Duration, error) { return 0, errBuild }

func (*Context) Alloc(int) (Ptr, error)                       { return 0, errBuild }
func (*Context) Free(Ptr) error                               { return errBuild }
func (*Context) MemInfo() (free, total int64, err error)      { return 0, 0, errBuild }
func (*Context) HostAlloc(int) ([]byte, error)                { return nil, errBuild }
func (*Context) HostFree([]byte) error                        { return errBuild }
func (*Context) HostRegister([]byte) error                    { return errBuild }
func (*Context) HostUnregister([]byte) error                  { return errBuild }
func (*Context) CopyToDevice(Ptr, []byte, Stream) error       { return errBuild }
func (*Context) CopyToHost([]byte, Ptr, Stream) error         { return errBuild }
func (*Context) CopyOnDevice(_, _ Ptr, _ int, _ Stream) error { return errBuild }
func (*Context) Set(Ptr, byte, int, Stream) error             { return errBuild }
func (*Context) MemHandle(Ptr) (Handle, error)                { return Handle{}, errBuild }
func (*Context) OpenMemHandle(Handle) (Ptr, error)            { return 0, errBuild }
func (*Context) CloseMemHandle(Ptr) error                     { return errBuild }
func (*Context) AllocationBytes(Ptr) (int64, error)           { return 0, errBuild }
