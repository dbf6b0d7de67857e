package size

import (
	"math"
	"testing"
)

func TestParse(t *testing.T) {
	for in, want := range map[string]Bytes{
		"0": 0, "4096": 4096, "16MiB": 16 << 20, "2GiB": 2 << 30, "1g": 1 << 30, "1G": 1 << 30,
		"1.5k": 1536, "20 GiB": 20 << 30, "3GB": 3e9, " 7b ": 7, "1t": 1 << 40,
		"9223372036854775807": math.MaxInt64,
	} {
		if got, err := Parse(in); err != nil || got != want {
			t.Errorf("Parse(%q) = %d, %v; want %d", in, got, err, want)
		}
	}
}

func TestParseRefuses(t *testing.T) {
	for _, in := range []string{"", "GiB", "-1", "1x", "1.2.3g", "1e3", "9223372036854775808", "9e9t", "99999999999999t", "."} {
		if got, err := Parse(in); err == nil {
			t.Errorf("Parse(%q) = %d; want an error", in, got)
		}
	}
}

func TestFormat(t *testing.T) {
	for in, want := range map[uint64]string{
		0: "0 B", 1023: "1023 B", 1024: "1.00 KiB", 16 << 20: "16.0 MiB", 1<<20 - 1: "1.00 MiB",
		117 << 20: "117 MiB", 3 << 29: "1.50 GiB", math.MaxUint64: "16384 PiB",
	} {
		if got := Format(in); got != want {
			t.Errorf("Format(%d) = %q; want %q", in, got, want)
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range []string{"16MiB", "1g", "4096", "1.5k", "", "9223372036854775807", "-3"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		b, err := Parse(s)
		if err != nil {
			return
		}
		if b < 0 {
			t.Fatalf("Parse(%q) = %d: negative", s, b)
		}
		if again, err := Parse(b.String()); err != nil || (again != b && b < 1<<53) {
			t.Fatalf("Parse(%q) = %d, but Parse(%q) = %d, %v", s, b, b.String(), again, err)
		}
	})
}
