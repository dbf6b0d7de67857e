package compress

import (
	"encoding/binary"
	"fmt"

	"github.com/pierrec/lz4/v4"
)

const (
	blobHeader = 5 // kind, length of the content
	blobRaw    = 0
	blobLZ4    = 1
	// lz4Ratio is more than an LZ4 block can expand by: a byte of a match's length adds 255.
	lz4Ratio = 256
)

// PackBlob compresses b if that gains: a byte of kind (0 as it is, 1 an LZ4
// block), the length of b as 32 bits, then the content. b is below 2 GiB.
func PackBlob(b []byte) []byte {
	out := make([]byte, blobHeader+len(b))
	binary.LittleEndian.PutUint32(out[1:], uint32(len(b)))
	// The room is that of b: what does not fit in it does not gain.
	n, err := lz4.CompressBlock(b, out[blobHeader:], nil)
	if err == nil && n > 0 && n < len(b) {
		out[0] = blobLZ4
		return out[:blobHeader+n]
	}
	out[0] = blobRaw
	copy(out[blobHeader:], b)
	return out
}

// UnpackBlob returns what PackBlob was given, of at most max bytes. The error is
// ErrCorrupt.
func UnpackBlob(b []byte, max int) ([]byte, error) {
	if len(b) < blobHeader {
		return nil, fmt.Errorf("blob of %d bytes: %w", len(b), ErrCorrupt)
	}
	kind, n, body := b[0], int(binary.LittleEndian.Uint32(b[1:])), b[blobHeader:]
	switch {
	case n > max:
		return nil, fmt.Errorf("blob of length %d, at most %d: %w", n, max, ErrCorrupt)
	case kind == blobRaw && n == len(body):
		return append([]byte{}, body...), nil
	case kind == blobLZ4 && n <= lz4Ratio*len(body):
		out := make([]byte, n)
		if m, err := lz4.UncompressBlock(body, out); err != nil || m != n {
			return nil, fmt.Errorf("blob: LZ4 block: %w", ErrCorrupt)
		}
		return out, nil
	}
	return nil, fmt.Errorf("blob of kind %d, length %d in %d bytes: %w", kind, n, len(body), ErrCorrupt)
}
