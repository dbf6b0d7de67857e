package nvme

import (
	"fmt"
	"slices"

	"kvtier/tiers"
	"kvtier/tiers/files"
)

// descriptor is what a File can offer besides: the number under which the
// kernel knows it. Then, if it is Direct, reads may go around ReadAt. Through
// the page cache the kernel would wait for each where it is submitted.
type descriptor interface {
	Descriptor() uintptr
}

// extent is a preallocated file and its free runs. Tier.mu guards it, except
// for file and direct, which do not change.
type extent struct {
	number uint32
	file   files.File
	direct descriptor // of file, where reads of it can go through a queue; else nil
	blocks uint32
	free   []Run // ascending, never touching each other; Extent is not set
	dirty  bool  // written since the last Sync
}

// ExtentName is the name of an extent's file.
func ExtentName(number uint32) string { return fmt.Sprintf("extent-%06d.kv", number) }

// extentNumber is the inverse of ExtentName.
func extentNumber(name string) (number uint32, ok bool) {
	if _, err := fmt.Sscanf(name, "extent-%d.kv", &number); err != nil {
		return 0, false
	}
	return number, number > 0 && ExtentName(number) == name
}

// IsExtentName says whether a file of that name is an extent.
func IsExtentName(name string) bool {
	_, ok := extentNumber(name)
	return ok
}

func newExtent(number uint32, f files.File, size int64) *extent {
	x := &extent{number: number, file: f, blocks: uint32(size / tiers.BlockSize)}
	if f.Direct() {
		x.direct, _ = f.(descriptor)
	}
	if x.blocks > 0 {
		x.free = []Run{{First: 0, Blocks: x.blocks}}
	}
	return x
}

func (x *extent) bytes() int64 { return int64(x.blocks) * tiers.BlockSize }

// empty says that nothing lies in the extent.
func (x *extent) empty() bool {
	return x.blocks == 0 || len(x.free) == 1 && x.free[0].Blocks == x.blocks
}

// alloc takes the first free run of n blocks.
func (x *extent) alloc(n uint32) (Run, bool) {
	for i, f := range x.free {
		if f.Blocks >= n {
			r := Run{x.number, f.First, n}
			x.take(i, r)
			return r, true
		}
	}
	return Run{}, false
}

// claim takes exactly r, if it is free.
func (x *extent) claim(r Run) bool {
	for i, f := range x.free {
		if f.First <= r.First && uint64(r.First)+uint64(r.Blocks) <= uint64(f.First)+uint64(f.Blocks) {
			x.take(i, r)
			return true
		}
	}
	return false
}

// take cuts r out of the free run i.
func (x *extent) take(i int, r Run) {
	f := x.free[i]
	var rest []Run
	if r.First > f.First {
		rest = append(rest, Run{First: f.First, Blocks: r.First - f.First})
	}
	if end := f.First + f.Blocks; r.First+r.Blocks < end {
		rest = append(rest, Run{First: r.First + r.Blocks, Blocks: end - r.First - r.Blocks})
	}
	x.free = slices.Replace(x.free, i, i+1, rest...)
}

// release gives r back and joins it with free neighbours.
func (x *extent) release(r Run) {
	i, _ := slices.BinarySearchFunc(x.free, r.First, func(f Run, first uint32) int { return int(f.First) - int(first) })
	r.Extent = 0
	if i < len(x.free) && r.First+r.Blocks == x.free[i].First {
		r.Blocks += x.free[i].Blocks
		x.free = slices.Delete(x.free, i, i+1)
	}
	if i > 0 && x.free[i-1].First+x.free[i-1].Blocks == r.First {
		x.free[i-1].Blocks += r.Blocks
		return
	}
	x.free = slices.Insert(x.free, i, r)
}
