package compress

import (
	"fmt"
	"slices"

	"kvtier/attention/kernels"
)

// MeanKeys are the mean keys of a segment's pages, at 4 bits a channel: 16 of them lie as a leaf's keys do of which
// every group of channels, in their own order, has its first 2 lines. All of them share the bins.
type MeanKeys struct {
	d, n, exp    int
	bins, leaves []byte
}

const (
	meanLevels = 2 // pairs of bits that mean keys have
	// MeanKeyLeaf is how many mean keys are scored at once.
	MeanKeyLeaf = leafTokens
)

// meanLayouts holds the layout of a leaf of mean keys, by groups of channels.
var meanLayouts = func() (t [MaxHeadDim/groupDims + 1]KeyLayout) {
	for groups := range t {
		var known []uint8
		var places []kernels.LinePlace
		for line := range meanLevels * groups {
			if line%meanLevels == 0 {
				known = append(known, meanLevels)
			}
			places = append(places, kernels.LinePlace{At: uint16(line * lineBytes)})
		}
		t[groups] = KeyLayout{d: groups * groupDims, lines: kernels.NewLayout(known, places)}
	}
	return t
}()

func meanLeafBytes(d int) int { return d / groupDims * meanLevels * lineBytes }

// MeanKeyPlaces returns n, rounded up to whole leaves.
func MeanKeyPlaces(n int) int { return (n + MeanKeyLeaf - 1) / MeanKeyLeaf * MeanKeyLeaf }

// MeanKeysBytes is the stored size of n mean keys: their bins, then leaves.
func MeanKeysBytes(n, d int) int {
	return KeyStepsBytes(d) + MeanKeyPlaces(n)/MeanKeyLeaf*meanLeafBytes(d)
}

// AppendMeanKeys appends the stored form of mean keys x [n][d], n at least 1. exp is that of KeyExp over the keys that they
// are means of.
func AppendMeanKeys(b []byte, x []float32, d, exp int) []byte {
	n := len(x) / d
	s := FitKeySteps(x, d, exp)
	b = s.Append(b, exp)
	codes := make([]uint8, len(x))
	KeyCodes(codes, x, d, s, nil)
	at := len(b)
	b = append(b, make([]byte, MeanKeyPlaces(n)/MeanKeyLeaf*meanLeafBytes(d))...)
	for i := range n {
		leaf := b[at+i/MeanKeyLeaf*meanLeafBytes(d):][:meanLeafBytes(d)]
		for line := range d / groupDims * meanLevels {
			group, level := line/meanLevels, line%meanLevels
			packWord(leaf[line*lineBytes+i%MeanKeyLeaf*4:], codes[i*d+group*groupDims:][:groupDims], 6-2*level)
		}
	}
	return b
}

// Parse reads what AppendMeanKeys wrote of n mean keys into m, all but their bins, which are read when they are needed. It keeps b. The error is ErrCorrupt.
func (m *MeanKeys) Parse(b []byte, n, d, exp int) error {
	if !validDim(d) || len(b) != MeanKeysBytes(n, d) {
		return fmt.Errorf("mean keys: %d bytes for %d of %d channels: %w", len(b), n, d, ErrCorrupt)
	}
	*m = MeanKeys{d: d, n: n, exp: exp, bins: b[:KeyStepsBytes(d)], leaves: b[KeyStepsBytes(d):]}
	return nil
}

// ReadSteps reads the mean keys' bins to s, of all channels. The error is ErrCorrupt.
func (m *MeanKeys) ReadSteps(s KeySteps) error { return s.Parse(m.bins, m.exp) }

// Len returns how many there are.
func (m *MeanKeys) Len() int { return m.n }

func (m *MeanKeys) layout() *KeyLayout { return &meanLayouts[m.d/groupDims] }

// eachLeaf calls use with the number of each leaf's first mean key and with its planes.
func (m *MeanKeys) eachLeaf(use func(first int, planes [][]byte)) {
	size := meanLeafBytes(m.d)
	var planes [1][]byte
	for i := 0; i < m.n; i += MeanKeyLeaf {
		planes[0] = m.leaves[i/MeanKeyLeaf*size:][:size]
		use(i, planes[:])
	}
}

// Prefetch has the processor fetch what Scores reads.
func (m *MeanKeys) Prefetch() {
	kernels.Prefetch(m.bins)
	kernels.Prefetch(m.leaves)
}

// Scores writes the products of query rows q [rows][d] and all mean keys to dst [rows][MeanKeyPlaces], a row beginning every
// stride; what lies behind the last mean key may be anything. folded has room for rows*d words and 2 numbers of scale a row. The error is ErrCorrupt.
func (m *MeanKeys) Scores(dst []float32, stride int, q []float32, folded kernels.KeyQuery) error {
	l := m.layout()
	if err := l.FoldStored(folded, q, m.bins, m.exp); err != nil {
		return err
	}
	m.eachLeaf(func(first int, planes [][]byte) { l.Score(dst[first:], stride, folded, planes) })
	return nil
}

// AddTo adds to each row of out, at least [d], all mean keys, weighted by its row of w [rows][MeanKeyPlaces], a row beginning every
// stride: 0 behind the last one. steps are what ReadSteps reads. codes [rows][d] is 0; it and spare [rows][d], finite numbers, hold anything afterwards.
func (m *MeanKeys) AddTo(out, codes, spare [][]float32, w []float32, stride int, steps KeySteps) {
	m.eachLeaf(func(first int, planes [][]byte) {
		for r := range codes { // of long contexts few pages of a segment count
			if slices.ContainsFunc(w[r*stride+first:][:MeanKeyLeaf], func(x float32) bool { return x != 0 }) {
				m.layout().SumCodes(codes, w[first:], stride, planes)
				return
			}
		}
	})
	mass := make([]float32, len(codes))
	for r := range codes {
		for _, x := range w[r*stride:][:m.n] {
			mass[r] += x
		}
	}
	kernels.AddBins(out, spare, codes, mass, steps.Lo, steps.Step, m.layout().Levels(), new([levels + 1]float32))
}

// Rows writes all mean keys to dst [MeanKeyPlaces][d]; what lies behind the last one is anything. The error is ErrCorrupt.
func (m *MeanKeys) Rows(dst []float32) error {
	steps := NewKeySteps(m.d)
	if err := m.ReadSteps(steps); err != nil {
		return err
	}
	m.eachLeaf(func(first int, planes [][]byte) { m.layout().Unpack(dst[first*m.d:], steps, planes) })
	return nil
}
