package kernels

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"kvtier/attention"
	"kvtier/compress"
	"kvtier/tiers"
	"kvtier/tiers/gpu/cuda/cudatest"
	"kvtier/tiers/seal"
)

// ordering are the instructions that keep threads and copies in order.
var ordering = regexp.MustCompile(`(?m)^\s*(bar\.sync|bar\.warp\.sync|cp\.async\.wait_group|cp\.async\.commit_group)[^;]*;`)

const (
	mutantChild = "KERNELS_TEST_MUTANT"
	survived    = "SURVIVED"
)

// TestMutants leaves out of the kernels of attention, one at a time, each instruction that
// orders threads or copies: the emulated device has to find an error, or the
// answer has to be wrong. So none of them is there for nothing, and whoever forgets one hears of it.
func TestMutants(t *testing.T) {
	if os.Getenv(mutantChild) != "" {
		mutant(t)
		return
	}
	missed(t, HeadDims, embedded)
}

// missed runs a test in a process for each instruction that orders: without it, the device or the test has to find something.
func missed(t *testing.T, headDims []int, ptx func(headDim int) ([]byte, error)) {
	t.Helper()
	emulated(t)
	if testing.Short() {
		t.Skip("a process for each instruction")
	}
	for _, d := range headDims {
		text, err := ptx(d)
		if err != nil {
			t.Fatal(err)
		}
		places := ordering.FindAllIndex(text, -1)
		if len(places) < 10 {
			t.Fatalf("head dimension %d: %d instructions are no kernels", d, len(places))
		}
		for i, at := range places {
			out, _ := command(t.Name(), fmt.Sprintf("%s=%d:%d", mutantChild, d, i))
			if strings.Contains(out, survived) || !strings.Contains(out, "FOUND") {
				kernel := regexp.MustCompile(`\.entry (\w+)`).FindAllSubmatch(text[:at[0]], -1)
				t.Errorf("head dimension %d, %s, line %d: nobody misses %q\n%s", d, kernel[len(kernel)-1][1],
					1+bytes.Count(text[:at[0]], []byte("\n")), bytes.TrimSpace(text[at[0]:at[1]]), out)
			}
		}
	}
}

// lacking returns PTX without the instruction that a mutant is to do without, and its head dimension.
func lacking(t *testing.T, ptx func(headDim int) ([]byte, error)) (text func(headDim int) ([]byte, error), headDim int) {
	t.Helper()
	var without int
	if _, err := fmt.Sscanf(os.Getenv(mutantChild), "%d:%d", &headDim, &without); err != nil {
		t.Fatal(err)
	}
	return func(headDim int) ([]byte, error) {
		text, err := ptx(headDim)
		at := ordering.FindAllIndex(text, -1)[without]
		return append(bytes.Clone(text[:at[0]]), text[at[1]:]...), err
	}, headDim
}

// TestChooseMutants does so to the kernels that choose.
func TestChooseMutants(t *testing.T) {
	if os.Getenv(mutantChild) == "" {
		missed(t, HeadDims, embeddedChoosing)
		return
	}
	device := cudatest.Open(t)
	a := newAttention(t, device)
	var d int
	a.choose, d = lacking(t, embeddedChoosing)
	rng := rand.New(rand.NewPCG(12, 1))
	m := shape{d: d, heads: 1, tokens: []int{700, 700}, profile: tiers.ProfileBalanced} // some warp scans several candidates
	all := m.make(rng)
	q := m.query(rng, 2, 3)
	outs, lses := dense(t, all, q, 0)
	got, err := answerAll(a, resident(t, device, all), Warps{1, 1}, q, 0)
	verdict(t, wrong(err, got, outs, lses))
}

// TestGatherMutants does so to those that attend to what was chosen: the answer has to be that of the whole kernels.
func TestGatherMutants(t *testing.T) {
	if os.Getenv(mutantChild) == "" {
		missed(t, HeadDims, embeddedGathering)
		return
	}
	device := cudatest.Open(t)
	text, d := lacking(t, embeddedGathering)
	whole, without := newAttention(t, device), newAttention(t, device)
	without.gather = text
	rng := rand.New(rand.NewPCG(13, uint64(d)))
	for _, profile := range []tiers.Profile{tiers.ProfileNeutral, tiers.ProfileBalanced} {
		m := shape{d: d, heads: 1, tokens: []int{300, 300}, profile: profile}
		segments, q := resident(t, device, m.make(rng)), m.query(rng, 2, 3)
		// Of half of the pages some tokens are read; of all all, 32 in each step.
		for _, share := range []uint32{Everything / 2, Everything - 1} {
			want, err := answerShare(whole, segments, Warps{1, 1}, q, 0, share)
			if err != nil {
				t.Fatal(err)
			}
			got, err := answerShare(without, segments, Warps{1, 1}, q, 0, share)
			if err == nil && !slices.EqualFunc(got, want, func(x, y attention.Partial) bool { return x.Sum == y.Sum && slices.Equal(x.Out, y.Out) }) {
				err = errors.New("another answer")
			}
			if err != nil {
				verdict(t, err)
				return
			}
		}
	}
	verdict(t, nil)
}

// TestSealMutants does so to the kernels that seal, of one head dimension: they differ in how often loops run.
func TestSealMutants(t *testing.T) {
	if os.Getenv(mutantChild) == "" {
		missed(t, []int{64}, embeddedSealing)
		return
	}
	s := newSealing(t, cudatest.Open(t))
	var d int
	s.text, d = lacking(t, embeddedSealing)
	m := toSeal{d: d, layers: 1, heads: 1, tokens: 272, typ: compress.BF16, profile: tiers.ProfileNeutral, queries: 1}
	rows, options := m.rows(rand.New(rand.NewPCG(1, 8)))
	got, err := s.Seal(ctx, rows, options, nil)
	if h, _ := seal.Segment(rows[0], options[0]); err == nil && got[0].Header.ID != h.ID {
		err = errors.New("another segment")
	}
	verdict(t, err)
}

// mutant attends with kernels that lack an instruction.
func mutant(t *testing.T) {
	device := cudatest.Open(t)
	a := newAttention(t, device)
	var d int
	a.text, d = lacking(t, embedded)
	rng := rand.New(rand.NewPCG(11, uint64(d)))
	// Some warp attends drains of two segments, and every warp several units.
	drains := []int{264, 264, 264, 264, 264}
	for _, m := range []shape{{tokens: []int{200, 150}, profile: tiers.ProfileNeutral}, {tokens: drains, profile: tiers.ProfileBalanced}} {
		m.d, m.heads = d, 1
		all := m.make(rng)
		q := m.query(rng, 2, 3)
		outs, lses := dense(t, all, q, 0)
		got, err := answer(a, resident(t, device, all), Warps{4, 4}, q, 0)
		if err = wrong(err, got, outs, lses); err != nil {
			verdict(t, err)
			return
		}
	}
	verdict(t, nil)
}

// wrong returns err or, if there is none, that an answer is another one.
func wrong(err error, got []attention.Partial, outs [][]float64, lses []float64) error {
	if err != nil {
		return err
	}
	if output, lse := differs(got, outs, lses); output > mostError || lse > mostError {
		return errors.New("another answer")
	}
	return nil
}

// verdict says whether an error gave the mutant away.
func verdict(t *testing.T, err error) {
	if err != nil {
		t.Log("FOUND", err)
		return
	}
	t.Log(survived)
}
