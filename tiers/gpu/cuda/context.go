//go:build cuda && cgo

package cuda

/*
#include <cuda.h>
*/
import "C"

import (
	"bytes"
	"errors"
	"runtime"
	"time"
	"unsafe"

	"gorgonia.org/cu"
)

// Context is what functions of Device.Do work with.
type Context struct {
	device cu.Device
	cu     cu.CUContext
}

func devices() (int, error) {
	n, err := cu.NumDevices()
	return n, check(err, "count devices")
}

// open retains the primary context of a device.
func open(ordinal int) (*Context, Info, error) {
	dev, err := cu.GetDevice(ordinal)
	if err != nil {
		return nil, Info{}, check(err, "find device %d", ordinal)
	}
	info, err := describe(dev)
	if err != nil {
		return nil, Info{}, err
	}
	primary, err := dev.RetainPrimaryCtx()
	if err != nil {
		return nil, Info{}, check(err, "make the context of device %d", ordinal)
	}
	return &Context{dev, primary}, info, nil
}

// current makes the context current on the calling thread.
func (c *Context) current() error {
	return check(cu.SetCurrentContext(c.cu), "make the context current")
}

func (c *Context) close() error {
	return check(c.device.ReleasePrimaryCtx(), "release the context")
}

func describe(dev cu.Device) (info Info, err error) {
	if info.Name, err = dev.Name(); err != nil {
		return info, check(err, "ask for the name of a device")
	}
	if info.Memory, err = dev.TotalMem(); err != nil {
		return info, check(err, "ask for the memory of a device")
	}
	for _, a := range []struct {
		to *int
		id cu.DeviceAttribute
	}{
		{&info.SMs, cu.MultiprocessorCount},
		{&info.Major, cu.ComputeCapabilityMajor},
		{&info.Minor, cu.ComputeCapabilityMinor},
		{&info.SharedOptin, C.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN},
		{&info.ClockKHz, cu.ClockRate},
		{&info.MemoryClockKHz, cu.MemoryClockRate},
		{&info.BusBits, cu.GlobalMemoryBusWidth},
		{&info.L2, cu.L2CacheSize},
	} {
		if *a.to, err = dev.Attribute(a.id); err != nil {
			return info, check(err, "ask for attribute %d of a device", a.id)
		}
	}
	info.Driver = cu.Version()
	return info, nil
}

// Module is code that was loaded.
type Module struct{ m cu.Module }

// Load compiles PTX for the device and loads it. Where the compiler complains,
// its words are in the error.
func (c *Context) Load(ptx []byte) (Module, error) {
	log := &cu.JITErrorLogBuffer{Buffer: make([]byte, 16<<10)}
	m, err := cu.LoadDataEx(string(ptx), log)
	runtime.KeepAlive(log) // cu hands its address on as a number
	if err != nil {
		words, _, _ := bytes.Cut(log.Buffer, []byte{0})
		if words = bytes.TrimSpace(words); len(words) > 0 {
			return Module{}, check(err, "load %d bytes of PTX: %s", len(ptx), words)
		}
		return Module{}, check(err, "load %d bytes of PTX", len(ptx))
	}
	return Module{m}, nil
}

// Unload unloads the code. None of its kernels may be running.
func (m Module) Unload() error { return check(m.m.Unload(), "unload a module") }

// Function finds a kernel.
func (m Module) Function(name string) (Function, error) {
	f, err := m.m.Function(name)
	return Function{f, name}, check(err, "find kernel %s", name)
}

// Function is a kernel.
type Function struct {
	f    cu.Function
	name string
}

// handle is cu's handle, which cu does not export.
func (f Function) handle() C.CUfunction { return *(*C.CUfunction)(unsafe.Pointer(&f.f)) }

// SetMaxShared allows launches with so many bytes of dynamic shared memory;
// without it 48 KiB are allowed. The limit is Info.SharedOptin less what the kernel has by itself.
func (f Function) SetMaxShared(bytes int) error {
	r := C.cuFuncSetAttribute(f.handle(), C.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, C.int(bytes))
	return check(result(r), "allow %s %d bytes of shared memory", f.name, bytes)
}

// Registers returns the registers that a thread uses.
func (f Function) Registers() (int, error) { return f.attribute(cu.NumRegs, "registers") }

// SharedBytes returns the bytes of static shared memory that a block uses.
func (f Function) SharedBytes() (int, error) { return f.attribute(cu.SharedSizeBytes, "shared memory") }

// LocalBytes returns the bytes of local memory that a thread uses: what did not fit its registers.
func (f Function) LocalBytes() (int, error) { return f.attribute(cu.LocalSizeBytes, "local memory") }

