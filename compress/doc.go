// Package compress turns rows of keys and values into planes and back.
//
// A plane is a bit-slice of codes: each plane that is read sharpens what the
// planes before it said, so a reader pays only for the precision it wants.
//
//   - Keys (KeySteps, KeyOrder, PackKeyPlanes) have 8-bit floor codes. A group
//     of up to 256 tokens shares the lower end and the bin width of each channel.
//     The codes nest: their top 2 and top 4 bits are codes of bins 64 and 16
//     times as wide. Planes hold them 2 bits at a time, those first that change
//     scores most: a channel that queries hardly feel gets its bits last.
//   - Values (PackValues) are rotated, then each token has 8-bit floor codes of
//     its own range, in two nibble planes.
//   - Exact rows (PackExact) keep every bit: exponents are packed against the
//     channel's maximum in the page, signs and mantissas lie as they are.
//   - Blobs (PackBlob) are bytes of any kind under LZ4.
//
// Rows are float32 [n][d], row-major; d, the head dimension, is a multiple of
// 16 from 16 to MaxHeadDim. The unit of key planes is a leaf of 16 tokens, that
// of exact rows a page of 64. The package knows slices only: nothing here
// allocates by a size that stored bytes claim before checking it.
//
// What is packed is packed by plain Go loops; reading back and scoring run on package
// kernels. Products that meet a sum are rounded by an explicit conversion, so that
// no platform fuses them and all compute the same bits.
package compress

import "errors"

const (
	// MaxHeadDim is the largest head dimension.
	MaxHeadDim = 256
	// leafTokens is the unit of key planes, pageTokens that of exact rows.
	leafTokens = 16
	pageTokens = 64
)

// ErrCorrupt says that stored bytes are not what this package writes.
var ErrCorrupt = errors.New("compress: corrupt data")

func validDim(d int) bool { return d >= 16 && d <= MaxHeadDim && d%16 == 0 }
