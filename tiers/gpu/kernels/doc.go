// Package kernels attends to sealed segments where they lie in device memory.
//
// The kernels are CUDA C (attend.cu), compiled to PTX that is committed, and
// that the driver compiles for the device at hand: no toolkit is needed to
// build or to run. docs/gpu.md says how they work and what bounds them.
package kernels

//go:generate ./generate.sh