func (f Function) attribute(id cu.FunctionAttribute, what string) (int, error) {
	n, err := f.f.Attribute(id)
	return n, check(err, "ask for the %s of %s", what, f.name)
}

// BlocksPerSM returns how many blocks of so many threads, and bytes of dynamic
// shared memory each, a multiprocessor holds at a time.
func (f Function) BlocksPerSM(threads, shared int) (int, error) {
	n, err := f.f.MaxActiveBlocksPerMultiProcessor(threads, int64(shared))
	return n, check(err, "ask for the blocks of %s", f.name)
}

// Launch starts a kernel in a stream: grid and block in x, y, z, and bytes of
// dynamic shared memory a block. Each argument has 8 bytes, of which the kernel
// takes those that its parameter has: addresses and integers as they are,
// floats by math.Float32bits. There have to be as many as the kernel has parameters.
func (c *Context) Launch(f Function, grid, block [3]int, shared int, s Stream, args ...uint64) error {
	ptrs := make([]unsafe.Pointer, len(args))
	for i := range args {
		ptrs[i] = unsafe.Pointer(&args[i])
	}
	err := f.f.Launch(grid[0], grid[1], grid[2], block[0], block[1], block[2], shared, s.s, ptrs)
	return check(err, "launch %s, grid %v, block %v, %d bytes of shared memory", f.name, grid, block, shared)
}

// Stream is a queue of work for the device. What lies in different streams may run at the same time.
type Stream struct{ s cu.Stream }

// NewStream makes a stream, independent of the default one.
func (c *Context) NewStream() (Stream, error) {
	s, err := cu.MakeStream(cu.NonBlocking)
	return Stream{s}, check(err, "make a stream")
}

// Destroy gives the stream back. Work that is in it still runs.
func (s Stream) Destroy() error { return check(s.s.Destroy(), "destroy a stream") }

// Synchronize waits until all work in the stream is done. Others wait for their turn meanwhile: see Device.Wait.
func (s Stream) Synchronize() error { return check(s.s.Synchronize(), "wait for a stream") }

// Query says whether all work in the stream is done.
func (s Stream) Query() (bool, error) { return done(s.s.Query(), "ask a stream") }

// Wait lets what comes next in the stream wait for what was recorded before e. It returns at once.
func (s Stream) Wait(e Event) error { return check(s.s.Wait(e.e, 0), "let a stream wait") }

// Event is a point in a stream.
type Event struct{ e cu.Event }

// NewEvent makes an event. Elapsed needs events with timing; others are cheaper.
func (c *Context) NewEvent(timing bool) (Event, error) {
	flags := cu.DisableTiming
	if timing {
		flags = cu.DefaultEvent
	}
	e, err := cu.MakeEvent(flags)
	return Event{e}, check(err, "make an event")
}

// Destroy gives the event back.
func (e Event) Destroy() error { return check(cu.DestroyEvent(&e.e), "destroy an event") }

// Record makes the event the point that the stream has come to when it is done with what it holds now.
func (e Event) Record(s Stream) error { return check(e.e.Record(s.s), "record an event") }

// Query says whether what was recorded before has happened. So it has for an event that was never recorded.
func (e Event) Query() (bool, error) { return done(e.e.Query(), "ask an event") }

// Synchronize waits until what was recorded before has happened. Others wait for their turn meanwhile: see Device.Wait.
func (e Event) Synchronize() error { return check(e.e.Synchronize(), "wait for an event") }

// Elapsed returns the time between two events with timing, both of which have happened.
func Elapsed(a, b Event) (time.Duration, error) {
	ms, err := a.e.Elapsed(b.e)
	return time.Duration(ms * float64(time.Millisecond)), check(err, "ask for the time between events")
}

// done tells "not yet" from failure.
func done(err error, what string) (bool, error) {
	if errors.Is(err, cu.NotReady) {
		return false, nil
	}
	return err == nil, check(err, "%s", what)
}

// Alloc allocates device memory, aligned to 256 bytes or more, with anything in it.
func (c *Context) Alloc(bytes int) (Ptr, error) {
	p, err := cu.MemAlloc(int64(bytes))
	return Ptr(p), check(err, "allocate %d bytes of device memory", bytes)
}

// Free gives device memory back, when all work that was issued is done.
func (c *Context) Free(p Ptr) error { return check(cu.MemFree(cu.DevicePtr(p)), "free device memory") }

// MemInfo returns how many bytes of device memory are free, and how many there are.
func (c *Context) MemInfo() (free, total int64, err error) {
	free, total, err = cu.MemInfo()
	return free, total, check(err, "ask for free memory")
}

