package cuda

import (
	"context"
	"errors"
	"fmt"
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
	info  Info
	cuda  *Context
	tasks chan task
	quit  chan struct{} // closed by Close
	gone  chan struct{} // closed by the executor when it ends

	mu struct {
		sync.Mutex
		closed bool
		lost   error
		close  error
	}
}

// task is a call of Do. done has room for the result, so the executor never waits for a caller.
type task struct {
	f    func(*Context) error
	done chan error
}

// Open opens the device with a number from 0 and starts its executor. The
// context is the device's primary one: the driver shares it with whatever
// else in this process uses CUDA, and opening twice gives the same memory.
func Open(ordinal int) (*Device, error) {
	d := &Device{tasks: make(chan task), quit: make(chan struct{}), gone: make(chan struct{})}
	opened := make(chan error)
	go d.execute(ordinal, opened)
	if err := <-opened; err != nil {
		return nil, fmt.Errorf("cuda: open device %d: %w", ordinal, err)
	}
	return d, nil
}

// execute is the executor: it owns the context and the thread on which that is current.
func (d *Device) execute(ordinal int, opened chan<- error) {
	defer close(d.gone)
	runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
	c, info, err := open(ordinal)
	d.cuda, d.info = c, info
	opened <- err
	if err != nil {
		return
	}
	for {
		select {
		case t := <-d.tasks:
			d.run(t)
		case <-d.quit:
			err := c.close()
			d.mu.Lock()
			defer d.mu.Unlock()
			if d.mu.lost == nil { // nothing can be given back of a device that is lost
				d.mu.close = err
			}
			return
		}
	}
}

// run runs one task. Also a function that ends its goroutine gets its caller an answer.
func (d *Device) run(t task) {
	err := fmt.Errorf("%w: a function of Do ended the executor", ErrLost)
	defer func() { t.done <- d.note(err) }()
	err = t.f(d.cuda)
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

// Do runs f on the executor and returns what f returns. The Context, and all
// methods of what it makes, are valid only inside Do, but for what is said of
// Wait. ctx ends the wait for the executor; once f runs, Do returns when f
// does. f must not call Do or Close. After ErrLost every Do returns it, after
// Close ErrClosed.
func (d *Device) Do(ctx context.Context, f func(*Context) error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := d.Err(); err != nil {
		return err
	}
	t := task{f, make(chan error, 1)}
	select {
	case d.tasks <- t:
		return <-t.done
	case <-ctx.Done():
		return ctx.Err()
	case <-d.gone:
		return d.Err()
	}
}

// How Wait asks: at first without a pause, because most kernels are shorter than the shortest sleep.
const (
	spin      = 100 * time.Microsecond
	firstNap  = 20 * time.Microsecond
	longerNap = 200 * time.Microsecond
)

// Wait waits until what was recorded before e has happened, without occupying
// the executor. It asks again and again, on the caller's thread, rather than
// blocking in the driver: so ctx can end it, and many goroutines may wait. If
// ctx ends it, what e stands for goes on. e must not be destroyed meanwhile.
func (d *Device) Wait(ctx context.Context, e Event) error {
	start, nap := time.Now(), firstNap
	for {
		if err := d.Err(); err != nil {
			return err
		}
		if done, err := d.cuda.poll(e); done || err != nil {
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

// Close ends the executor, after the function that it runs, and releases the
// context. What was made in the context has to be freed before. Closing twice
// does nothing.
func (d *Device) Close() error {
	d.mu.Lock()
	first := !d.mu.closed
	d.mu.closed = true
	d.mu.Unlock()
	if first {
		close(d.quit)
	}
	<-d.gone
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.mu.close
}
