//go:build cuda && cgo

package cuda

/*
#cgo CFLAGS: -I${SRCDIR}/include
#cgo linux LDFLAGS: -ldl
#include <cuda.h>
*/
import "C"

import (
	"errors"
	"fmt"

	"gorgonia.org/cu"
)

// errorKinds says which of CUDA's errors are which of this package's. After
// those that are ErrLost, CUDA's reference says, "the process must be terminated".
var errorKinds = map[C.CUresult]error{
	C.CUDA_ERROR_STUB_LIBRARY:                   ErrNoDriver,
	C.CUDA_ERROR_NOT_INITIALIZED:                ErrNoDriver,
	C.CUDA_ERROR_SYSTEM_DRIVER_MISMATCH:         ErrNoDriver,
	C.CUDA_ERROR_SYSTEM_NOT_READY:               ErrNoDriver,
	C.CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE: ErrNoDriver,
	C.CUDA_ERROR_NO_DEVICE:                      ErrNoDevice,
	C.CUDA_ERROR_INVALID_DEVICE:                 ErrNoDevice,
	C.CUDA_ERROR_OUT_OF_MEMORY:                  ErrOutOfMemory,
	C.CUDA_ERROR_DEINITIALIZED:                  ErrLost,
	C.CUDA_ERROR_ECC_UNCORRECTABLE:              ErrLost,
	C.CUDA_ERROR_NVLINK_UNCORRECTABLE:           ErrLost,
	C.CUDA_ERROR_ILLEGAL_ADDRESS:                ErrLost,
	C.CUDA_ERROR_LAUNCH_TIMEOUT:                 ErrLost,
	C.CUDA_ERROR_CONTEXT_IS_DESTROYED:           ErrLost,
	C.CUDA_ERROR_ASSERT:                         ErrLost,
	C.CUDA_ERROR_HARDWARE_STACK_ERROR:           ErrLost,
	C.CUDA_ERROR_ILLEGAL_INSTRUCTION:            ErrLost,
	C.CUDA_ERROR_MISALIGNED_ADDRESS:             ErrLost,
	C.CUDA_ERROR_INVALID_ADDRESS_SPACE:          ErrLost,
	C.CUDA_ERROR_INVALID_PC:                     ErrLost,
	C.CUDA_ERROR_LAUNCH_FAILED:                  ErrLost,
	C.CUDA_ERROR_CONTAINED:                      ErrLost,
	C.CUDA_ERROR_UNKNOWN:                        ErrLost, // what a device that fell off its bus gives
}

// result makes cu's kind of error of what a call of our own returned. The type
// of cu's errors has no name outside cu, but it has values.
func result(r C.CUresult) error {
	if r == C.CUDA_SUCCESS {
		return nil
	}
	return of(cu.Success, int(r))
}

func of[T ~int](_ T, code int) T { return T(code) }

// check wraps an error of cu: what was tried, CUDA's own name of what happened,
// and which of this package's errors that is.
func check(err error, format string, args ...any) error {
	if err == nil {
		return nil
	}
	tried := fmt.Sprintf(format, args...)
	code := cu.Success
	if !errors.As(err, &code) {
		return fmt.Errorf("cuda: %s: %w", tried, err)
	}
	name := nameOf(C.CUresult(code))
	if kind := errorKinds[C.CUresult(code)]; kind != nil {
		return fmt.Errorf("cuda: %s: %s: %w", tried, name, kind)
	}
	return fmt.Errorf("cuda: %s: %s", tried, name)
}

// nameOf returns CUDA's name of an error, as the driver has it.
func nameOf(r C.CUresult) string {
	if r == C.CUDA_ERROR_STUB_LIBRARY { // only the trampolines say so
		return "libcuda.so.1 not found"
	}
	var name *C.char
	if C.cuGetErrorName(r, &name) == C.CUDA_SUCCESS && name != nil {
		return C.GoString(name)
	}
	return of(cu.Success, int(r)).Error() // no driver, or one that does not know
}
