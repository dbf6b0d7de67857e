package filestest

import (
	"fmt"
	"hash/fnv"
	"io"
	"maps"
	"math/rand/v2"
	"slices"
	"syscall"
	"time"
)

// Faults says in what share of the operations a disk does what it should not.
// In Pebble's files only reads go wrong: a failed write ends the daemon there.
type Faults struct {
	Fail  float64 // EIO. A sync that fails forgets a part of what it should have made durable
	Full  float64 // of writes: ENOSPC
	Short float64 // of reads and writes: they end half way, and say so
	Slow  float64 // of reads: they take a millisecond
	Flip  float64 // of reads: one byte is another's. The next three of that file are right
	Drop  float64 // of writes: they succeed, and nothing was written
	Stray float64 // of writes: they succeed, and another place in the file was written
}

type faults struct {
	Faults
	seed    uint64
	rng     *rand.Rand     // of the operation at hand
	done    map[string]int // operations, by what they were
	counts  map[string]int
	lied    map[string]bool // files in which a write was dropped or went astray
	flipped map[inode]int   // reads that will be right, after one that was not
}

// Misbehave lets faults happen from now on; no Faults end it. Which they are
// follows from the seed, whatever goes on at once.
func (d *Disk) Misbehave(f Faults, seed uint64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	x := &d.mu.faults
	if x.counts == nil {
		x.done = map[string]int{}
		x.counts, x.lied, x.flipped = map[string]int{}, map[string]bool{}, map[inode]int{}
	}
	x.Faults, x.seed = f, seed
}

// Counts returns how often what went wrong.
func (d *Disk) Counts() map[string]int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return maps.Clone(d.mu.faults.counts)
}

// Lied returns the names of files in which a write was dropped or went astray.
func (d *Disk) Lied() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Sorted(maps.Keys(d.mu.faults.lied))
}

// roll begins an operation.
func (x *faults) roll(what, name string, off int64) {
	if x.Faults == (Faults{}) {
		return
	}
	key := fmt.Sprint(what, name, off)
	h := fnv.New64a()
	fmt.Fprint(h, key, x.done[key])
	x.done[key]++
	x.rng = rand.New(rand.NewPCG(x.seed, h.Sum64()))
}

// happens says whether a fault does, and counts it.
func (x *faults) happens(share float64, what string) bool {
	if share == 0 || x.rng.Float64() >= share {
		return false
	}
	x.counts[what]++
	return true
}

// failLocked begins an operation; the error is that of one that fails as a whole.
func (d *Disk) failLocked(what, name string, off int64, grows bool) error {
	x := &d.mu.faults
	x.roll(what, name, off)
	switch {
	case x.happens(x.Fail, what+" EIO"):
		return failure(what, name, syscall.EIO)
	case grows && x.happens(x.Full, what+" ENOSPC"):
		return failure(what, name, syscall.ENOSPC)
	}
	return nil
}

// faultyReadLocked spoils what was read into b.
func (f *file) faultyReadLocked(b []byte, off int64) (int, error) {
	x := &f.d.mu.faults
	if err := f.d.failLocked("read", f.name, off, false); err != nil {
		return 0, err
	}
	if len(b) > 1 && x.happens(x.Short, "short reads") {
		return len(b) / 2, io.ErrUnexpectedEOF
	}
	if x.flipped[f.id] > 0 {
		x.flipped[f.id]--
	} else if len(b) > 0 && x.happens(x.Flip, "reads of other bytes") {
		b[x.rng.IntN(len(b))] ^= byte(1 + x.rng.IntN(255))
		x.flipped[f.id] = 3
	}
	if x.happens(x.Slow, "slow reads") {
		f.d.mu.Unlock()
		time.Sleep(time.Millisecond)
		f.d.mu.Lock()
	}
	return len(b), nil
}

// faultyWriteLocked says how many of n bytes are written, and where: nowhere
// if off is negative.
func (f *file) faultyWriteLocked(n int, off int64) (int, int64, error) {
	if f.pebble {
		return n, off, nil
	}
	x := &f.d.mu.faults
	if err := f.d.failLocked("write", f.name, off, true); err != nil {
		return 0, 0, err
	}
	switch {
	case n > 1 && x.happens(x.Short, "short writes"):
		return n / 2, off, io.ErrShortWrite
	case x.happens(x.Drop, "dropped writes"):
		x.lied[f.name] = true
		return n, -1, nil
	case x.happens(x.Stray, "stray writes"):
		x.lied[f.name] = true
		const block = 4096
		return n, x.rng.Int64N(int64(len(f.d.mu.live.nodes[f.id].data))/block+1) * block, nil
	}
	return n, off, nil
}
