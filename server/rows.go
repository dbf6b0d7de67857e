package server

import (
	"kvtier/compress"
)

// convertRows returns rows in the sequence's element type: as they are, or
// converted if that loses nothing or lossy is allowed. They must be finite.
func convertRows(what string, b []byte, from, to compress.ElementType, lossy bool) ([]byte, error) {
	if from == to {
		return b, checkRows(what, b, from)
	}
	f, err := toFloats(what, b, from)
	if err != nil {
		return nil, err
	}
	if !lossy && !compress.Lossless(f, to) {
		return nil, invalid(ReasonLossy, "%s does not fit the sequence's element type: round it before, or set convert", what)
	}
	out := make([]byte, len(f)*to.Size())
	compress.FromFloat32(out, f, to)
	if lossy {
		compress.ToFloat32(f, out, to)
		if !compress.Finite(f) {
			return nil, invalid(ReasonValue, "%s overflows the sequence's element type", what)
		}
	}
	return out, nil
}

// maxMagnitude bounds queries, keys and values, so that no score and no sum of
// values leaves float32: dense attention over larger ones would give NaN, too.
const maxMagnitude = 0x1p56

// toFloats decodes a tensor and checks that it is finite, and not beyond maxMagnitude.
func toFloats(what string, b []byte, t compress.ElementType) ([]float32, error) {
	if t.Size() == 0 {
		return nil, invalid(ReasonArgument, "dtype %d of %s is unknown", t, what)
	}
	if len(b)%t.Size() != 0 {
		return nil, invalid(ReasonShape, "%s has %d bytes, not a multiple of its element's %d", what, len(b), t.Size())
	}
	f := make([]float32, len(b)/t.Size())
	compress.ToFloat32(f, b, t)
	return f, checkMagnitude(what, f, 1)
}

// checkRows is toFloats for its checks alone: rows of a prefill are large.
func checkRows(what string, b []byte, t compress.ElementType) error {
	var f [1024]float32
	size := t.Size()
	if size == 0 || len(b)%size != 0 {
		_, err := toFloats(what, b, t)
		return err
	}
	for n := 0; len(b) > 0; b = b[n*size:] {
		n = min(len(f), len(b)/size)
		compress.ToFloat32(f[:n], b, t)
		if err := checkMagnitude(what, f[:n], 1); err != nil {
			return err
		}
	}
	return nil
}

// checkMagnitude checks x times a factor, 0 or more.
func checkMagnitude(what string, x []float32, factor float32) error {
	for _, v := range x {
		switch y := v * factor; {
		case y >= -maxMagnitude && y <= maxMagnitude:
		case !finite(v):
			return invalid(ReasonValue, "%s holds NaN or infinity: the worker's computation went wrong before", what)
		default:
			return invalid(ReasonValue, "%s holds %g: attention in float32 takes magnitudes up to %g", what, y, float64(maxMagnitude))
		}
	}
	return nil
}

// putRow writes row i of one head's rows to the place of token at, in the
// sequence's element type.
func (s *sequence) putRow(dst []byte, rows []float32, i, at, head int) {
	d, size := s.spec.headDim, s.spec.typ.Size()
	off := at*s.spec.rowBytes() + head*d*size
	compress.FromFloat32(dst[off:off+d*size], rows[i*d:(i+1)*d], s.spec.typ)
}
