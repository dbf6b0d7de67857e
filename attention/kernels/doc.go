// Package kernels holds the inner loops of attention: products of query rows
// with keys, weights of scores, sums of values; over rows of floats, and over
// codes as they lie in pages, without unpacking them to memory. The query rows
// of a group share each load of a key or a value.
//
// A kernel has up to four variants: a plain Go loop, which says what it
// computes and runs everywhere, and assembly for AVX2, for AVX-512, and for the tile registers of AMX. The best
// one that the processor has is chosen at start; KVTIER_KERNELS=go, avx2,
// avx512 or amx asks for another. Variants differ in the order of float32 sums and in
// the last bits of exponentials. What is computed in integers, and UnpackKeys, has the same bits
// in all of them.
//
// The package knows slices only. Tables are [rows][n], row-major, a row
// beginning every stride elements. d is the head dimension: if it is no multiple
// of 16, the Go loop runs. Slices that are too short make a kernel panic before it reads them.
package kernels

//go:generate go -C gen run . -isa avx512 -out ../avx512_amd64.s -stubs ../avx512_amd64.go -pkg kernels
//go:generate go -C gen run . -isa avx2 -out ../avx2_amd64.s -stubs ../avx2_amd64.go -pkg kernels
//go:generate go -C gen run . -isa amx -out ../amx_amd64.s -stubs ../amx_amd64.go -pkg kernels
