package compress

import (
	"bytes"
	"errors"
	"testing"

	"pgregory.net/rapid"
)

func TestBlob(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		b := bytes.Repeat(rapid.SliceOfN(rapid.Byte(), 0, 300).Draw(t, "b"), rapid.IntRange(1, 50).Draw(t, "times"))
		p := PackBlob(b)
		if len(p) > len(b)+blobHeader {
			t.Fatalf("%d bytes became %d", len(b), len(p))
		}
		got, err := UnpackBlob(p, len(b))
		if err != nil || !bytes.Equal(got, b) {
			t.Fatalf("%d bytes came back as %d: %v", len(b), len(got), err)
		}
		if _, err := UnpackBlob(p, len(b)-1); !errors.Is(err, ErrCorrupt) {
			t.Fatalf("the limit is ignored: %v", err)
		}
	})
}

func TestBlobGains(t *testing.T) {
	b := bytes.Repeat([]byte("a catalogue's cold text, "), 400)
	if p := PackBlob(b); len(p) > len(b)/20 {
		t.Errorf("%d bytes became %d", len(b), len(p))
	}
	// The largest ratio that LZ4 reaches must pass UnpackBlob's bound on it.
	zeros := make([]byte, 1<<22)
	if got, err := UnpackBlob(PackBlob(zeros), len(zeros)); err != nil || !bytes.Equal(got, zeros) {
		t.Error(err)
	}
}

func TestBlobRefusesDamage(t *testing.T) {
	p := PackBlob(bytes.Repeat([]byte("0123456789"), 100))
	f := func(what string, b []byte) {
		t.Helper()
		if _, err := UnpackBlob(b, 1<<20); !errors.Is(err, ErrCorrupt) {
			t.Errorf("%s: %v", what, err)
		}
	}
	f("empty", nil)
	f("cut header", p[:4])
	f("cut body", p[:len(p)-1])
	f("kind", append([]byte{7}, p[1:]...))
	f("length", append([]byte{p[0], p[1] + 1}, p[2:]...))
	f("huge length", append([]byte{p[0], 0, 0, 8, 0}, p[5:]...))
	f("raw length", []byte{blobRaw, 3, 0, 0, 0, 1, 2})
}
