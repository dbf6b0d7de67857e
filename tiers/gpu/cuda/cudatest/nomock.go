//go:build !(cuda && cgo)

package cudatest

import "testing"

// Flip skips the test: without CUDA there is no device memory.
func Flip(t testing.TB, _ []byte, _ int) { t.Skip("this build has no GPU support") }

// Stall skips the test: there is no device.
func Stall(t testing.TB, _ bool) { t.Skip("this build has no GPU support") }

// Pageable skips the test: there is no device.
func Pageable(t testing.TB) int64 {
	t.Helper()
	t.Skip("this build has no GPU support")
	return 0
}
