package daemon

import (
	"os"
	"runtime/debug"
)

// heapBeside is what the daemon needs beside open tails and the RAM tier's bookkeeping: messages and log
// records on their way, segments that are being made, the catalogue.
const heapBeside = 1 << 30

// limitMemory has the collector keep the Go heap near what it needs, instead of letting it grow to twice that: half
// as much again as open tails may take, a sixteenth of the RAM tier, whose slabs lie outside it, and heapBeside. GOMEMLIMIT,
// if it is set, counts instead.
func limitMemory(c *Config) {
	if os.Getenv("GOMEMLIMIT") != "" {
		return
	}
	debug.SetMemoryLimit(int64(c.Tail)*3/2 + int64(c.RAM)/16 + heapBeside)
}
