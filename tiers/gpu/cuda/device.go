package cuda

import (
	"context"
	"errors"
	"runtime"
	"sync"
	"time"
)

// Errors of this package, wrapped with what was tried.
var (
	// ErrNoDriver: this build has no CUDA, or the machine has no driver that works.
	ErrNoDriver = errors.New("no CUDA driver")
	// ErrNoDevice: the driver has no such device.
	ErrNoDevice = errors.New("no CUDA device")
	// ErrOutOfMemory: neither device nor pinned memory of that size is left. It changes nothing.
	ErrOutOfMemory = errors.New("out of device memory")
	// ErrLost: the device is gone for this process, with all that lay in its memory.
	ErrLost = errors.New("CUDA device lost")
	// ErrClosed: the device was closed.
	ErrClosed = errors.New("CUDA device closed")
)

// Ptr is an address in device memory. 0 is none.
type Ptr uint64

// Info describes a device.
type Info struct {
	Name string
	// Memory is all of the device's memory, in bytes.
	Memory int64
	// SMs is the number of streaming multiprocessors.
	SMs int
	// Major and Minor are the compute capability: 9, 0 is Hopper.
	Major, Minor int
	// SharedOptin is the most shared memory a block can have, in bytes, with Function.SetMaxShared.
	SharedOptin int
	// ClockKHz and MemoryClockKHz are peak rates, in kHz; 0 if the driver does not say.
	ClockKHz, MemoryClockKHz int
	// BusBits is the width of the memory bus, in bits.
	BusBits int
	// L2 is the size of the second-level cache, in bytes.
	L2 int
	// Driver is the CUDA version that the driver speaks: 13000 is 13.0.
	Driver int
}

// Devices returns the number of CUDA devices. The error is ErrNoDriver or
// ErrNoDevice where there is nothing to count.
func Devices() (int, error) { return devices() }

// Device is an opened device. All its methods are safe for concurrent use.
type Device struct {
	info Info
	cuda *Context
	turn chan struct{} // holds a token while no function of Do runs

	mu struct {
		sync.Mutex
		closed bool
		lost   error
	}
}

// Open opens the device with a number from 0. The context is the device's
// primary one: the driver shares it with whatever else in this process uses
// CUDA, and opening twice gives the same memory.
func Open(ordinal int) (*Device, error) {
	c, info, err := open(ordinal)
	if err != nil {
		return nil, err
	}
	d := &Device{info: info, cuda: c, turn: make(chan struct{}, 1)}
	d.turn <- struct{}{}
	return d, nil
}

// note remembers that the device is lost.
func (d *Device) note(err error) error {
	if errors.Is(err, ErrLost) {
		d.mu.Lock()
		defer d.mu.Unlock()
		if d.mu.lost == nil {
			d.mu.lost = err
		}
	}
	return err
}

// Err says why the device cannot be used any more: ErrLost, ErrClosed or nil.
func (d *Device) Err() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.mu.lost != nil {
		return d.mu.lost
	}
	if d.mu.closed {
		return ErrClosed
	}
	return nil
}

// Info describes the device.
func (d *Device) Info() Info { return d.info }

// Do runs f when no other function of Do runs, on a thread that has the
// device's context, and returns what f returns. The Context, and the methods of
// what it makes, are valid only inside Do. ctx ends the wait for one's turn;
// once f runs, Do returns when f does. f must not call Do or Close. After
// ErrLost every Do returns it, after Close ErrClosed.
func (d *Device) Do(ctx context.Context, f func(*Context) error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	select {
	case <-d.turn:
	case <-ctx.Done():
		return ctx.Err()
	}
	defer func() { d.turn <- struct{}{} }()
	if err := d.Err(); err != nil {
		return err
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := d.cuda.current(); err != nil {
		return d.note(err)
	}
	return d.note(f(d.cuda))
}

// Aside runs f as Do does, but at once, whoever else runs: for calls that take long in the driver, which is safe for concurrent use, and that have no place in an order.
func (d *Device) Aside(f func(*Context) error) error {
	if err := d.Err(); err != nil {
		return err
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := d.cuda.current(); err != nil {
		return d.note(err)
	}
	return d.note(f(d.cuda))
}

// How Wait asks: at first without a pause, because most answers take less than the shortest sleep, which is about a millisecond
// where nothing else is to do.
const (
	spin      = 2 * time.Millisecond
	firstNap  = 20 * time.Microsecond
	longerNap = 200 * time.Microsecond
)

// Wait waits until what was recorded before e has happened, while others Do. It
// asks again and again rather than blocking in the driver: so ctx can end it,
// and many goroutines may wait. If ctx ends it, what e stands for goes on. e
// must not be destroyed, nor the device closed, meanwhile.
func (d *Device) Wait(ctx context.Context, e Event) error {
	start, nap := time.Now(), firstNap
	for {
		if err := d.Err(); err != nil {
			return err
		}
		if done, err := d.happened(e); done || err != nil {
			return d.note(err)
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		if time.Since(start) < spin {
			runtime.Gosched()
			continue
		}
		time.Sleep(nap)
		nap = min(2*nap, longerNap)
	}
}

// happened asks once, without waiting for a turn: the driver is safe for concurrent use.
func (d *Device) happened(e Event) (bool, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := d.cuda.current(); err != nil {
		return false, err
	}
	return e.Query()
}

// Close releases the context, after the function that runs. What was made in
// the context has to be freed before. Closing twice does nothing, and nothing
// can be given back of a device that is lost.
func (d *Device) Close() error {
	<-d.turn
	defer func() { d.turn <- struct{}{} }()
	err := d.Err()
	d.mu.Lock()
	first := !d.mu.closed
	d.mu.closed = true
	d.mu.Unlock()
	if !first {
		return nil
	}
	if release := d.cuda.close(); err == nil {
		err = release
	}
	if errors.Is(err, ErrLost) {
		return nil
	}
	return err
}
