// Package cuda is a CUDA device: its memory, streams, events and kernels.
//
// It binds the driver through gorgonia.org/cu, and a few calls that cu lacks by
// itself. Only builds with the tag cuda, and with cgo, contain it; in others
// Open returns ErrNoDriver and the rest is never reached, so that callers need
// no tags. A binary with the tag starts without a driver as well: the archive
// that it is linked with (trampoline/trampoline.c) looks for libcuda.so.1 when
// the program starts. `make cuda` builds both.
//
// Threads. A CUDA context is current on a thread, not in a goroutine. Do runs a
// function on its caller's thread, to which it locks the goroutine, with the
// device's context current, and one at a time: so what a function issues is not
// mixed with what others do. (A goroutine on a thread of its own that serves
// all others would have to be woken for every call: measured, 6 us in place of
// 0.1.) A function should issue and not wait for the device, because others
// wait for their turn; Device.Wait waits for an event.
//
// Memory. Copies are asynchronous: both ends have to stay where they are until
// an event that was recorded behind the copy has happened. The host's end must
// not be Go memory, whose life the garbage collector decides: use HostAlloc, or
// memory that is mapped, and HostRegister.
//
// Failure. Errors say what was tried and how CUDA calls what happened. Some
// failures (a kernel's illegal access, an uncorrectable ECC error) leave the
// context unusable for as long as the process lives; they are ErrLost, and from
// then on every Do is.
package cuda
