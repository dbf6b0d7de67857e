package kernels

import (
	"fmt"
	"os"
	"sync/atomic"
)

// Variant is an implementation of all kernels.
type Variant int32

// The variants, from slowest to fastest.
const (
	Go Variant = iota
	AVX2
	AVX512 // with VNNI
	AMX    // tiles of bytes, for keys' scores and sums of values; else AVX-512
)

// EnvVar is the environment variable that asks for a variant by name.
const EnvVar = "KVTIER_KERNELS"

var names = [...]string{Go: "go", AVX2: "avx2", AVX512: "avx512", AMX: "amx"}

func (v Variant) String() string { return names[v] }

// Variants lists the variants that this processor can run, the fastest last.
func Variants() []Variant {
	out := []Variant{Go}
	for _, v := range []Variant{AVX2, AVX512, AMX} {
		if supported(v) {
			out = append(out, v)
		}
	}
	return out
}

var (
	active atomic.Int32
	envErr error
)

func init() {
	v, err := fromEnv(os.Getenv(EnvVar))
	active.Store(int32(v))
	envErr = err
}

// fromEnv returns the variant of a name; the fastest, of no name or a wrong one.
func fromEnv(name string) (Variant, error) {
	list := Variants()
	for _, v := range list {
		if v.String() == name {
			return v, nil
		}
	}
	best := list[len(list)-1]
	if name == "" {
		return best, nil
	}
	return best, fmt.Errorf("%s=%s: this processor has the kernels %v", EnvVar, name, list)
}

// Active returns the variant in use. The error says that EnvVar asks for one that
// this processor does not have, or that is unknown; then the fastest is in use.
func Active() (Variant, error) { return Variant(active.Load()), envErr }

// Use makes all kernels that are called from now on use v, which is one of
// Variants. It is for tests and benchmarks, which compare variants in one process.
func Use(v Variant) (undo func()) {
	old := active.Swap(int32(v))
	return func() { active.Store(old) }
}
