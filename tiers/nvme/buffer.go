package nvme

import (
	"math/bits"
	"sync"
	"sync/atomic"
	"unsafe"

	"kvtier/tiers"
)

// buffer is memory for direct I/O: whole blocks, aligned to a block. refs
// counts the pins that read it; the last one puts it back into its pool.
type buffer struct {
	bytes []byte
	block []byte // what bytes is cut from: a power of two of blocks
	refs  atomic.Int32
}

// pools holds buffers by the logarithm of their number of blocks. Larger ones are not pooled.
var pools [13]sync.Pool

// newBuffer returns n bytes, n a multiple of a block. They are not cleared.
// The caller has the only reference.
func newBuffer(n int) *buffer {
	class := bits.Len(uint(max(n/tiers.BlockSize, 1) - 1))
	var b *buffer
	if class < len(pools) {
		b, _ = pools[class].Get().(*buffer)
	}
	if b == nil {
		size := tiers.BlockSize << class
		if class >= len(pools) {
			size = n
		}
		raw := make([]byte, size+tiers.BlockSize)
		skip := -uintptr(unsafe.Pointer(unsafe.SliceData(raw))) % tiers.BlockSize
		b = &buffer{block: raw[skip : int(skip)+size]}
	}
	b.bytes = b.block[:n:n]
	b.refs.Store(1)
	return b
}

// free gives a reference back.
func (b *buffer) free() {
	if b.refs.Add(-1) > 0 {
		return
	}
	if class := bits.Len(uint(len(b.block)/tiers.BlockSize - 1)); class < len(pools) {
		b.bytes = nil
		pools[class].Put(b)
	}
}
