// Package size holds byte sizes as people write them: 16MiB, 2GiB, 1g, 4096.
package size

import (
	"fmt"
	"math"
	"strconv"
	"strings"
)

// Bytes is a number of bytes. It is a flag.Value and a pflag.Value.
type Bytes int64

// units maps lower-case suffixes to factors. A lone letter is binary, as in docker and systemd;
// only the explicit kb, mb, gb, tb are decimal.
var units = map[string]float64{
	"": 1, "b": 1,
	"k": 1 << 10, "ki": 1 << 10, "kib": 1 << 10, "kb": 1e3,
	"m": 1 << 20, "mi": 1 << 20, "mib": 1 << 20, "mb": 1e6,
	"g": 1 << 30, "gi": 1 << 30, "gib": 1 << 30, "gb": 1e9,
	"t": 1 << 40, "ti": 1 << 40, "tib": 1 << 40, "tb": 1e12,
}

// Parse reads a size: a number, which may have a fraction, and a unit.
func Parse(s string) (Bytes, error) {
	text := strings.TrimSpace(s)
	end := strings.IndexFunc(text, func(r rune) bool { return (r < '0' || r > '9') && r != '.' })
	if end < 0 {
		end = len(text)
	}
	factor, ok := units[strings.ToLower(strings.TrimSpace(text[end:]))]
	if !ok || end == 0 {
		return 0, fmt.Errorf("%q is no size: write a number and a unit, such as 16MiB, 2GiB or 1g", s)
	}
	// Whole numbers stay out of floating point, so that every int64 survives.
	if n, err := strconv.ParseInt(text[:end], 10, 64); err == nil && factor == 1 {
		return Bytes(n), nil
	}
	n, err := strconv.ParseFloat(text[:end], 64)
	if err != nil {
		return 0, fmt.Errorf("%q is no size: %q is no number", s, text[:end])
	}
	if n*factor >= math.MaxInt64 {
		return 0, fmt.Errorf("%q is too large: sizes end below 8388608TiB", s)
	}
	return Bytes(n * factor), nil
}

// Format writes n for people, with three significant digits at least: 0 B, 1.5 KiB, 117 MiB.
func Format(n uint64) string {
	if n < 1024 {
		return fmt.Sprintf("%d B", n)
	}
	v, unit := float64(n), 0
	for v >= 1023.5 && unit < 5 {
		v, unit = v/1024, unit+1
	}
	suffix := [...]string{"B", "KiB", "MiB", "GiB", "TiB", "PiB"}[unit]
	switch {
	case v < 9.995:
		return fmt.Sprintf("%.2f %s", v, suffix)
	case v < 99.95:
		return fmt.Sprintf("%.1f %s", v, suffix)
	}
	return fmt.Sprintf("%.0f %s", v, suffix)
}

// String writes b so that Parse gives it back: with the largest unit that divides it.
func (b Bytes) String() string {
	for _, u := range []struct {
		shift  uint
		suffix string
	}{{40, "TiB"}, {30, "GiB"}, {20, "MiB"}, {10, "KiB"}} {
		if b != 0 && b%(1<<u.shift) == 0 {
			return strconv.FormatInt(int64(b>>u.shift), 10) + u.suffix
		}
	}
	return strconv.FormatInt(int64(b), 10)
}

// Set parses s into b.
func (b *Bytes) Set(s string) error {
	n, err := Parse(s)
	if err == nil {
		*b = n
	}
	return err
}

// Type names the value in help texts.
func (b *Bytes) Type() string { return "size" }
