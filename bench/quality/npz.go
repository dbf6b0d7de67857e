package quality

import (
	"archive/zip"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"regexp"
	"strconv"
	"strings"

	"kvtier/compress"
)

// array is a numpy array of up to three dimensions.
type array struct {
	shape []int
	f32   []float32 // of '<f4' and '<f2'
	i64   []int64   // of '<i8' and '<i4'
}

// maxArray bounds what a file may make us allocate, in bytes.
const maxArray = 8 << 30

var headerFields = regexp.MustCompile(`^\{'descr': '([<|=]?[a-z][0-9])', 'fortran_order': (True|False), 'shape': \(([0-9, ]*)\),? *\}\s*$`)

// readArray reads NAME.npy of an archive (numpy's format versions 1 to 3).
func readArray(z *zip.Reader, name string) (*array, error) {
	f, err := z.Open(name + ".npy")
	if err != nil {
		return nil, fmt.Errorf("array %s: %w", name, err)
	}
	defer f.Close()
	a, err := parseArray(f)
	if err != nil {
		return nil, fmt.Errorf("array %s: %w", name, err)
	}
	return a, nil
}

func parseArray(r io.Reader) (*array, error) {
	descr, shape, err := parseHeader(r)
	if err != nil {
		return nil, err
	}
	size := map[string]int{"<f4": 4, "<f2": 2, "<i8": 8, "<i4": 4}[descr]
	if size == 0 {
		return nil, fmt.Errorf("element type %q: float32, float16, int64 and int32 are read, little-endian", descr)
	}
	n := 1
	for _, s := range shape {
		if s < 0 || s > 0 && n > maxArray/size/s {
			return nil, fmt.Errorf("shape %v is too large", shape)
		}
		n *= s
	}
	// Read as it comes: a header that promises more than the file has must not allocate it.
	b, err := io.ReadAll(io.LimitReader(r, int64(n*size)))
	if err != nil {
		return nil, err
	}
	if len(b) != n*size {
		return nil, fmt.Errorf("%d bytes for shape %v: %w", len(b), shape, io.ErrUnexpectedEOF)
	}
	a := &array{shape: shape}
	switch descr {
	case "<f4", "<f2":
		a.f32 = make([]float32, n)
		compress.ToFloat32(a.f32, b, map[string]compress.ElementType{"<f4": compress.F32, "<f2": compress.F16}[descr])
		for _, x := range a.f32 {
			if math.IsNaN(float64(x)) || math.IsInf(float64(x), 0) {
				return nil, errors.New("holds NaN or infinity")
			}
		}
	case "<i8", "<i4":
		a.i64 = make([]int64, n)
		for i := range a.i64 {
			if size == 8 {
				a.i64[i] = int64(binary.LittleEndian.Uint64(b[8*i:]))
			} else {
				a.i64[i] = int64(int32(binary.LittleEndian.Uint32(b[4*i:])))
			}
		}
	}
	return a, nil
}

func parseHeader(r io.Reader) (descr string, shape []int, err error) {
	head := make([]byte, 10)
	if _, err := io.ReadFull(r, head); err != nil {
		return "", nil, err
	}
	if string(head[:6]) != "\x93NUMPY" || head[6] < 1 || head[6] > 3 {
		return "", nil, errors.New("not a .npy array")
	}
	n := int(binary.LittleEndian.Uint16(head[8:]))
	if head[6] > 1 { // versions 2 and 3 have 4 bytes of length
		more := make([]byte, 2)
		if _, err := io.ReadFull(r, more); err != nil {
			return "", nil, err
		}
		n |= int(binary.LittleEndian.Uint16(more)) << 16
	}
	if n > 1<<16 {
		return "", nil, fmt.Errorf("header of %d bytes", n)
	}
	text := make([]byte, n)
	if _, err := io.ReadFull(r, text); err != nil {
		return "", nil, err
	}
	m := headerFields.FindStringSubmatch(string(text))
	if m == nil {
		return "", nil, fmt.Errorf("header %q is not understood", text)
	}
	if m[2] == "True" {
		return "", nil, errors.New("the array is in Fortran order: save it by np.ascontiguousarray")
	}
	for _, s := range strings.Split(m[3], ",") {
		if s = strings.TrimSpace(s); s == "" {
			continue
		}
		v, err := strconv.Atoi(s)
		if err != nil {
			return "", nil, fmt.Errorf("shape (%s): %w", m[3], err)
		}
		shape = append(shape, v)
	}
	return m[1], shape, nil
}
