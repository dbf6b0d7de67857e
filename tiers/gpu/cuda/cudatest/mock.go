//go:build cuda && cgo

package cudatest

/*
#cgo LDFLAGS: -ldl
#include <dlfcn.h>
#include <stddef.h>

// find returns a function of the emulated driver; NULL if the driver is another one.
static void *find(const char *name) {
	void *driver = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_NOLOAD);
	void *f = driver ? dlsym(driver, name) : 0;
	if (driver) dlclose(driver);
	return f;
}

// flip calls mock_flip, set mock_set, and pageable mock_pageable_bytes; -1 if the driver is another one.
static int flip(const void *bytes, size_t n, size_t bit) {
	int (*f)(const void *, size_t, size_t) = (int (*)(const void *, size_t, size_t))find("mock_flip");
	return f ? f(bytes, n, bit) : -1;
}

static long long pageable(void) {
	unsigned long long (*f)(void) = (unsigned long long (*)(void))find("mock_pageable_bytes");
	return f ? (long long)f() : -1;
}

static int set(const char *what, int on) {
	int (*f)(const char *, int) = (int (*)(const char *, int))find("mock_set");
	return f ? f(what, on) : -1;
}
*/
import "C"

import (
	"testing"
	"unsafe"
)

// Flip flips a bit of bytes that lie in device memory, as failing memory would. A real device's memory cannot be asked to: the test is skipped.
func Flip(t testing.TB, bytes []byte, bit int) {
	t.Helper()
	switch n := C.flip(unsafe.Pointer(unsafe.SliceData(bytes)), C.size_t(len(bytes)), C.size_t(bit)); n {
	case 1:
	case -1:
		t.Skip("a real device's memory does not fail on purpose")
	default:
		t.Fatalf("%d bytes lie in %d places of device memory, not one", len(bytes), n)
	}
}

// Stall has the device tell of nothing that it does, as one that is stuck, or lets it go on. A real device cannot be asked to: the test is skipped.
func Stall(t testing.TB, on bool) {
	t.Helper()
	yes := C.int(0)
	if on {
		yes = 1
	}
	if C.set(&stalled[0], yes) != 1 {
		t.Skip("a real device does not get stuck on purpose")
	}
}

var stalled = [...]C.char{'s', 't', 'a', 'l', 'l', 'e', 'd', 0}

// Pageable returns how many bytes were copied from and to host memory that is not pinned. A real device does not say: the test is skipped.
func Pageable(t testing.TB) int64 {
	t.Helper()
	n := int64(C.pageable())
	if n < 0 {
		t.Skip("a real device does not tell what it copies from")
	}
	return n
}