// HostAlloc allocates pinned host memory: copies from and to it run beside
// everything else. It lies outside the Go heap until HostFree.
func (c *Context) HostAlloc(bytes int) ([]byte, error) {
	var p unsafe.Pointer
	if err := result(C.cuMemHostAlloc(&p, C.size_t(bytes), C.CU_MEMHOSTALLOC_PORTABLE)); err != nil {
		return nil, check(err, "allocate %d bytes of pinned memory", bytes)
	}
	return unsafe.Slice((*byte)(p), bytes), nil
}

// HostFree gives back what HostAlloc returned.
func (c *Context) HostFree(b []byte) error {
	return check(cu.MemFreeHost(unsafe.Pointer(unsafe.SliceData(b))), "free pinned memory")
}

// HostRegister pins memory that exists already. It must lie outside the Go heap, in whole pages.
func (c *Context) HostRegister(b []byte) error {
	r := C.cuMemHostRegister(unsafe.Pointer(unsafe.SliceData(b)), C.size_t(len(b)), C.CU_MEMHOSTREGISTER_PORTABLE)
	return check(result(r), "pin %d bytes", len(b))
}

// HostUnregister undoes HostRegister, before the memory goes.
func (c *Context) HostUnregister(b []byte) error {
	return check(result(C.cuMemHostUnregister(unsafe.Pointer(unsafe.SliceData(b)))), "unpin %d bytes", len(b))
}

// CopyToDevice copies src to device memory, in a stream: see the package's words on memory.
func (c *Context) CopyToDevice(dst Ptr, src []byte, s Stream) error {
	if len(src) == 0 {
		return nil
	}
	err := cu.MemcpyHtoDAsync(cu.DevicePtr(dst), unsafe.Pointer(unsafe.SliceData(src)), int64(len(src)), s.s)
	return check(err, "copy %d bytes to the device", len(src))
}

// CopyToHost copies len(dst) bytes of device memory, in a stream: see the package's words on memory.
func (c *Context) CopyToHost(dst []byte, src Ptr, s Stream) error {
	if len(dst) == 0 {
		return nil
	}
	err := cu.MemcpyDtoHAsync(unsafe.Pointer(unsafe.SliceData(dst)), cu.DevicePtr(src), int64(len(dst)), s.s)
	return check(err, "copy %d bytes from the device", len(dst))
}

// CopyOnDevice copies n bytes of device memory, in a stream. The two ranges must not overlap.
func (c *Context) CopyOnDevice(dst, src Ptr, n int, s Stream) error {
	if n == 0 {
		return nil
	}
	err := cu.MemcpyDtoDAsync(cu.DevicePtr(dst), cu.DevicePtr(src), int64(n), s.s)
	return check(err, "copy %d bytes on the device", n)
}

// Set sets n bytes of device memory to b, in a stream.
func (c *Context) Set(dst Ptr, b byte, n int, s Stream) error {
	if n == 0 {
		return nil
	}
	return check(cu.MemsetD8Async(cu.DevicePtr(dst), b, int64(n), s.s), "set %d bytes of device memory", n)
}

// Handle names an allocation to other processes on this machine.
type Handle [64]byte

// MemHandle returns the handle of the whole allocation that Alloc returned p for.
func (c *Context) MemHandle(p Ptr) (Handle, error) {
	var h C.CUipcMemHandle
	if err := result(C.cuIpcGetMemHandle(&h, C.CUdeviceptr(p))); err != nil {
		return Handle{}, check(err, "get a handle of device memory")
	}
	return *(*Handle)(unsafe.Pointer(&h)), nil
}

// OpenMemHandle returns the address that another process's allocation has in
// this one, until CloseMemHandle. A process cannot open its own.
func (c *Context) OpenMemHandle(h Handle) (Ptr, error) {
	var p C.CUdeviceptr
	r := C.cuIpcOpenMemHandle(&p, *(*C.CUipcMemHandle)(unsafe.Pointer(&h)), C.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS)
	return Ptr(p), check(result(r), "open a handle of device memory")
}

// CloseMemHandle gives up what OpenMemHandle returned. The memory stays with who allocated it.
func (c *Context) CloseMemHandle(p Ptr) error {
	return check(result(C.cuIpcCloseMemHandle(C.CUdeviceptr(p))), "close a handle of device memory")
}

// AllocationBytes returns how many bytes there are from p, where an allocation begins, to its end.
func (c *Context) AllocationBytes(p Ptr) (int64, error) {
	var base C.CUdeviceptr
	var n C.size_t
	if err := result(C.cuMemGetAddressRange(&base, &n, C.CUdeviceptr(p))); err != nil {
		return 0, check(err, "ask for an allocation's size")
	}
	return int64(n) - int64(p-Ptr(base)), nil
}
