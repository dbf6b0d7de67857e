//go:build cuda && cgo

package cudatest

/*
#cgo LDFLAGS: -ldl
#include <dlfcn.h>
#include <stddef.h>

// flip calls the emulated driver's mock_flip; -1 if the driver is another one.
static int flip(const void *bytes, size_t n, size_t bit) {
	void *driver = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_NOLOAD);
	int (*f)(const void *, size_t, size_t) = driver ? (int (*)(const void *, size_t, size_t))dlsym(driver, "mock_flip") : 0;
	int places = f ? f(bytes, n, bit) : -1;
	if (driver) dlclose(driver);
	return places;
}

// set calls its mock_set; -1 if the driver is another one.
static int set(const char *what, int on) {
	void *driver = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_NOLOAD);
	int (*f)(const char *, int) = driver ? (int (*)(const char *, int))dlsym(driver, "mock_set") : 0;
	int known = f ? f(what, on) : -1;
	if (driver) dlclose(driver);
	return known;
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
