package daemon

import (
	"fmt"

	"kvtier/cmd/internal/size"
)

// GPU is a limit of device memory, in bytes. It is a pflag.Value.
type GPU int64

// GPUAuto is what the GPU has free, if there is one; GPUOff is none.
const (
	GPUAuto GPU = -1
	GPUOff  GPU = 0
)

// Set reads auto, off or a size.
func (g *GPU) Set(s string) error {
	switch s {
	case "auto":
		*g = GPUAuto
	case "off":
		*g = GPUOff
	default:
		b, err := size.Parse(s)
		if err != nil {
			return fmt.Errorf("%w; or auto, or off", err)
		}
		*g = GPU(b)
	}
	return nil
}

func (g *GPU) String() string {
	switch *g {
	case GPUAuto:
		return "auto"
	case GPUOff:
		return "off"
	}
	b := size.Bytes(*g)
	return b.String()
}

// Type names it in help texts.
func (g *GPU) Type() string { return "auto|off|size" }
