package main

import (
	"runtime"
	"testing"
)

// TestSpread: goroutines run on several threads a core, and cores are still counted as they are; the environment's number stays.
func TestSpread(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(2))
	t.Setenv("GOMAXPROCS", "")
	if cores, threads := spread(), runtime.GOMAXPROCS(0); cores != 2 || threads != 2*threadsPerCore {
		t.Errorf("%d cores, %d threads", cores, threads)
	}
	runtime.GOMAXPROCS(3)
	t.Setenv("GOMAXPROCS", "3")
	if cores, threads := spread(), runtime.GOMAXPROCS(0); cores != 3 || threads != 3 {
		t.Errorf("%d cores, %d threads, where the environment says 3", cores, threads)
	}
}
