package main

import (
	"runtime"
	"testing"
)

// TestSpread: goroutines run on several threads a core, and cores are still counted as they are; the environment's number stays.
func TestSpread(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(0))
	t.Setenv("GOMAXPROCS", "")
	for n, want := range map[int]int{1: leastThreads, 2: leastThreads, 32: 32 * threadsPerCore} {
		runtime.GOMAXPROCS(n)
		if cores, threads := spread(), runtime.GOMAXPROCS(0); cores != n || threads != want {
			t.Errorf("%d cores, %d threads, want %d and %d", cores, threads, n, want)
		}
	}
	runtime.GOMAXPROCS(3)
	t.Setenv("GOMAXPROCS", "3")
	if cores, threads := spread(), runtime.GOMAXPROCS(0); cores != 3 || threads != 3 {
		t.Errorf("%d cores, %d threads, where the environment says 3", cores, threads)
	}
}
